"""Value optimisation of a batch of facts against one fact at a time through the whole model, per fact.

Real model (SmolLM2-135M), real facts (world-facts), the preset's settings. Both ways run 25 Adam steps per fact (the
stop rule is off). One by one is timed on every eighth fact of the batch. On these facts both ways must reach the same
losses.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines.values import optimise_one_by_one
from sphere_edit.data import load_requests
from sphere_edit.model.inference import frozen
from sphere_edit.model.loading import load_model
from sphere_edit.model.structure import find_structure
from sphere_edit.targets.contexts import generate_contexts
from sphere_edit.targets.optimised import optimise_values
from sphere_edit.targets.presets import preset

FACTS, EVERY = 32, 8


@pytest.fixture(scope="module")
def setting():
    model, tokenizer = load_model("smollm2-135m")
    config = preset("smollm2-135m", targets="optimised").replace(value_stop=0.0, value_stop_on="loss")
    with frozen(model):
        contexts = generate_contexts(model, tokenizer, config.contexts, config.context_length, config.seed)
        yield {
            "model": model,
            "tokenizer": tokenizer,
            "structure": find_structure(model),
            "contexts": contexts,
            "config": config,
            "layer": config.layers[-1],
        }


@pytest.fixture(scope="module")
def reached(setting):
    """Losses of the shared facts, filled by the baseline's benchmark and read by ours."""
    return {}


def test_one_by_one(benchmark, setting, reached, gemm_gflops):
    requests = load_requests("world-facts", limit=FACTS)[::EVERY]
    out = benchmark.pedantic(optimise_one_by_one, kwargs={**setting, "requests": requests}, rounds=1)
    reached["loss"] = out.loss
    note(benchmark, len(requests), out.loss, out, gemm_gflops)


def test_batched(benchmark, setting, reached, gemm_gflops):
    requests = load_requests("world-facts", limit=FACTS)
    out = benchmark.pedantic(optimise_values, kwargs={**setting, "requests": requests}, rounds=3)
    torch.testing.assert_close(out.loss[::EVERY], reached["loss"], rtol=5e-2, atol=5e-3)
    note(benchmark, FACTS, out.loss[::EVERY], out, gemm_gflops)


def note(benchmark, facts, shared, out, gemm_gflops):
    benchmark.extra_info.update(
        facts=facts,
        steps=int(out.steps.max()),
        shared_loss=[round(x, 4) for x in shared.tolist()],
        threads=torch.get_num_threads(),
        gemm_gflops=round(gemm_gflops, 1),
        torch=str(torch.__version__),
    )
