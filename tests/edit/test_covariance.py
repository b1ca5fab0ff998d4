"""The covariance of the keys: the right figure, and a cache that is used when it fits and only then."""

from __future__ import annotations

import gzip

import pytest
import tiny
import torch
from safetensors import safe_open

from sphere_edit.config import EditConfig
from sphere_edit.methods import covariance as module
from sphere_edit.methods.covariance import key_covariances, layer_fingerprints
from sphere_edit.model.structure import find_structure

_TEXT = "Anna went home. The river flows past the old mill, and nobody saw it.\n\nIt rained — for days.\n" * 20
_TOKENS = 600


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(_TEXT, encoding="utf-8")
    return path


@pytest.fixture
def measured(monkeypatch):
    """Layers of every measurement."""
    calls, original = [], module._measure

    def measure(model, tokenizer, structure, layers, *rest):
        calls.append(tuple(layers))
        return original(model, tokenizer, structure, layers, *rest)

    monkeypatch.setattr(module, "_measure", measure)
    return calls


def _get(model, tokenizer, cache, text, layers=(1, 2), tokens=_TOKENS, **kwargs):
    config = EditConfig(covariance_text=str(text), covariance_tokens=tokens)
    return key_covariances(model, tokenizer, find_structure(model), layers, config, cache, **kwargs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon"])
@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
def test_equals_a_direct_sum(family, bos, tokenizer, bos_tokenizer, text, tmp_path):
    """Windows of 256 tokens, with BOS at the head of each where the tokenizer adds it."""
    model = tiny.make_model(family)
    structure, tok = find_structure(model), bos_tokenizer if bos else tokenizer
    got = _get(model, tok, tmp_path / "c", text, (1, 3))
    ids = [i for line in _TEXT.splitlines(keepends=True) for i in tok(line, add_special_tokens=False)["input_ids"]]
    size = 255 if bos else 256
    windows = [[0] * bos + ids[at : at + size] for at in range(0, len(ids), size)][:3]
    assert sum(map(len, windows)) == 768 >= _TOKENS
    for layer in (1, 3):
        total, count = 0, 0
        for window in windows:
            seen = []
            handle = structure.down[layer].module.register_forward_pre_hook(lambda _, a, s=seen: s.append(a[0]))
            with torch.no_grad():
                model(torch.tensor([window]), use_cache=False)
            handle.remove()
            keys = seen[0].view(len(window), -1).double()
            total, count = total + keys.T @ keys, count + len(window)
        assert got[layer].dtype == torch.float64
        torch.testing.assert_close(got[layer], total / count, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_windows_are_within_the_models_positions(family, tokenizer, text, tmp_path, monkeypatch):
    """128 positions learned, and the figure that windows of 128 tokens give a model that has more."""
    few = {"n_positions": 128} if family == "gpt2" else {"max_position_embeddings": 128}
    got = _get(tiny.make_model(family, **few), tokenizer, tmp_path / "few", text)
    monkeypatch.setattr(module, "_WINDOW", 128)
    many = tiny.make_model(family)
    for name, value in tiny.make_model(family, **few).state_dict().items():
        many.state_dict()[name][: len(value)].copy_(value)
    want = _get(many, tokenizer, tmp_path / "many", text)
    for layer in got:
        torch.testing.assert_close(got[layer], want[layer])


def test_short_text_in_full(tokenizer, tmp_path):
    """A text below one window, compressed; progress ends with its tokens."""
    path = tmp_path / "short.txt.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("Only a few words.")
    seen = []
    model = tiny.make_model("llama")
    _get(model, tokenizer, tmp_path / "c", path, progress=lambda done, total: seen.append((done, total)))
    count = len(tokenizer("Only a few words.")["input_ids"])
    assert seen == [(count, _TOKENS), (count, count)]


@pytest.mark.parametrize("content", ["", "\n"])
def test_empty_text(tokenizer, tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match="has no text; expected at least two tokens"):
        _get(tiny.make_model("llama"), tokenizer, tmp_path / "c", path)
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").iterdir())


def test_cache_is_used(tokenizer, text, tmp_path, measured):
    model = tiny.make_model("llama")
    first = _get(model, tokenizer, tmp_path / "c", text)
    model.config.name_or_path = "under another name"
    second = _get(tiny.make_model("llama"), tokenizer, tmp_path / "c", text)
    assert measured == [(1, 2)]
    assert all(torch.equal(first[i], second[i]) for i in (1, 2))
    _get(model, tokenizer, tmp_path / "c", text, layers=(2, 3))
    assert measured == [(1, 2), (3,)]  # only what is missing
    assert len(list((tmp_path / "c").iterdir())) == 3


def test_weights_above_the_layer_do_not_matter(tokenizer, text, tmp_path, measured):
    model = tiny.make_model("llama")
    _get(model, tokenizer, tmp_path / "c", text)
    model.model.layers[3].mlp.down_proj.weight.data.mul_(2)
    _get(model, tokenizer, tmp_path / "c", text)
    assert measured == [(1, 2)]


def _other_weight(name):
    def change(model):
        model.get_parameter(name).data.view(-1)[3] += 1e-3

    return change


@pytest.mark.parametrize(
    "change",
    [
        _other_weight("model.layers.0.mlp.up_proj.weight"),
        _other_weight("model.layers.1.input_layernorm.weight"),
        _other_weight("model.embed_tokens.weight"),
        lambda model: model.to(torch.bfloat16),
        lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
    ],
    ids=["below", "layer", "embedding", "dtype", "config"],
)
def test_another_model_misses(change, tokenizer, text, tmp_path, measured):
    model = tiny.make_model("llama")
    _get(model, tokenizer, tmp_path / "c", text)
    change(model)
    _get(model, tokenizer, tmp_path / "c", text)
    assert measured == [(1, 2), (1, 2)]


def test_another_text_or_token_count_misses(tokenizer, text, tmp_path, measured):
    model = tiny.make_model("llama")
    first = _get(model, tokenizer, tmp_path / "c", text)
    fewer = _get(model, tokenizer, tmp_path / "c", text, tokens=200)
    text.write_text(_TEXT + "!", encoding="utf-8")
    _get(model, tokenizer, tmp_path / "c", text)
    assert measured == [(1, 2)] * 3
    assert not torch.equal(first[1], fewer[1])


def test_another_tokenizer_misses(tokenizer, bos_tokenizer, text, tmp_path, measured):
    """The keys are those of the tokens, so the same text cut otherwise is another covariance."""
    model = tiny.make_model("llama")
    _get(model, tokenizer, tmp_path / "c", text)
    _get(model, bos_tokenizer, tmp_path / "c", text)
    assert measured == [(1, 2)] * 2


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "nan", "swapped"])
def test_damaged_file_is_measured_anew(damage, tokenizer, text, tmp_path, measured):
    model, cache = tiny.make_model("llama"), tmp_path / "c"
    want = _get(model, tokenizer, cache, text)
    a, b = sorted(cache.iterdir())
    blob = a.read_bytes()
    if damage == "cut":
        a.write_bytes(blob[:-9])
    elif damage == "empty":
        a.write_bytes(b"")
    elif damage == "garbage":
        a.write_bytes(b"\xff" * 100)
    elif damage == "nan":
        a.write_bytes(blob[:-8] + b"\xff" * 8)
    else:
        a.write_bytes(b.read_bytes())  # another layer's file under this name
    got = _get(model, tokenizer, cache, text)
    assert len(measured) == 2 and len(measured[1]) == 1
    assert all(torch.equal(got[i], want[i]) for i in want)
    with safe_open(a, "pt") as file:
        assert torch.isfinite(file.get_tensor("moment")).all()
    _get(model, tokenizer, cache, text)
    assert len(measured) == 2


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_killed_write_leaves_nothing(error, tokenizer, text, tmp_path, monkeypatch):
    model, cache = tiny.make_model("llama"), tmp_path / "c"

    def torn(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", torn)
        with pytest.raises(error):
            _get(model, tokenizer, cache, text)
    assert list(cache.iterdir()) == []
    _get(model, tokenizer, cache, text)
    assert len(list(cache.iterdir())) == 2


def test_measuring_leaves_the_model_as_it_was(tokenizer, text, tmp_path):
    model = tiny.make_model("llama")
    model.train()
    before = tiny.state(model)
    _get(model, tokenizer, tmp_path / "c", text)
    assert model.training and all(p.requires_grad for p in model.parameters()) and tiny.same(model, before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_fingerprints_grow_with_the_layer():
    model = tiny.make_model("llama")
    prints = layer_fingerprints(model, find_structure(model), (0, 2, 3))
    assert sorted(prints) == [0, 2, 3] and len(set(prints.values())) == 3
    assert prints[2] == layer_fingerprints(model, find_structure(model), (2,))[2]


def test_another_map_of_the_block_misses(tokenizer, text, tmp_path, measured):
    """The inputs of ``up`` are of another width than those of ``down``."""
    model, config = tiny.make_model("llama"), EditConfig(covariance_text=str(text), covariance_tokens=_TOKENS)
    widths = []
    for modules in ("down", "up", "down"):
        got = key_covariances(model, tokenizer, find_structure(model, modules), (1, 2), config, tmp_path / "c")
        widths.append(len(got[1]))
    assert widths == [80, tiny.HIDDEN, 80] and measured == [(1, 2), (1, 2)]


def test_eigenvectors_are_computed_once_and_kept(tokenizer, text, tmp_path, monkeypatch):
    model, calls, eigh = tiny.make_model("llama"), [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(len(matrix)) or eigh(matrix))

    def seen():
        return _get(model, tokenizer, tmp_path / "c", text).eigh(1)

    first = seen()
    assert calls == [80] and all(torch.equal(a, b) for a, b in zip(first, seen(), strict=True)) and calls == [80]
    assert all(
        torch.equal(a, b) for a, b in zip(first, eigh(_get(model, tokenizer, tmp_path / "c", text)[1]), strict=True)
    )
    (kept,) = (tmp_path / "c").glob("*.eigh.safetensors")
    kept.write_bytes(kept.read_bytes()[:-8])
    assert all(torch.equal(a, b) for a, b in zip(first, seen(), strict=True)) and calls == [80, 80]
    _get(model, tokenizer, tmp_path / "c", text, tokens=200)  # other keys, other eigenvectors
    assert not torch.equal(_get(model, tokenizer, tmp_path / "c", text, tokens=200).eigh(1)[0], first[0])


def test_eigenvectors_that_cannot_be_kept_are_used(tokenizer, text, tmp_path):
    """As in a folder that may only be read, where the covariance itself has been all along."""
    found = _get(tiny.make_model("llama"), tokenizer, tmp_path / "c", text)
    path = next(path for path in (tmp_path / "c").iterdir() if "-layer1-" in path.name)
    path.with_suffix(".eigh.safetensors").mkdir()
    with pytest.warns(UserWarning, match="eigenvectors are not kept, each start computes them: .*Is a directory"):
        values, vectors = found.eigh(1)
    torch.testing.assert_close(vectors * values @ vectors.T, found[1])
