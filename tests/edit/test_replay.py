"""Replaying the upper blocks gives what the whole model gives, in every family."""

from __future__ import annotations

import pytest
import tiny
import torch

from sphere_edit.model.inference import frozen
from sphere_edit.model.partial_forward import record, record_after_prefix
from sphere_edit.model.structure import StructureError, find_structure
from sphere_edit.model.tokens import pad_left

_FIRST, _LAST = 2, 4


def _rows(seed: int = 0, prefixes=(0, 7, 1, 4), tail: int = 3) -> tuple[list[list[int]], list[int]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, tiny.VOCABULARY, (p + tail,), generator=generator).tolist() for p in prefixes]
    return rows, list(prefixes)


def _plain(model, row, split):
    return model(torch.tensor([row]), use_cache=False).logits[0, split:]


@torch.no_grad()
@pytest.mark.parametrize("prefixes", [(0, 7, 1, 4), (5, 5), (0, 0), (6,)], ids=["mixed", "equal", "none", "one-row"])
def test_replay_equals_the_plain_forward(family, prefixes):
    model = tiny.make_model(family)
    structure = find_structure(model)
    rows, split = _rows(prefixes=prefixes)
    replay = record_after_prefix(model, structure, rows, split, _FIRST, _LAST)
    assert replay.hidden.shape == (len(rows), 3, tiny.HIDDEN)
    got = structure.logits(replay.run(replay.hidden))
    again = structure.logits(replay.run(replay.hidden))
    assert torch.equal(got, again)  # a replay leaves the cache as it was
    for i, row in enumerate(rows):
        torch.testing.assert_close(got[i], _plain(model, row, split[i]), atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("keep", [[1, 3], [2], [0, 1, 2, 3], [3, 0]], ids=str)
def test_rows_of_a_replay(family, keep):
    model = tiny.make_model(family)
    structure = find_structure(model)
    rows, split = _rows(1)
    whole = record_after_prefix(model, structure, rows, split, _FIRST, _LAST)
    part = whole.rows(torch.tensor(keep))
    got = structure.logits(part.run(part.hidden))
    for place, i in enumerate(keep):
        torch.testing.assert_close(got[place], _plain(model, rows[i], split[i]), atol=2e-5, rtol=1e-4)
    part_of_part = part.rows(torch.tensor([len(keep) - 1]))
    got = structure.logits(part_of_part.run(part_of_part.hidden))
    torch.testing.assert_close(got[0], _plain(model, rows[keep[-1]], split[keep[-1]]), atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bloom", "falcon-alibi", "mistral-sliding", "gemma2-sliding"])
def test_unusual_attention(name):
    """ALiBi's biases are one tensor of rows × heads; a sliding window is shorter than the prefix."""
    model = tiny.make_model(name)
    try:
        structure = find_structure(model)
    except StructureError:
        return
    rows, split = _rows(5, (9, 0, 7, 8))
    whole = record_after_prefix(model, structure, rows, split, _FIRST, _LAST)
    for keep in ([0, 1, 2, 3], [1, 3], [2]):
        part = whole.rows(torch.tensor(keep))
        got = structure.logits(part.run(part.hidden))
        for place, i in enumerate(keep):
            torch.testing.assert_close(got[place], _plain(model, rows[i], split[i]), atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rows", [3, 4, 5])
def test_a_bias_that_all_rows_share(rows):
    """MPT's ALiBi biases have heads first: with four heads, four rows must not be taken for them."""
    model = tiny.make_model("mpt")
    structure = find_structure(model)
    ids, split = _rows(5, (9, 0, 7, 8, 2)[:rows])
    whole = record_after_prefix(model, structure, ids, split, _FIRST, _LAST)
    assert whole.can_cut == (rows != 4)
    if whole.can_cut:
        part = whole.rows(torch.tensor([2]))
        torch.testing.assert_close(
            structure.logits(part.run(part.hidden))[0], _plain(model, ids[2], split[2]), atol=2e-5, rtol=1e-4
        )


@torch.no_grad()
def test_rows_where_tokens_or_width_equal_the_number_of_rows():
    """Shared tensors whose first dimension happens to be the number of rows must not be cut."""
    model = tiny.make_model("llama")
    structure = find_structure(model)
    for prefixes, tail in (((2, 3), 2), ((1, 2, 0), 3), ((0, 0), 1)):
        rows, split = _rows(2, prefixes, tail)
        part = record_after_prefix(model, structure, rows, split, 1, 4).rows(torch.tensor([1]))
        got = structure.logits(part.run(part.hidden))
        torch.testing.assert_close(got[0], _plain(model, rows[1], split[1]), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_record_from_the_middle(family):
    """Starting above the first recorded block, from that block's own input."""
    model = tiny.make_model(family)
    structure = find_structure(model)
    rows, _ = _rows(3, (4, 4, 4))
    inputs = pad_left(rows, torch.device("cpu"))
    replay = record(model, structure, {**inputs, "use_cache": False}, 1, 4)
    hidden = replay.block(0, replay.hidden)
    torch.testing.assert_close(
        structure.logits(replay.run(hidden, 1)), model(**inputs, use_cache=False).logits, atol=2e-5, rtol=1e-4
    )


def test_recording_stops_and_takes_its_hooks_away():
    model = tiny.make_model("llama")
    structure = find_structure(model)
    ran = []
    above = structure.blocks[3].register_forward_hook(lambda *_: ran.append(3))
    record(model, structure, {"input_ids": torch.tensor([[5, 6, 7]]), "use_cache": False}, 1, 2)
    above.remove()
    assert not ran
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in structure.blocks)
    with pytest.raises(IndexError):
        record(model, structure, {"input_ids": torch.tensor([[10**6]]), "use_cache": False}, 1, 2)
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in structure.blocks)


def test_gradient_flows_through_a_replay(family):
    """The gradient at the first replayed token equals the whole model's."""
    model = tiny.make_model(family)
    structure = find_structure(model)
    rows, split = _rows(4, (3, 5))
    with frozen(model):
        replay = record_after_prefix(model, structure, rows, split, _FIRST, _LAST)
        hidden = replay.hidden.clone().requires_grad_()
        structure.logits(replay.run(hidden))[:, -1, 7].sum().backward()
        for i, row in enumerate(rows):
            shift = torch.zeros(tiny.HIDDEN, requires_grad=True)

            def add(_, __, out, at=split[i], shift=shift):
                first = out[0] if isinstance(out, tuple) else out
                first = torch.cat([first[:, :at], first[:, at : at + 1] + shift, first[:, at + 1 :]], 1)
                return (first, *out[1:]) if isinstance(out, tuple) else first

            handle = structure.blocks[_FIRST - 1].register_forward_hook(add)
            model(torch.tensor([row]), use_cache=False).logits[0, -1, 7].backward()
            handle.remove()
            torch.testing.assert_close(hidden.grad[i, 0], shift.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_frozen_restores_everything(error):
    model = tiny.make_model("llama")
    model.train()
    model.model.layers[1].eval()
    model.model.layers[2].mlp.down_proj.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    try:
        with frozen(model):
            assert not any(m.training for m in model.modules())
            assert not any(p.requires_grad for p in model.parameters())
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert [m.training for m in model.modules()] == modes and True in modes and False in modes
    assert [p.requires_grad for p in model.parameters()] == wants and True in wants and False in wants
