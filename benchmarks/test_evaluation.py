"""Batched scores and answers of edits, against one forward pass per prompt and target, and one answer at a time.

Real model (SmolLM2-135M), real facts (world-facts, with paraphrases and neighbours). One by one is timed on every
fourth fact of the batch. On these facts both ways must give the same scores, log-probabilities and answers.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines.evaluation import answer_one_by_one, evaluate_one_by_one
from sphere_edit.data import load_requests
from sphere_edit.evaluation.answers import ANSWER_TOKENS, write_answers
from sphere_edit.evaluation.metrics import evaluate, questions, score_targets
from sphere_edit.model.inference import frozen
from sphere_edit.model.loading import load_model

FACTS, EVERY = 8, 4


@pytest.fixture(scope="module")
def setting():
    model, tokenizer = load_model("smollm2-135m")
    with frozen(model):
        yield model, tokenizer, load_requests("world-facts:city-country,city-continent,country-continent", limit=FACTS)


@pytest.fixture(scope="module")
def reached(setting):
    """Results of `evaluate_one_by_one`, filled by the baseline's benchmark and read by ours."""
    return {}


def test_one_by_one(benchmark, setting, reached, gemm_gflops):
    model, tokenizer, requests = setting
    requests = requests[::EVERY]
    found = benchmark.pedantic(evaluate_one_by_one, args=(model, tokenizer, requests), rounds=1)
    reached["scores"], reached["pairs"] = found
    note(benchmark, requests, gemm_gflops)


def test_batched(benchmark, setting, reached, gemm_gflops):
    model, tokenizer, requests = setting
    pairs = reached["pairs"]
    log_probs, correct = score_targets(model, tokenizer, list(pairs))
    torch.testing.assert_close(log_probs, [mean for mean, _ in pairs.values()], rtol=0, atol=1e-3)
    assert correct == [right == 1 for _, right in pairs.values()]
    found = benchmark.pedantic(evaluate, args=(model, tokenizer, requests), rounds=3)
    assert found.per_request[::EVERY] == [pytest.approx(scores) for scores in reached["scores"]]
    note(benchmark, requests, gemm_gflops)


def test_answers_one_by_one(benchmark, setting, reached, gemm_gflops):
    model, tokenizer, requests = setting
    requests = requests[::EVERY]
    asked = prompts(requests)
    args = (model, tokenizer, asked, ANSWER_TOKENS)
    reached["answers"] = benchmark.pedantic(answer_one_by_one, args=args, rounds=1)
    note(benchmark, requests, gemm_gflops, len(asked))


def test_answers_batched(benchmark, setting, reached, gemm_gflops):
    model, tokenizer, requests = setting
    asked = prompts(requests)
    found = benchmark.pedantic(write_answers, args=(model, tokenizer, asked), rounds=3)
    said = dict(zip(asked, found, strict=True))
    assert [said[prompt] for prompt in prompts(requests[::EVERY])] == reached["answers"]
    note(benchmark, requests, gemm_gflops, len(asked))


def prompts(requests):
    return list(dict.fromkeys(q.prompt for r in requests for group in questions(r).values() for q in group))


def note(benchmark, requests, gemm_gflops, targets=None):
    """Note the fields of a row; an answer counts as a target."""
    benchmark.extra_info.update(
        facts=len(requests),
        targets=targets or sum(2 * (1 + len(r.paraphrases) + len(r.neighborhood)) for r in requests),
        threads=torch.get_num_threads(),
        gemm_gflops=round(gemm_gflops, 1),
        torch=str(torch.__version__),
    )
