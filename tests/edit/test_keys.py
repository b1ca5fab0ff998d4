"""Keys, values and key moments against direct forward passes."""

from __future__ import annotations

import plain
import pytest
import tiny
import torch

from sphere_edit.methods.covariance import KeyMoments
from sphere_edit.model.structure import find_structure
from sphere_edit.targets import keys as keys_module
from sphere_edit.targets.contexts import generate_contexts
from sphere_edit.targets.keys import LayerPass

_CONTEXTS = ["{}", "A longer sentence stands before it. {}", "So. {}"]
_LAYERS = (1, 2, 3)


def _expected(model, tokenizer, structure, requests, contexts, layer):
    return plain.keys_and_values(model, tokenizer, structure, requests, contexts, layer, _LAYERS[-1])


@pytest.mark.parametrize("contexts", [1, 2, 3])
@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
def test_equal_direct_passes_under_edited_weights(family, contexts, bos, tokenizer, bos_tokenizer):
    model = tiny.make_model(family)
    tok = bos_tokenizer if bos else tokenizer
    structure, requests, contexts = find_structure(model), tiny.facts(4), _CONTEXTS[:contexts]
    walk = LayerPass(model, tok, structure, requests, contexts, _LAYERS)
    for layer in _LAYERS:
        walk.advance(layer)
        assert walk.layer == layer
        want_keys, want_values = _expected(model, tok, structure, requests, contexts, layer)
        torch.testing.assert_close(walk.keys(), want_keys, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(walk.values(), want_values, atol=2e-5, rtol=1e-4)
        bare, _ = _expected(model, tok, structure, requests, contexts[:1], layer)
        bias = getattr(structure.down[layer].module, "bias", None)
        outputs = bare @ structure.down[layer].weight.T + (0 if bias is None else bias)
        torch.testing.assert_close(walk.outputs(), outputs, atol=2e-5, rtol=1e-4)
        generator = torch.Generator().manual_seed(layer)
        weight = structure.down[layer].weight
        weight += 0.3 * torch.randn(weight.shape, generator=generator)  # an edit, which the layers above must see
        _, moved = _expected(model, tok, structure, requests, contexts[:1], layer)
        assert (moved - want_values).abs().max() > 0.05
        torch.testing.assert_close(walk.values(), moved, atol=2e-5, rtol=1e-4)


def test_layers_need_not_be_neighbours(tokenizer):
    model = tiny.make_model("llama")
    structure, requests = find_structure(model), tiny.facts(3)
    walk = LayerPass(model, tokenizer, structure, requests, _CONTEXTS, (0, 3))
    structure.down[0].weight.mul_(1.5)
    walk.advance(3)
    want, _ = _expected(model, tokenizer, structure, requests, _CONTEXTS, 3)
    torch.testing.assert_close(walk.keys(), want, atol=2e-5, rtol=1e-4)


def test_passes_may_be_cut_anywhere(tokenizer, monkeypatch):
    model = tiny.make_model("gpt2")
    structure, requests = find_structure(model), tiny.facts(5)
    monkeypatch.setattr(keys_module, "_TOKENS_PER_PASS", 1)
    walk = LayerPass(model, tokenizer, structure, requests, _CONTEXTS, _LAYERS)
    for layer in _LAYERS:
        walk.advance(layer)
        want, _ = _expected(model, tokenizer, structure, requests, _CONTEXTS, layer)
        torch.testing.assert_close(walk.keys(), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gptj", "falcon"])
def test_a_layers_keys_do_not_see_it_nor_those_above(family, tokenizer):
    """So the keys that a layer was solved with are also those of the history, measured after all layers are written.

    GPT-J's and Falcon's attention and MLP run side by side; it holds there too.
    """
    model = tiny.make_model(family)
    structure, requests = find_structure(model), tiny.facts(4)
    walk = LayerPass(model, tokenizer, structure, requests, _CONTEXTS, _LAYERS)
    solved = {}
    for layer in _LAYERS:
        walk.advance(layer)
        solved[layer] = walk.keys()
        structure.down[layer].weight.mul_(1.7)
        assert torch.equal(walk.keys(), solved[layer])
    again = LayerPass(model, tokenizer, structure, requests, _CONTEXTS, _LAYERS)
    for layer in _LAYERS:
        again.advance(layer)
        torch.testing.assert_close(again.keys(), solved[layer], atol=1e-6, rtol=1e-6)


def test_no_hooks_stay(tokenizer):
    model = tiny.make_model("llama")
    structure = find_structure(model)
    walk = LayerPass(model, tokenizer, structure, tiny.facts(2), _CONTEXTS, _LAYERS)
    walk.keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_moments_are_direct_sums(family):
    model = tiny.make_model(family)
    structure = find_structure(model)
    moments = KeyMoments(structure, (0, 2))
    want = {layer: 0 for layer in (0, 2)}
    batches = [torch.arange(4, 24).view(2, 10), torch.arange(90, 101).view(1, 11)]
    for ids in batches:
        moments.add(model, ids)
        for row in ids:
            for layer in want:
                seen = []
                handle = structure.down[layer].module.register_forward_pre_hook(lambda _, a, s=seen: s.append(a[0]))
                with torch.no_grad():
                    model(row[None], use_cache=False)
                handle.remove()
                k = seen[0].view(len(row), -1).double()
                want[layer] = want[layer] + k.T @ k
    assert moments.tokens == 31
    for layer, total in want.items():
        assert moments.sums[layer].dtype == torch.float64
        torch.testing.assert_close(moments.sums[layer], total, atol=1e-4, rtol=1e-4)


def test_contexts_are_sampled_with_their_own_seed(tokenizer):
    model = tiny.make_model("llama")
    assert generate_contexts(model, tokenizer, 0, 5, 0) == ["{}"]
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = generate_contexts(model, tokenizer, 6, 5, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    assert generate_contexts(model, tokenizer, 6, 5, seed=1) == first
    assert generate_contexts(model, tokenizer, 6, 5, seed=2) != first
    assert first[0] == "{}" and len(first) == 7
    for template, opening in zip(first[1:], ("The", "Therefore", "Because", "I", "You", "The"), strict=True):
        assert template.startswith(opening) and template.endswith(". {}")
        assert template.count("{") == template.count("}") == 1


def test_contexts_with_a_tokenizer_that_appends_end_of_text():
    """The opening is continued, so no end-of-text token may stand between it and what is sampled."""
    model, closing, plain_one = tiny.make_model("llama"), tiny.make_tokenizer(eos=True), tiny.make_tokenizer()
    assert generate_contexts(model, closing, 3, 5, 0) == generate_contexts(model, plain_one, 3, 5, 0)
