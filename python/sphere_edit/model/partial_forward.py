"""Run a range of decoder blocks repeatedly, with the arguments recorded from a real forward pass.

An edit acts at one token of one layer. While a value is optimised, the blocks below that layer and the tokens before
the subject's last one give the same results; the blocks above can be run alone. Masks, positions and rotary tables are
the model's own: one real forward pass records them, and no model family is imitated here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sphere_edit.model.structure import ModelStructure, StructureError
from sphere_edit.model.tokens import pad_left

# Other cache layers may hold states besides keys and values; cutting by rows would miss these states.
_OF_KEYS = (DynamicLayer, DynamicSlidingWindowLayer)


class PrefixCache(DynamicCache):
    """Keys and values of the tokens before the subject's last. Once frozen, later tokens see them but are not added."""

    frozen = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if not self.frozen:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx >= len(self.layers):
            return key_states, value_states
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], -2), torch.cat([layer.values, value_states], -2)

    def rows(self, keep: Tensor) -> PrefixCache:
        """The cache of some rows only."""
        out = PrefixCache()
        for i, layer in enumerate(self.layers):
            out.update(layer.keys[keep], layer.values[keep], i)
        out.frozen = self.frozen
        return out


class _Stop(Exception):
    """Ends a forward pass early."""


@dataclass
class Replay:
    """Blocks ``first … last`` of a model, ready to be run on ``hidden`` ``[rows, tokens, hidden]``.

    ``hidden`` is the input of block ``first``; ``calls[i]`` are the other arguments of block ``first + i``. The tokens
    of interest begin at ``column`` in every row.
    """

    blocks: Sequence[nn.Module]
    heads: int
    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    column: int = 0

    def block(self, i: int, hidden: Tensor) -> Tensor:
        args, kwargs = self.calls[i]
        out = self.blocks[i](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def run(self, hidden: Tensor, start: int = 0) -> Tensor:
        for i in range(start, len(self.blocks)):
            hidden = self.block(i, hidden)
        return hidden

    def rows(self, keep: Tensor) -> Replay:
        """The replay of some rows only.

        Positions and masks are given per row. A tensor of two or more dimensions made from them therefore has rows
        first, or rows × heads (Bloom's ALiBi); all rows share a tensor with another first dimension. With as many rows
        as heads, a shared tensor with heads first (MPT) would be mistaken for one with rows first; see `can_cut`.
        """
        n = len(self.hidden)
        cut: dict[int, PrefixCache] = {}

        def select(x: Any) -> Any:
            if isinstance(x, PrefixCache):
                return cut.setdefault(id(x), x.rows(keep))
            if not isinstance(x, Tensor) or x.ndim < 2 or len(x) not in (n, n * self.heads) or n == 1:
                return x
            return x.unflatten(0, (n, -1))[keep].flatten(0, 1)

        calls = [(tree_map(select, args), tree_map(select, kwargs)) for args, kwargs in self.calls]
        return Replay(self.blocks, self.heads, self.hidden[keep], calls, self.column)

    @property
    def can_cut(self) -> bool:
        return len(self.hidden) != self.heads or self.heads == 1


@torch.no_grad()
def record(model: Any, structure: ModelStructure, inputs: dict[str, Any], first: int, last: int) -> Replay:
    """Run the model on ``inputs`` up to block ``last`` and keep what running ``first … last`` again needs."""
    blocks = structure.blocks[first : last + 1]
    seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        seen.append((hidden, args[1:], kwargs))

    def stop(*_: Any) -> None:
        raise _Stop

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(stop))
    try:
        model(**inputs)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if seen[0][0].shape[:2] != inputs["input_ids"].shape:
        _refuse_columns(model)
    return Replay(blocks, structure.heads, seen[0][0], [(args, kwargs) for _, args, kwargs in seen])


def _refuse_columns(model: Any) -> NoReturn:
    raise StructureError(
        f"{type(model).__name__} reads more or fewer tokens than it is given (prompt or prefix tuning?); expected one "
        "position for each token"
    )


@torch.no_grad()
def keeps_only_keys(model: Any) -> bool:
    """Whether a model's cache holds keys and values only, so that the cache can be cut and joined by rows.

    Raises:
        StructureError: the model adds tokens of its own before the given ones.
    """
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    out = model(input_ids=ids, use_cache=True)
    kept: Any = getattr(out, "past_key_values", None)
    only_keys = type(kept) is DynamicCache and all(type(layer) in _OF_KEYS for layer in kept.layers)
    lengths = {layer.get_seq_length() for layer in kept.layers} - {0} if only_keys else set()
    if out.logits.shape[1] != 1 or (len(lengths) == 1 and lengths != {1}):
        _refuse_columns(model)
    return only_keys and len(lengths) < 2  # a block that runs twice adds its keys twice to one cache layer


def record_after_prefix(
    model: Any,
    structure: ModelStructure,
    rows: Sequence[Sequence[int]],
    split: Sequence[int],
    first: int,
    last: int,
    cached: bool = True,
) -> Replay:
    """Replay of the tokens ``split[i]:`` of each row ``i``.

    Args:
        rows: token ids of each row; all rows have the same number of tokens from their split on.
        split: index of the first replayed token of each row. Prefixes are padded on the left, so that the split
            falls on the same column in every row.
        cached: cache the tokens before the split instead of replaying them; only for a model that `keeps_only_keys`.

    Returns:
        Replay: from its ``column`` on, ``hidden`` is ``[rows, len(row) - split, hidden]``.
    """
    tails = [row[s:] for row, s in zip(rows, split, strict=True)]
    assert len({len(t) for t in tails}) == 1, "rows of one replay have equally many tokens after the split"
    cache = PrefixCache()
    whole = pad_left(rows, structure.device)
    width = whole["input_ids"].shape[1] - len(tails[0])
    if not cached:
        return replace(record(model, structure, {**whole, "use_cache": False}, first, last), column=width)
    if width:
        prefix = {key: value[:, :width] for key, value in whole.items()}
        top = len(structure.blocks) - 1  # the logits are not read
        record(model, structure, {**prefix, "past_key_values": cache, "use_cache": True}, top, top)
    cache.frozen = True
    tail = {
        "input_ids": whole["input_ids"][:, width:],
        "position_ids": whole["position_ids"][:, width:],
        "attention_mask": whole["attention_mask"],
        "past_key_values": cache,
        "use_cache": True,
    }
    return record(model, structure, tail, first, last)


@torch.no_grad()
def check_replay(model: Any, structure: ModelStructure, ids: Sequence[int]) -> None:
    """Raise unless two checks pass: blocks, final norm and head, run in order, give the model's own logits; and a row
    gives the same logits behind padding as alone."""
    inputs: dict[str, Any] = {**pad_left([ids], structure.device), "use_cache": False}
    replay = record(model, structure, inputs, 0, len(structure.blocks) - 1)
    if len(replay.calls) < len(structure.blocks):
        raise StructureError(
            f"{type(model).__name__} runs {len(replay.calls)} of its {len(structure.blocks)} blocks on text alone "
            "(cross-attention?); expected a model of text"
        )
    own = model(**inputs).logits.float()
    if own.shape[:2] != inputs["input_ids"].shape:
        _refuse_columns(model)
    try:
        ours = structure.logits(replay.run(replay.hidden)).float()
    except RuntimeError as error:
        raise StructureError(
            f"{type(model).__name__}: its final norm and head do not fit its blocks ({error})"
        ) from error
    difference = float((ours - own).abs().max() / own.abs().max().clamp_min(1e-12))
    if not difference < 0.05:  # bf16 rounding stays well below
        raise StructureError(
            f"{type(model).__name__}: its blocks, final norm and head do not make its logits (relative difference "
            f"{difference:.2g}); something between them was not recognised"
        )
    padded = model(**pad_left([[ids[0], *ids], ids], structure.device), use_cache=False).logits[-1, 1:].float()
    difference = float((padded - own[0]).abs().max() / own.abs().max().clamp_min(1e-12))
    if not difference <= max(1e-3, 8 * torch.finfo(structure.dtype).eps):
        raise StructureError(
            f"{type(model).__name__}: padding on the left changes its logits (relative difference {difference:.2g}); "
            "expected a model that takes position_ids, or counts positions by the attention mask"
        )


@torch.no_grad()
def not_additive(model: Any, structure: ModelStructure, layers: Sequence[int], ids: Sequence[int]) -> tuple[int, ...]:
    """The ``layers``, ascending, whose block does not add its edited map's output unchanged to the block's output.

    In such a block a norm, a multiplier, an adapter or a hook comes between. The test adds a change, as long as the
    block's output, to the map's output at the last token of ``ids``, and compares the block's output. Beside a change
    of that length rounding is small in every dtype.
    """
    inputs: dict[str, Any] = {**pad_left([ids], structure.device), "use_cache": False}
    replay = record(model, structure, inputs, layers[0], layers[-1])
    bound = max(1e-3, 8 * torch.finfo(structure.dtype).eps)
    hidden, found = replay.hidden, []
    for i, layer in enumerate(range(layers[0], layers[-1] + 1)):
        entered, hidden = hidden, replay.block(i, hidden)
        if layer not in layers:
            continue
        before = hidden[0, -1].float()
        signs = torch.randint(2, before.shape, generator=torch.Generator().manual_seed(0)).to(before) * 2 - 1
        change = (signs * before.square().mean().sqrt()).to(structure.dtype)
        with added(structure.edited[layer].module, entered.shape[:2], -1, change[None]):
            moved = replay.block(i, entered)[0, -1].float() - before
        if not float((moved - change.float()).norm()) <= bound * float(change.float().norm()):
            found.append(layer)
    return tuple(found)


@contextmanager
def added(module: nn.Module, shape: torch.Size, column: int, change: Tensor) -> Iterator[list[Tensor]]:
    """Add ``change`` ``[rows, n]`` at a column to a linear map's own output for ``shape`` (rows, tokens).

    Other hooks on the map act on the sum, as they act on the output of the weight.

    Yields:
        The sums ``[rows, n]``, one for each run of the map.
    """
    sums: list[Tensor] = []

    def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        whole = out.reshape(*shape, -1).clone()  # OPT flattens rows and tokens before its MLP
        whole[:, column] += change
        sums.append(whole[:, column].clone())  # Falcon adds to the output in place
        return whole.view(out.shape)

    handle = module.register_forward_hook(hook, prepend=True)
    try:
        yield sums
    finally:
        handle.remove()
