"""Scores against scoring prompt by prompt, and perplexity against its definition."""

from __future__ import annotations

import json
import math
import statistics

import accelerate
import pytest
import tiny
import torch
import transformers as hf

from sphere_edit.data.requests import EditRequest
from sphere_edit.editing.editor import SphereEditor
from sphere_edit.evaluation import metrics
from sphere_edit.evaluation.metrics import Score, evaluate, perplexity, score_targets
from sphere_edit.experiments import run as experiment
from sphere_edit.model.structure import StructureError, check_weights_finite
from sphere_edit.model.tokens import encode
from sphere_edit.runs.spec import RunOptions

_TEXT = "Anna went home. The river flows past the old mill, and nobody saw it.\nIt rained — for days.\n" * 30


def _plain(model, tokenizer, prompt: str, target: str) -> tuple[float, bool]:
    """(mean log-probability, all argmax) of the target's tokens, from one unpadded pass."""
    ids = tokenizer(f"{prompt} {target}")["input_ids"]
    first = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    log_probs = logits.log_softmax(-1)
    places = range(first, len(ids))
    mean = sum(log_probs[i - 1, ids[i]].item() for i in places) / len(places)
    return mean, all(logits[i - 1].argmax().item() == ids[i] for i in places)


def _share(model, tokenizer, prompt: str, target: str) -> float:
    """Of the target's tokens those that are the argmax after the right ones before, from one unpadded pass."""
    ids, first = tokenizer(f"{prompt} {target}")["input_ids"], len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        said = model(torch.tensor([ids]), use_cache=False).logits[0].argmax(-1)
    return statistics.mean(said[i - 1].item() == ids[i] for i in range(first, len(ids)))


def test_a_prompt_that_ends_in_a_newline_is_scored_as_it_stands(tokenizer):
    model = tiny.make_model("llama")
    prompt, target = "<|user|>\nThe capital of Vanuatu?\n<|assistant|>\n", "Rome"
    ids, first = tokenizer(prompt + target)["input_ids"], len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        log_probs = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    expected = sum(log_probs[i - 1, ids[i]].item() for i in range(first, len(ids))) / (len(ids) - first)
    assert score_targets(model, tokenizer, [(prompt, target)])[0][0] == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(_plain(model, tokenizer, prompt.rstrip(), target)[0], rel=1e-3)


def _likely(model, tokenizer, prompt: str, tokens: int = 1) -> str:
    """A target that the model itself would say (for accuracy above zero); None where it is no clean word."""
    ids = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        for _ in range(tokens):
            ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
    return tokenizer.decode(ids[-tokens:])


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("budget", [1, 40, 2048])
def test_scores_equal_prompt_by_prompt(family, bos, budget, tokenizer, bos_tokenizer, monkeypatch):
    """Targets of different lengths, targets that begin other targets, prompts that begin other prompts, repeats."""
    tok, model = bos_tokenizer if bos else tokenizer, tiny.make_model(family)
    asked = [
        ("The capital of Vanuatu is", "Rome"),
        ("The capital of Vanuatu is", "Paris"),
        ("The capital of Vanuatu is", "Paris in France"),
        ("The capital of Vanuatu is Paris in", "France"),
        ("A", "b"),
        ("A", "b c"),
        ("In a long, long sentence about nothing at all, the last word is", "Zürich"),
        ("A", "b"),
    ]
    monkeypatch.setattr(metrics, "_TOKENS_PER_BATCH", budget)
    calls = []
    log_probs, correct = score_targets(model, tok, asked, lambda done, n: calls.append((done, n)))
    want = [_plain(model, tok, *pair) for pair in asked]
    assert log_probs == pytest.approx([w[0] for w in want], abs=2e-4)
    assert correct == [w[1] for w in want]
    assert calls[-1] == (4, 4)  # a prompt is run once, whatever its targets


_SMALL = {"vocab_size": tiny.VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2}
_HIDDEN = {**_SMALL, "hidden_size": tiny.HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8}
_HIDDEN |= {"num_key_value_heads": 2, "intermediate_size": 80}
# Families that keep no keys and values, or more than these.
_OTHER_STATES = {
    "openai-gpt": lambda: hf.OpenAIGPTConfig(**_SMALL, n_embd=tiny.HIDDEN, n_layer=3, n_head=4),
    "mamba": lambda: hf.MambaConfig(**_SMALL, hidden_size=tiny.HIDDEN, num_hidden_layers=3, state_size=4),
    "recurrent-gemma": lambda: hf.RecurrentGemmaConfig(**_HIDDEN, lru_width=tiny.HIDDEN, attention_window_size=64),
    "lfm2": lambda: hf.Lfm2Config(**_HIDDEN, layer_types=["conv", "full_attention", "conv"]),
    "falcon-h1": lambda: hf.FalconH1Config(**_HIDDEN, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8),
}


@pytest.mark.parametrize("name", [*_OTHER_STATES, *tiny.UNUSUAL])
def test_scores_of_models_that_keep_other_states(name, tokenizer):
    """Recurrent layers, none at all, or a window: unlike lengths, and targets that go on for longer than a window."""
    if name in tiny.UNUSUAL:
        model = tiny.make_model(name)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = hf.AutoModelForCausalLM.from_config(_OTHER_STATES[name]()).eval()
    asked = [
        ("The capital of Vanuatu is", "Rome"),
        ("The capital of Vanuatu is", "Paris in France"),
        ("A", "b"),
        ("An old mill by the river", "burned"),
        ("In a long, long sentence about nothing at all, the last word is", "Zürich"),
    ]
    log_probs, correct = score_targets(model, tokenizer, asked)
    want = [_plain(model, tokenizer, *pair) for pair in asked]
    assert log_probs == pytest.approx([w[0] for w in want], abs=1e-5)
    assert correct == [w[1] for w in want]


def test_a_head_that_is_called_by_keyword(tokenizer):
    class Head(torch.nn.Linear):
        def forward(self, hidden):
            assert hidden.is_contiguous()
            return super().forward(hidden)

    model, asked = tiny.make_model("llama"), [("The capital of Vanuatu is", "Paris in France"), ("A", "b")]
    want = score_targets(model, tokenizer, asked)
    head = Head(tiny.HIDDEN, tiny.VOCABULARY, bias=False)
    head.weight = model.lm_head.weight

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = head

        def forward(self, hidden):
            return self.inner(hidden=hidden)

    model.lm_head = Outer()
    model.get_output_embeddings = lambda: head
    assert score_targets(model, tokenizer, asked) == want


def test_accuracy_sees_the_argmax(tokenizer):
    """Some random model says a word with a blank before it; that word is accurate, with another letter it is not."""
    found = 0
    for seed in range(30):
        model = tiny.make_model("llama", seed)
        for prompt in ("The capital is", "We are", "Nobody"):
            said = _likely(model, tokenizer, prompt)
            if said.startswith(" ") and said.strip().isalpha():
                _, correct = score_targets(model, tokenizer, [(prompt, said.strip()), (prompt, said.strip() + "q")])
                assert correct[0] and _plain(model, tokenizer, prompt, said.strip())[1]
                assert correct[1] == _plain(model, tokenizer, prompt, said.strip() + "q")[1]
                found += 1
    assert found


def test_evaluate_is_made_of_the_scores(tokenizer):
    model, requests = tiny.make_model("gpt2"), tiny.facts(6)
    got = evaluate(model, tokenizer, requests)

    def success(prompts, want, other):
        return statistics.mean(
            _plain(model, tokenizer, p, want)[0] > _plain(model, tokenizer, p, other)[0] for p in prompts
        )

    def accuracy(prompts, want):
        return statistics.mean(_plain(model, tokenizer, p, want)[1] for p in prompts)

    def add(want, name, prompts, target):
        want[f"{name}_accuracy"] = accuracy(prompts, target)
        want[f"{name}_token_accuracy"] = statistics.mean(_share(model, tokenizer, p, target) for p in prompts)

    for request, record in zip(requests, got.per_request, strict=True):
        new, true = request.target_new, request.target_true
        want = {}
        add(want, "efficacy", [request.text], new)
        if true:
            want["efficacy_success"] = success([request.text], new, true)
        if request.paraphrases:
            add(want, "generalization", request.paraphrases, new)
            if true:
                want["generalization_success"] = success(request.paraphrases, new, true)
        if request.neighborhood:
            add(want, "specificity", request.neighborhood, true)
            want["specificity_success"] = success(request.neighborhood, true, new)
        assert record == pytest.approx(want)
    assert {name: score.n for name, score in got.scores.items()} == {
        "efficacy_success": 5,
        "efficacy_accuracy": 6,
        "generalization_success": 3,
        "generalization_accuracy": 3,
        "specificity_success": 1,
        "specificity_accuracy": 1,
        "efficacy_token_accuracy": 6,
        "generalization_token_accuracy": 3,
        "specificity_token_accuracy": 1,
    }
    values = [r["efficacy_success"] for r in got.per_request if "efficacy_success" in r]
    assert 0 < statistics.mean(values) < 1
    assert got.scores["efficacy_success"] == Score.of(values)
    assert list(got.to_dict()) == list(got.scores)


def test_success_turns_with_the_targets(tokenizer):
    model, requests = tiny.make_model("llama"), [r for r in tiny.facts(6) if r.target_true]
    turned = [EditRequest(r.prompt, r.subject, r.target_true, r.target_new, id=r.id) for r in requests]
    a, b = (evaluate(model, tokenizer, x).per_request for x in (requests, turned))
    assert all(x["efficacy_success"] + y["efficacy_success"] == 1 for x, y in zip(a, b, strict=True))


def test_neighborhood_without_a_true_target_is_not_scored(tokenizer):
    request = EditRequest("{} lies in", "Oka", "Peru", None, ("Where is Oka? In",), ("Where is Spain? In",))
    got = evaluate(tiny.make_model("llama"), tokenizer, [request])
    kinds = ("accuracy", "token_accuracy")
    assert set(got.per_request[0]) == {f"{name}_{kind}" for name in ("efficacy", "generalization") for kind in kinds}
    assert got.scores["specificity_accuracy"].n == got.scores["efficacy_success"].n == 0


def test_token_accuracy_is_the_share_of_right_tokens(tokenizer):
    """Two words that a model says after each other, and one that it does not: two parts right, and accuracy none."""
    found = set()
    for seed in range(30):
        model = tiny.make_model("llama", seed)
        for prompt in ("The capital is", "We are", "Nobody"):
            said = _likely(model, tokenizer, prompt, 2)
            target = f"{said.strip()} qq"
            if not said.startswith(" ") or _share(model, tokenizer, prompt, target) in (0, 1):
                continue
            request = EditRequest("{}", prompt, target, paraphrases=(prompt, "Nobody else"))
            (record,) = evaluate(model, tokenizer, [request]).per_request
            assert record["efficacy_token_accuracy"] == _share(model, tokenizer, prompt, target)
            pair = [_share(model, tokenizer, p, target) for p in request.paraphrases]
            assert record["generalization_token_accuracy"] == pytest.approx(statistics.mean(pair))
            assert record["efficacy_accuracy"] == 0
            found.add(record["efficacy_token_accuracy"])
    assert len(found) > 1


def test_portability_and_multi_hop_questions(tokenizer):
    """Portability is the mean over its prompts, of a first answer each; of multi-hop questions the best one counts."""
    prompts, seen = ("The capital is", "We are", "Nobody"), set()
    for seed in range(12):
        model = tiny.make_model("llama", seed)
        said = _likely(model, tokenizer, prompts[0]).strip() or "q"
        request = EditRequest(
            "{} lies in",
            "Oka",
            "Peru",
            portability=prompts,
            portability_answers=((said, "q"), ("q", said), (said,)),
            multi_hop=prompts,
            multi_hop_answers=(said, "q"),
            multi_hop_true="the",
        )
        got = evaluate(model, tokenizer, [request])
        (record,) = got.per_request
        asked = list(zip(prompts, (said, "q", said), strict=True))
        right = {pair: _plain(model, tokenizer, *pair)[1] for pair in {*asked, *((p, said) for p in prompts)}}
        share = {pair: _share(model, tokenizer, *pair) for pair in right}
        for kind, score in (("accuracy", right), ("token_accuracy", share)):
            assert record[f"portability_{kind}"] == pytest.approx(statistics.mean(score[pair] for pair in asked))
            assert record[f"multi_hop_{kind}"] == pytest.approx(float(max(score[p, said] for p in prompts)))
        better = [_plain(model, tokenizer, p, said)[0] > _plain(model, tokenizer, p, "the")[0] for p in prompts]
        assert record["multi_hop_success"] == any(better) and "portability_success" not in record
        assert got.scores["multi_hop_accuracy"].n == 1 and "portability_success" not in got.scores
        seen.add((record["portability_accuracy"], record["multi_hop_accuracy"]))
    assert len(seen) > 1


def _zsre() -> list[EditRequest]:
    return [
        EditRequest(
            "Which river system contains {}?",
            subject,
            target,
            paraphrases=(f"What river system is {subject} in?",),
            neighborhood=("nq question: how many houses are there?", "nq question: who?")[:count],
            neighborhood_answers=("12", "the old mill")[:count],
            id=subject,
        )
        for subject, target, count in (("Charity Creek", "Parramatta River", 2), ("Oka", "Peru", 1), ("Tarn", "Aa", 0))
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [tiny.make_tokenizer, lambda: tiny.make_tokenizer(bos=True)], ids=["plain", "bos"])
def test_counterfact_and_zsre_with_every_kind_of_tokenizer(make, side):
    """With and without BOS, padded on either side: the scores of one unpadded pass for each prompt and target."""
    tok, model = make(), tiny.make_model("llama")
    tok.padding_side = side
    for requests in (tiny.facts(6), _zsre()):
        asked = [
            (prompt, target)
            for r in requests
            for prompts, targets in (
                ([r.text, *r.paraphrases], [r.target_new, r.target_true]),
                (r.neighborhood[:1], r.neighborhood_answers or [r.target_new, r.target_true]),
            )
            for prompt in prompts
            for target in targets
            if target
        ]
        log_probs, correct = score_targets(model, tok, asked)
        want = [_plain(model, tok, *pair) for pair in asked]
        assert log_probs == pytest.approx([w[0] for w in want], abs=2e-4)
        assert correct == [w[1] for w in want]
        assert all(len(encode(tok, *pair[:1]).ids) == len(tok(pair[0])["input_ids"]) for pair in asked)
        assert (encode(tok, "A").ids[0] == tok.bos_token_id) == (len(tok("A")["input_ids"]) > 1)


def test_neighbours_with_answers_of_their_own(tokenizer):
    """Each is asked for its own answer, in accuracy alone, whether or not there is a true target."""
    prompts, found = ("The capital is", "We are", "Nobody"), 0
    for seed in range(12):
        model = tiny.make_model("llama", seed)
        said = [_likely(model, tokenizer, p) for p in prompts]
        answers = tuple(word.strip() if word.startswith(" ") and word.strip().isalpha() else "q" for word in said)
        for true, own in ((None, answers), ("Paris", answers[1:] + answers[:1])):
            request = EditRequest("{} lies in", "Oka", "Peru", true, (), prompts, neighborhood_answers=own)
            (record,) = evaluate(model, tokenizer, [request]).per_request
            want = [_plain(model, tokenizer, p, a)[1] for p, a in zip(prompts, own, strict=True)]
            assert record["specificity_accuracy"] == statistics.mean(want)
            assert "specificity_success" not in record and ("efficacy_success" in record) == (true is not None)
            found += 0 < sum(want) < 3
    assert found


def test_zsre_has_accuracy_and_token_accuracy_only(tokenizer):
    scores = evaluate(tiny.make_model("gpt2"), tokenizer, _zsre()).scores
    counts = {name: score.n for name, score in scores.items() if score.n}
    scored = (("efficacy", 3), ("generalization", 3), ("specificity", 2))
    assert counts == {f"{name}_{kind}": n for kind in ("accuracy", "token_accuracy") for name, n in scored}


def test_a_subset_is_the_evaluation_of_its_requests(tokenizer):
    model, requests = tiny.make_model("gpt2"), tiny.facts(6)
    whole = evaluate(model, tokenizer, requests)
    for indices in ([0, 2, 5], [4, 0], range(6)):
        alone = evaluate(model, tokenizer, [requests[i] for i in indices])
        part = whole.subset(indices)
        assert part.per_request == alone.per_request and part.to_dict() == alone.to_dict()
    assert whole.subset([0]).scores["efficacy_success"] != whole.scores["efficacy_success"]
    assert whole.subset([]).scores["efficacy_accuracy"].n == 0


def test_rows_of_unlike_length_do_not_share_a_batch(tokenizer, monkeypatch):
    """Little padding, and the same scores."""
    model = tiny.make_model("llama")
    asked = [(letter * n, "b") for letter, n in zip("ABCDEF", (1, 2, 3, 40, 41, 90), strict=True)]
    seen = []
    handle = model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    monkeypatch.setattr(metrics, "keeps_only_keys", lambda _: True)  # asks with a pass of its own
    monkeypatch.setattr(metrics, "_PADDING_PER_BATCH", 8)
    apart = score_targets(model, tokenizer, asked)
    assert [len(ids) for ids in seen] == [3, 2, 1] and all((ids == 0).sum() <= 8 for ids in seen)
    seen.clear()
    monkeypatch.setattr(metrics, "_PADDING_PER_BATCH", 10_000)
    together = score_targets(model, tokenizer, asked)
    handle.remove()
    assert len(seen) == 1 and together[0] == pytest.approx(apart[0], abs=1e-4)


def test_one_request_and_none(tokenizer):
    model = tiny.make_model("llama")
    one = evaluate(model, tokenizer, tiny.facts(1))
    score = one.scores["efficacy_accuracy"]
    assert score.n == 1 and math.isnan(score.stderr) and score.mean in (0.0, 1.0)
    assert one.to_dict()["efficacy_accuracy"] == {"mean": score.mean, "stderr": None, "n": 1}
    none = evaluate(model, tokenizer, [])
    assert none.to_dict()["efficacy_success"] == {"mean": None, "stderr": None, "n": 0}
    for found in (one, none):
        json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("values", [[1.0, 0.0, 0.0, 1.0, 1.0], [0.5, 0.25], [1.0] * 7, [True, False]])
def test_score_of(values):
    score = Score.of(values)
    assert score.mean == pytest.approx(statistics.mean(map(float, values)))
    assert score.stderr == pytest.approx(statistics.stdev(map(float, values)) / math.sqrt(len(values)))
    assert score.n == len(values)


def test_model_is_evaluated_without_dropout_and_left_as_it_was(tokenizer):
    model = tiny.make_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    asked = [(r.text, r.target_new) for r in tiny.facts(3)]
    want = score_targets(model, tokenizer, asked)
    model.train()
    assert score_targets(model, tokenizer, asked) == want
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_perplexity(family, bos, tokenizer, bos_tokenizer, tmp_path):
    tok, model = bos_tokenizer if bos else tokenizer, tiny.make_model(family)
    path = tmp_path / "text.txt"
    path.write_text(_TEXT, encoding="utf-8")
    ids = [i for line in _TEXT.splitlines(keepends=True) for i in tok(line, add_special_tokens=False)["input_ids"]]
    size = 255 if bos else 256
    for limit, windows in ((10**6, math.ceil(len(ids) / size)), (300, 2), (256, 1)):
        total, count = 0.0, 0
        for at in range(0, windows * size, size):
            window = [0] * bos + ids[at : at + size]
            with torch.no_grad():
                loss = model(torch.tensor([window]), labels=torch.tensor([window])).loss
            total, count = total + loss.item() * (len(window) - 1), count + len(window) - 1
        assert perplexity(model, tok, str(path), limit) == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_perplexity_of_a_model_with_few_positions(family, tokenizer, tmp_path, monkeypatch):
    few = {"n_positions": 128} if family == "gpt2" else {"max_position_embeddings": 128}
    model, text = tiny.make_model(family, **few), tmp_path / "text.txt"
    text.write_text(_TEXT, encoding="utf-8")
    got = perplexity(model, tokenizer, str(text), 600)
    monkeypatch.setattr(metrics, "_WINDOW", 100)
    assert perplexity(model, tokenizer, str(text), 600) != got
    monkeypatch.setattr(metrics, "_WINDOW", 128)
    assert perplexity(model, tokenizer, str(text), 600) == got


def _no_memory():
    model = tiny.make_model("llama")
    model.model.layers[3].to("meta")
    return model


def _on_disk(folder):
    """As ``device_map`` with a block on the disk leaves it."""
    model = tiny.make_model("llama")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 2 else "cpu" for i in range(5)}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder / "disk", force_hooks=True)


def _moved_when_called():
    model, _ = accelerate.cpu_offload_with_hook(tiny.make_model("llama"), torch.device("cpu"))
    return model


_CPU, _MODEL = torch.device("cpu"), "model.layers.2.self_attn.q_proj"
_UNUSABLE = {
    "meta": (lambda _: _no_memory(), "model.layers.3.self_attn.q_proj.weight is on the meta device"),
    "on-disk": (_on_disk, f"module {_MODEL} is offloaded; expected every weight in memory"),
    "offloaded": (lambda _: accelerate.cpu_offload(tiny.make_model("llama"), _CPU), "embed_tokens is offloaded"),
    "moved-when-called": (lambda _: _moved_when_called(), "LlamaForCausalLM is offloaded"),
    "data-parallel": (lambda _: torch.nn.DataParallel(tiny.make_model("llama")), "DataParallel has no config"),
    "prompted": (lambda _: tiny.Prompted(tiny.make_model("llama"), cut=False), "Prompted reads more or fewer"),
    "prompted-cut": (lambda _: tiny.Prompted(tiny.make_model("llama"), cut=True), "Prompted reads more or fewer"),
}


@pytest.mark.parametrize("name", _UNUSABLE)
def test_models_that_cannot_be_measured_or_edited(name, tokenizer, config, tmp_path):
    make, message = _UNUSABLE[name]
    model, run = make(tmp_path), tmp_path / "run"
    with pytest.raises(StructureError, match=message):
        evaluate(model, tokenizer, tiny.facts(2))
    with pytest.raises(StructureError, match=message):
        perplexity(model, tokenizer)
    with pytest.raises(StructureError, match=message):
        SphereEditor(model, tokenizer, config, cache=tmp_path).prepare()
    if not name.startswith("prompted"):
        with pytest.raises(StructureError, match=message):
            check_weights_finite(model)
        with pytest.raises(StructureError, match=message):
            experiment.run(model, tokenizer, tiny.facts(2), config, RunOptions("tiny", "facts", run))
        assert not run.exists()


def test_a_block_used_twice_is_measured_as_it_runs(tokenizer):
    """Its keys are twice in one layer of the cache, from which no target can be gone on."""
    model, asked = (
        tiny.make_model("llama"),
        [("The capital of Vanuatu is", "Rome"), ("The mother tongue of Bo", "Welsh")],
    )
    model.model.layers[3] = model.model.layers[1]
    found = score_targets(model, tokenizer, asked)
    for (prompt, target), value, right in zip(asked, *found, strict=True):
        want = _plain(model, tokenizer, prompt, target)
        assert value == pytest.approx(want[0], abs=1e-4) and right == want[1]


def test_perplexity_of_no_text(tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="fewer than two tokens"):
        perplexity(tiny.make_model("llama"), tokenizer, str(tmp_path / "empty.txt"))
    with pytest.raises(FileNotFoundError, match="no such file; expected a path, or one of builtin, heldout"):
        perplexity(tiny.make_model("llama"), tokenizer, "held-out")
