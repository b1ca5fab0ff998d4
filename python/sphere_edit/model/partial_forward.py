"""Run a stretch of decoder blocks again and again, with the arguments a real forward pass gave them.

An edit acts at one token of one layer. What lies below that layer, and the tokens before the subject's last, never
change while a value is optimised; what lies above can be run alone. Masks, positions and rotary tables are the
model's own: they are recorded from one real forward pass, so no family of models is imitated here.
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

# Other layers may have states besides keys and values, which a cache by rows would not follow.
_OF_KEYS = (DynamicLayer, DynamicSlidingWindowLayer)


class PrefixCache(DynamicCache):
    """Keys and values of the tokens before the subject's last. Once frozen, later tokens see them but do not join."""

    frozen = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if not self.frozen:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx >= len(self.layers):
            return key_states, value_states
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], -2), torch.cat([layer.values, value_states], -2)

    def rows(self, keep: Tensor) -> PrefixCache:
        """The same cache for some of its rows."""
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

    ``hidden`` is what entered block ``first``; ``calls[i]`` are the other arguments of block ``first + i``; the tokens
    of interest begin at ``column``, in every row.
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
        """The same replay for some of its rows.

        Positions and masks were given per row, so a tensor of two or more dimensions that came of them has rows first,
        or rows × heads (Bloom's ALiBi); any other first dimension is shared by all rows. With as many rows as heads
        this mistakes heads for rows where a shared tensor has heads first (MPT); ask `can_cut`.
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
    """Run the model on ``inputs`` up to block ``last`` and keep what is needed to run ``first … last`` again."""
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
    """Whether all that a model keeps of its tokens is keys and values, so that a cache can be cut and joined by rows.

    Raises:
        StructureError: it adds tokens of its own before those that it is given.
    """
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    out = model(input_ids=ids, use_cache=True)
    kept: Any = getattr(out, "past_key_values", None)
    only_keys = type(kept) is DynamicCache and all(type(layer) in _OF_KEYS for layer in kept.layers)
    lengths = {layer.get_seq_length() for layer in kept.layers} - {0} if only_keys else set()
    if out.logits.shape[1] != 1 or (len(lengths) == 1 and lengths != {1}):
        _refuse_columns(model)
    return only_keys and len(lengths) < 2  # a block that runs twice is there twice in one layer of the cache


def record_after_prefix(
    model: Any,
    structure: ModelStructure,
    rows: Sequence[Sequence[int]],
    split: Sequence[int],
    first: int,
    last: int,
    cached: bool = True,
) -> Replay:
    """A replay of the tokens ``split[i]:`` of each row.

    Args:
        rows: token ids of each row; all rows must have the same number of tokens from their split on.
        split: index of the first replayed token of each row. Prefixes are padded on the left, so that the split
            falls on the same column in every row.
        cached: the tokens before the split are cached and not replayed; only where the model `keeps_only_keys`.

    Returns:
        Replay: whose ``hidden`` is ``[rows, len(row) - split, hidden]`` after its ``column``.
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
        top = len(structure.blocks) - 1  # nobody reads the logits
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
    """Raise unless the blocks, final norm and head, run one after the other, give the model's own logits, and a row
    behind padding gives what it gives alone."""
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
    """Those of ``layers``, ascending, whose block does not add the output of its edited map to its own as it is.

    A norm, a multiplier, an adapter or a hook comes between then. A change as long as the block's output is put onto
    the map's output at the last token of ``ids``, and looked for in the block's output: beside a change of that length
    rounding is small in every dtype.
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
    """Within, a linear map's own output for ``shape`` (rows, tokens) has ``change`` ``[rows, n]`` added at a column.

    Hooks of others on the map act on the sum, as they do on what its weight gives.

    Yields:
        The sums ``[rows, n]``, one for each time that the map was run.
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
