"""Free text and its scores, against the published formulas written out, and scikit-learn's TF-IDF by hand."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import tiny
import torch
from typer.testing import CliRunner

from sphere_edit.cli.app import app
from sphere_edit.data import DataError, load_requests
from sphere_edit.data.requests import EditRequest
from sphere_edit.evaluation import texts
from sphere_edit.evaluation.texts import (
    fit_tfidf,
    generate_texts,
    n_gram_entropy,
    read_references,
    reference_texts,
    score_texts,
)
from sphere_edit.model.generation import complete
from sphere_edit.targets import contexts
from sphere_edit.targets.contexts import generate_contexts


def _request(subject, new, true, relation="r", **more):
    return EditRequest("{} is in", subject, new, true, relation=relation, id=subject, **more)


def _entropy(items) -> float:
    counts = Counter(items)
    return -sum(c / len(items) * math.log2(c / len(items)) for c in counts.values())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a b c d", ["a", "b", "c", "d"]),
        ("a b a b a b c", ["a", "b", "a", "b", "a", "b", "c"]),
        ("Paris, Paris!\nÅre", ["Paris", ",", "Paris", "!", "Åre"]),
        ("x x x x x", ["x"] * 5),
    ],
)
def test_entropy_of_pairs_and_triples(text, words):
    pairs, triples = list(zip(words, words[1:])), list(zip(words, words[1:], words[2:]))  # noqa: B905
    want = 100 * (2 / 3 * _entropy(pairs) + 4 / 3 * _entropy(triples)) / 2
    assert n_gram_entropy(text) == pytest.approx(want)


def test_entropy_by_hand_and_of_too_few_words():
    assert n_gram_entropy("a b c d e") == pytest.approx(100 * (2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)
    assert n_gram_entropy("no no no no") == n_gram_entropy("word") == n_gram_entropy("") == 0


def test_fluency_is_a_mean_over_requests():
    requests = [_request("A", "x", "y"), _request("B", "x", "y")]
    texts = [["a b c", "a b c d e"], ["no no no"]]
    found = score_texts(requests, texts, {})
    first = (n_gram_entropy("a b c") + n_gram_entropy("a b c d e")) / 2
    assert [r["fluency"] for r in found.per_request] == [pytest.approx(first), 0]
    assert found.scores["fluency"].mean == pytest.approx(first / 2) and found.scores["fluency"].n == 2
    assert found.scores["consistency"].n == 0 and found.to_dict()["consistency"]["mean"] is None
    assert found.subset([0]).scores["fluency"].mean == pytest.approx(first)


def test_consistency_is_the_cosine_of_tf_idf():
    """One word of two is shared; its document frequency is that of the fitted texts."""
    requests = [_request("A", "Rome", "Oslo"), _request("B", "Bonn", "Oslo"), _request("C", "Rome", "Oslo", "other")]
    references = {("r", "Rome"): ["pizza", "pasta"], (None, "Bonn"): ["Rhine"], ("r", "Oslo"): ["fjord pasta"]}
    found = score_texts(requests, [["Pizza here"], ["nothing"], ["pizza"]], references)

    def idf(documents):  # of four, as scikit-learn smooths it
        return math.log(5 / (1 + documents)) + 1

    pizza, pasta = idf(1), idf(2)
    want = 100 * pizza / math.hypot(pizza, pasta)
    assert found.per_request[0]["consistency"] == pytest.approx(want)
    assert found.per_request[1]["consistency"] == 0  # no word of the texts fitted on
    assert "consistency" not in found.per_request[2] and found.scores["consistency"].n == 2
    tfidf = fit_tfidf(requests[:1], references, ["pizza", "pizza pasta", "none"])
    fitted = score_texts(requests[:1], [["Pizza here"]], references, tfidf)
    pizza, pasta = math.log(4 / 3) + 1, math.log(4 / 2) + 1
    assert fitted.per_request[0]["consistency"] == pytest.approx(100 * pizza / math.hypot(pizza, pasta))


def test_references_are_the_true_facts_of_other_records():
    requests = [
        _request("A", "Rome", "Oslo", neighborhood=("D is in", "E is in")),
        _request("B", "Oslo", "Rome", neighborhood=("F is in\n",)),
        _request("C", "Oslo", "Rome", "other"),
        _request("G", "Oslo", None),
        _request("H", "Oslo", "Rome", neighborhood=("Who?",), neighborhood_answers=("Nobody",)),
        _request("I", "Oslo", "Rome", None),
    ]
    assert reference_texts(requests) == {
        ("r", "Oslo"): ["A is in Oslo", "D is in Oslo", "E is in Oslo"],
        ("r", "Rome"): ["B is in Rome", "F is in\nRome", "H is in Rome"],
        ("other", "Rome"): ["C is in Rome"],
    }
    texts = [["A is in Rome"] for _ in requests]
    assert "consistency" in score_texts(requests, texts, reference_texts(requests)).per_request[0]


def test_references_from_a_file(tmp_path):
    path = tmp_path / "texts.jsonl"
    records = [{"target": "Rome", "text": "a"}, {"target": "Rome", "text": "b", "relation": "r"}]
    path.write_text("".join(json.dumps(r) + "\n" for r in [*records, {"target": "Rome", "text": "c"}]))
    assert read_references(path) == {(None, "Rome"): ["a", "c"], ("r", "Rome"): ["b"]}
    path.write_text(json.dumps(records[0]) + '\n{"target": "Rome"}\n')
    with pytest.raises(DataError, match="line 2: field 'text' is missing"):
        read_references(path)
    path.write_text(json.dumps({"target": " Rome ", "text": " a"}) + "\n")
    assert read_references(path) == {(None, "Rome"): [" a"]}
    path.write_text(json.dumps({**records[0], "relations": "r"}) + "\n")
    with pytest.raises(DataError, match="line 1: unknown field 'relations'; known fields are target, text, relation"):
        read_references(path)


def test_tfidf_of_no_words():
    requests, references = [_request("A", "Rome", "Oslo")], {("r", "Rome"): ["", "a ?"]}
    assert fit_tfidf(requests, {("other", "Rome"): ["..."]}) is None
    for call in (lambda: fit_tfidf(requests, references), lambda: score_texts(requests, [["text"]], references)):
        with pytest.raises(ValueError, match="^the references: expected text with words"):
            call()
    with pytest.raises(ValueError, match="^text of mine: expected text with words"):
        fit_tfidf(requests, {("r", "Rome"): ["pizza"]}, ["\n"], "text of mine")


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
def test_texts_begin_with_their_prompts_and_have_one_length(bos, tokenizer, bos_tokenizer):
    tok, model = bos_tokenizer if bos else tokenizer, tiny.make_model("llama")
    requests = [_request("Rome", "Peru", "Italy", generation=("The city of Rome", "Rome")), _request("Oka", "a", None)]
    model.train()
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    calls = []
    texts = generate_texts(model, tok, requests, seed=1, length=24, progress=lambda *at: calls.append(at))
    assert torch.equal(torch.random.get_rng_state(), state) and model.training and calls == [(3, 3)]
    assert [len(own) for own in texts] == [2, 1]
    for text, prompt in zip([t for own in texts for t in own], ("The city of Rome", "Rome", "Oka is in"), strict=True):
        assert text.startswith(prompt) and len(text) > len(prompt) + 10
    torch.manual_seed(9)
    assert generate_texts(model, tok, requests, seed=1, length=24) == texts
    assert generate_texts(model, tok, requests, seed=2, length=24) != texts
    assert generate_texts(model, tok, [], seed=2) == []


def test_each_token_is_one_of_the_five_likeliest_and_none_ends_the_text(tokenizer, monkeypatch):
    """Rows of a batch begin in different columns, and end after as many tokens."""
    model = tiny.make_model("llama")
    rows = []

    class Keeping:
        is_fast, eos_token_id = True, tokenizer.eos_token_id

        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

        def decode(self, ids, **_):
            rows.append(ids.tolist())
            return "text"

    monkeypatch.setattr(texts, "_ROWS_PER_BATCH", 2)
    requests = [_request(s, "Peru", None) for s in ("Oka", "The mouth of the river Tarn", "The city of Rome")]
    generate_texts(model, Keeping(), requests, length=30)
    for ids, request in zip(rows, requests, strict=True):
        prompt = tokenizer(request.text)["input_ids"]
        assert ids[: len(prompt)] == prompt and len(ids) == 30 and tokenizer.eos_token_id not in ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        logits[:, tokenizer.eos_token_id] = -math.inf
        for at in range(len(prompt), 30):
            assert logits[at - 1, ids[at]] > logits[at - 1].topk(5).values[-1] - 1e-4
        likeliest = [logits[at - 1].argmax() == ids[at] for at in range(len(prompt), 30)]
        assert 0 < sum(likeliest) < len(likeliest)


_OWN = {
    "min_p": 0.9,
    "typical_p": 0.1,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(2, 150)),
    "epsilon_cutoff": 0.9,
    "guidance_scale": 3.0,
    "forced_eos_token_id": 5,
    "repetition_penalty": 5.0,
    "num_beams": 3,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "penalty_alpha": 0.6,
    "stop_strings": ["a", "e"],
}


@pytest.mark.parametrize("name", _OWN)
def test_a_models_own_settings_of_generation_do_not_count(name, tokenizer):
    def said(model):
        texts = generate_texts(model, tokenizer, tiny.facts(2), length=24)
        contexts = generate_contexts(model, tokenizer, 2, 6, 0)
        return texts, contexts, complete(model, tokenizer, ["The capital of Spain is", "A"], 12)

    model = tiny.make_model("llama")
    want, own = said(model), model.generation_config
    setattr(own, name, _OWN[name])
    assert said(model) == want
    assert model.generation_config is own and getattr(own, name) == _OWN[name]


@pytest.mark.parametrize("bos", [False, True])
def test_prefixes_begin_after_a_token_that_is_no_word(bos, tokenizer, bos_tokenizer, monkeypatch):
    """After BOS where the tokenizer has it, else after a newline, which is not in the prefix."""
    model, tok = tiny.make_model("llama"), bos_tokenizer if bos else tokenizer
    rows, original = [], contexts.continue_rows

    def spy(model, tokenizer, given, *args, **sampling):
        rows.extend(given)
        return original(model, tokenizer, given, *args, **sampling)

    monkeypatch.setattr(contexts, "continue_rows", spy)
    templates = generate_contexts(model, tok, 3, 4, 0)
    openings = ["The", "Therefore", "Because"]
    assert [list(row) for row in rows] == [tok(text if bos else f"\n{text}")["input_ids"] for text in openings]
    assert templates[0] == "{}" and all(t.endswith(". {}") for t in templates[1:])
    assert all(t.startswith(text) for t, text in zip(templates[1:], openings, strict=True))


def test_a_models_own_settings_are_put_back_after_a_failure(tokenizer, monkeypatch):
    model = tiny.make_model("llama")
    own = model.generation_config
    monkeypatch.setattr(model, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        complete(model, tokenizer, ["A"], 2)
    assert model.generation_config is own


def test_a_model_without_settings_of_generation(tokenizer):
    model = tiny.make_model("llama")
    want = complete(model, tokenizer, ["The river"], 5), generate_contexts(model, tokenizer, 2, 4, 0)
    model.generation_config = None
    assert (complete(model, tokenizer, ["The river"], 5), generate_contexts(model, tokenizer, 2, 4, 0)) == want
    assert model.generation_config is None


def test_positions_are_needed_of_each_batch(tokenizer, monkeypatch):
    """The longest prompt of a batch, and what the shortest lacks; prompts of other batches do not count."""
    short, long = _request("Oka", "Peru", None), _request("The mouth of the river Tarn by the sea", "Peru", None)
    lengths = [len(tokenizer(r.text)["input_ids"]) for r in (short, long)]
    length = lengths[1] + 3
    model = tiny.make_model("llama", max_position_embeddings=length)
    monkeypatch.setattr(texts, "_ROWS_PER_BATCH", 1)
    assert len(generate_texts(model, tokenizer, [short, long], length=length)) == 2
    monkeypatch.setattr(texts, "_ROWS_PER_BATCH", 2)
    needed = lengths[1] + length - lengths[0]
    with pytest.raises(ValueError, match=f"{long.subject[:20]}.* takes {needed} tokens .* has {length} positions"):
        generate_texts(model, tokenizer, [short, long], length=length)


def test_prompts_that_leave_no_room(tokenizer):
    model = tiny.make_model("llama", max_position_embeddings=40)
    with pytest.raises(ValueError, match="of a text of length 2"):
        generate_texts(model, tokenizer, tiny.facts(1), length=2)
    with pytest.raises(ValueError, match="the model has 40 positions"):
        generate_texts(model, tokenizer, tiny.facts(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """``model``, ``facts.jsonl`` and ``texts.jsonl``."""
    base = tmp_path_factory.mktemp("generate")
    tiny.make_model("llama").save_pretrained(base / "model")
    tokenizer.save_pretrained(base / "model")
    requests = [_request("Oka", "Peru", "Japan"), _request("Tarn", "Chad", "Peru"), _request("Ob", "Chad", "Peru")]
    (base / "facts.jsonl").write_text("".join(json.dumps(vars(r)) + "\n" for r in requests))
    (base / "texts.jsonl").write_text(json.dumps({"target": "Chad", "text": "Chad is hot"}) + "\n")
    return base


def _evaluate(folder, *args):
    to = folder / "found.json"
    call = ("evaluate", folder / "model", "-d", folder / "facts.jsonl", "--json", to, *args)
    result = CliRunner().invoke(app, [str(a) for a in call])
    return result, json.loads(to.read_text()) if result.exit_code == 0 else None


def test_the_command_writes_scores_and_texts(folder, tokenizer):
    result, got = _evaluate(folder, "--generate", 2, "--limit", 2)
    assert result.exit_code == 0, result.output
    assert "fluency" in result.stdout and "consistency" in result.stdout
    assert list(got["texts"]) == ["Oka", "Tarn"] and all(len(own) == 1 for own in got["texts"].values())
    requests = load_requests(folder / "facts.jsonl")
    texts = list(got["texts"].values())
    assert texts == generate_texts(tiny.make_model("llama"), tokenizer, requests[:2])
    want = score_texts(requests[:2], texts, reference_texts(requests)).to_dict()
    assert {name: got["scores"][name] for name in want} == want
    assert (want["fluency"]["n"], want["consistency"]["n"]) == (2, 1)  # Peru is the truth of others, Chad of none
    _, own = _evaluate(folder, "--generate", 2, "--references", folder / "texts.jsonl", "--tfidf-text", "heldout")
    assert own["scores"]["consistency"]["n"] == 1 and own["texts"] == got["texts"]
    _, without = _evaluate(folder, "--limit", 2)
    assert "texts" not in without and "fluency" not in without["scores"]


@pytest.mark.parametrize("option", ["--references", "--tfidf-text"])
def test_options_of_what_is_not_asked_for(folder, option):
    result, _ = _evaluate(folder, option, folder / "texts.jsonl")
    assert result.exit_code == 2 and f"{option} " in result.stderr and "expected --generate" in result.stderr


@pytest.mark.parametrize(
    ("option", "text"), [("--references", '{"target": "Peru", "text": "?"}'), ("--tfidf-text", "?")]
)
def test_a_source_without_words_is_refused_before_the_model_is_loaded(folder, option, text, tmp_path, monkeypatch):
    path = tmp_path / "wordless"
    path.write_text(text + "\n")
    monkeypatch.setattr("sphere_edit.cli.app.load_by_name", lambda *_: pytest.fail("the model was loaded"))
    result, _ = _evaluate(folder, "--generate", 2, option, path)
    assert result.exit_code == 2 and "wordless: expected text with words" in " ".join(result.stderr.split())
