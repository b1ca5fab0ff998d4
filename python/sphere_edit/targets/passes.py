"""Forward and backward passes of a batch of facts through the present weights, at the lowest cost.

A pass runs the tokens from the subject's last one on. The attention's keys and values of the tokens before it are
computed once a batch, under the weights of the batch before; the blocks below the first edited one run once too. An
update also acts, a little, on the tokens before the subject: the closed loop therefore asks the whole model (`plain`)
before a fact counts as learned. A model that keeps other states of its tokens runs whole rows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sphere_edit.model.partial_forward import PrefixCache, Replay, keeps_only_keys, record
from sphere_edit.model.structure import ModelStructure, find_structure
from sphere_edit.model.tokens import Row, pad_left
from sphere_edit.targets.groups import Group
from sphere_kernels._backends import native

_TOKENS_PER_GROUP = 1024  # bounds the activations that a backward pass keeps
_ROWS = 24  # a group with fewer rows is not split for its padding: weights are read once a group
_PADDING = 0.2  # share of a group's tokens
_WORTH = 0.85  # a group is cut down once at most this share of its rows is active


@dataclass(frozen=True)
class Seen:
    """Result of a pass for the facts that took part; other facts' rows are zero, but for ``nll``.

    Attributes:
        nll: ``[facts]`` fp32, mean negative log-likelihood of a target token in nats; infinite for facts not run.
        ran: ``[facts]`` bool, whether the fact took part.
        keys: ``{layer: [facts, d]}`` fp32, inputs of the edited maps at the subject's last token.
        lengths: ``{layer: [facts]}`` fp32, norms of the maps' outputs there.
        gradients: ``{layer: [facts, n]}`` fp32, gradients of the loss with respect to these outputs.
    """

    nll: Tensor
    ran: Tensor
    keys: dict[int, Tensor]
    lengths: dict[int, Tensor]
    gradients: dict[int, Tensor]


class Passes:
    """Passes through one model, or through a copy of it in bfloat16.

    Args:
        model: causal LM in evaluation mode without parameter gradients (see `sphere_edit.model.inference.frozen`).
        layers: the edited blocks, ascending.
        arithmetic: ``model``, or ``bfloat16``: a copy of the model is kept, and `follow` updates its weights.

    Attributes:
        flops: multiplications and additions of the linear maps in all passes so far.
    """

    def __init__(self, model: Any, structure: ModelStructure, layers: Sequence[int], arithmetic: str) -> None:
        self._followed = model
        self._edited = {id(structure.edited[layer].module.weight) for layer in layers}
        self._copied = arithmetic == "bfloat16" and structure.dtype != torch.bfloat16
        self._versions = self._others()
        if self._copied:
            model = copy.deepcopy(model).to(torch.bfloat16)
            structure = find_structure(model, structure.modules)
        self._model, self._structure, self._layers = model, structure, tuple(layers)
        self._maps = [structure.edited[layer] for layer in layers]
        with _attention(structure.device):
            self._cached = keeps_only_keys(model)
        self._groups: list[Group] = []
        self._facts = 0
        self.flops = 0.0

    @property
    def device(self) -> torch.device:
        return self._structure.device

    @torch.no_grad()
    def follow(self, weights: Mapping[int, Tensor]) -> None:
        """Copy the edited weights ``{layer: [n, d]}`` into the bfloat16 copy, and all others if one of them changed."""
        if not self._copied:
            return
        for layer, weight in weights.items():
            self._structure.edited[layer].weight.copy_(weight)
        before, self._versions = self._versions, self._others()
        if self._versions != before:
            for own, other in zip(self._model.parameters(), self._followed.parameters(), strict=True):
                own.copy_(other)

    def _others(self) -> list[tuple[int, int]]:
        """Address and version of each parameter that is not edited; they change when torch replaces or writes it."""
        others = (parameter for parameter in self._followed.parameters() if id(parameter) not in self._edited)
        return [(parameter.data_ptr(), parameter._version) for parameter in others]

    @torch.no_grad()
    def begin(self, rows: Sequence[tuple[int, Row]], facts: int) -> None:
        """Prepare the next passes.

        Args:
            rows: (fact, row); a row without a target is for the KL term.
            facts: number of facts.
        """
        self._facts = facts
        with _attention(self._structure.device):
            prefixes = self._prefixes([row for _, row in rows]) if self._cached else []
            lengths = [len(row.ids) - (row.subject_last if self._cached else 0) for _, row in rows]
            self._groups = [self._group(part, rows, prefixes) for part in alike(lengths)]

    def keep(self, active: Tensor) -> None:
        """Leave out facts that are not active, ``[facts]`` bool, until the next `begin`."""
        kept = (group.wanted(active, _WORTH) for group in self._groups)
        self._groups = [group for group in kept if group is not None]

    def run(self, kl: float = 0.0) -> Seen:
        """Run one forward and backward pass of the kept facts; the loss is NLL + ``kl`` · KL."""
        facts, device = self._facts, self._structure.device
        nll = torch.zeros(facts, dtype=torch.float32, device=device)
        ran = torch.zeros(facts, dtype=torch.bool, device=device)
        keys = {m.layer: torch.zeros(facts, m.weight.shape[1], dtype=torch.float32, device=device) for m in self._maps}
        gradients = {
            m.layer: torch.zeros(facts, m.weight.shape[0], dtype=torch.float32, device=device) for m in self._maps
        }
        lengths = {m.layer: torch.zeros(facts, dtype=torch.float32, device=device) for m in self._maps}
        for group in self._groups:
            hidden, about = group.replay.hidden, group.row_fact
            told = group.tells_target()
            with _Probes(self._maps, group.replay) as probes, torch.enable_grad(), _attention(device):
                own, divergence = group.losses(group.log_probs(self._structure, hidden), facts)
                found = torch.autograd.grad((own + kl * divergence).sum(), probes.added)
            nll += own.detach()
            ran[about[told]] = True
            for m, key, length, gradient in zip(self._maps, probes.keys, probes.lengths, found, strict=True):
                keys[m.layer][about[told]] = key[told].float()
                lengths[m.layer][about[told]] = length[told].float()
                gradients[m.layer].index_add_(0, about, gradient.float())
            self.flops += 2 * self._flops(hidden.shape[0] * hidden.shape[1], self._layers[0], len(group.want))
        return Seen(nll.masked_fill(~ran, torch.inf), ran, keys, lengths, gradients)

    def _flops(self, tokens: int, first: int, reads: int) -> float:
        """Floating-point operations of the linear maps in a forward pass."""
        weights = sum(self._structure.block_weights[first:])
        return 2.0 * (tokens * weights + reads * self._structure.head_weights)

    def _prefixes(self, rows: Sequence[Row]) -> list[_Prefixes]:
        """Keys and values of the tokens before each row's subject."""
        found, top = [], len(self._structure.blocks) - 1
        some = [i for i, row in enumerate(rows) if row.subject_last]
        for part in alike([rows[i].subject_last for i in some]):
            places = [some[i] for i in part]
            width = max(rows[i].subject_last for i in places)
            inputs: dict[str, Any] = pad_left([rows[i].ids[: rows[i].subject_last] for i in places], self.device)
            cache = PrefixCache()
            record(self._model, self._structure, {**inputs, "past_key_values": cache, "use_cache": True}, top, top)
            self.flops += self._flops(len(places) * width, 0, 0)
            found.append(_Prefixes(places, width, cache))
        return found

    def _group(self, part: Sequence[int], rows: Sequence[tuple[int, Row]], prefixes: Sequence[_Prefixes]) -> Group:
        chosen = [rows[i][1] for i in part]
        split = [(row.ids[: row.subject_last], row.ids[row.subject_last :]) for row in chosen]
        width = max(len(before) for before, _ in split)
        length = max(len(tail) for _, tail in split)
        inputs: dict[str, Any] = _padded(split, width, length, self._structure)
        facts = [rows[i][0] for i in part]
        if not self._cached:
            return Group.of(self._structure, self._replay({**inputs, "use_cache": False}, width), facts, chosen, 1)
        inputs["input_ids"] = inputs["input_ids"][:, width:]
        inputs["position_ids"] = inputs["position_ids"][:, width:]
        cache = _joined(part, width, prefixes)
        cache.frozen = True
        replay = self._replay({**inputs, "past_key_values": cache, "use_cache": True}, 0)
        return Group.of(self._structure, replay, facts, chosen, 1)

    def _replay(self, inputs: dict[str, Any], column: int) -> Replay:
        last = len(self._structure.blocks) - 1
        self.flops += self._flops(inputs["input_ids"].numel(), 0, 0)
        return replace(record(self._model, self._structure, inputs, self._layers[0], last), column=column)


@dataclass(frozen=True)
class _Prefixes:
    """Keys and values of some rows' first tokens, padded on the left to ``width`` tokens."""

    places: list[int]
    width: int
    cache: PrefixCache


def _joined(part: Sequence[int], width: int, prefixes: Sequence[_Prefixes]) -> PrefixCache:
    """The prefixes of some rows, padded on the left to ``width``."""
    out = PrefixCache()
    sources: list[tuple[_Prefixes, list[int], list[int]]] = []
    for source in prefixes:
        to = [place for place, i in enumerate(part) if i in source.places]
        if to:
            sources.append((source, to, [source.places.index(part[place]) for place in to]))
    for layer in range(len(prefixes[0].cache.layers) if width and sources else 0):
        made = []
        for kind in ("keys", "values"):
            first = getattr(sources[0][0].cache.layers[layer], kind)
            whole = first.new_zeros(len(part), first.shape[1], width, first.shape[3])
            for source, to, of in sources:
                shared = min(width, source.width)
                own = getattr(source.cache.layers[layer], kind)
                whole[to, :, width - shared :] = own[of, :, source.width - shared :]
            made.append(whole)
        out.update(*made, layer)
    return out


class _Probes:
    """Inside the context, add to each edited map's output, at the replay's column, a zero that has a gradient; it is
    added before other hooks run, like the output of the weight."""

    def __init__(self, maps: Sequence[Any], replay: Replay) -> None:
        hidden = replay.hidden
        self._maps, self._shape, self._at = maps, hidden.shape[:2], replay.column
        self.added = [hidden.new_zeros(len(hidden), m.weight.shape[0], requires_grad=True) for m in maps]
        self.keys: list[Tensor] = [hidden] * len(maps)
        self.lengths: list[Tensor] = [hidden] * len(maps)

    def __enter__(self) -> _Probes:
        self._handles = [m.module.register_forward_hook(self._hook(i), prepend=True) for i, m in enumerate(self._maps)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, i: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            # OPT flattens rows and tokens before its MLP
            at = self._at
            self.keys[i] = args[0].detach().reshape(*self._shape, -1)[:, at]
            whole = out.reshape(*self._shape, -1)
            self.lengths[i] = whole[:, at].detach().norm(dim=1)
            parts = whole[:, :at], whole[:, at : at + 1] + self.added[i][:, None], whole[:, at + 1 :]
            return torch.cat(parts, 1).view(out.shape)

        return hook


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Row indices of each group, longest rows first: groups have little padding and are not needlessly small."""
    groups: list[list[int]] = []
    tokens = longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        padded = (len(groups[-1]) + 1) * longest if groups else 0
        padding = padded - tokens - lengths[i]
        if not groups or padded > _TOKENS_PER_GROUP or (len(groups[-1]) >= _ROWS and padding > _PADDING * padded):
            groups.append([])
            tokens, longest = 0, lengths[i]
        groups[-1].append(i)
        tokens += lengths[i]
    return groups


def _padded(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], before: int, after: int, structure: ModelStructure
) -> dict[str, Tensor]:
    """Inputs of rows in two parts, the first padded on the left to ``before`` tokens, the second on the right to
    ``after``; the pad token is 0 for every tokenizer: it is masked."""
    ids = torch.zeros(len(rows), before + after, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (left, right) in enumerate(rows):
        start = before - len(left)
        whole = torch.tensor([*left, *right])
        ids[i, start : start + len(whole)] = whole
        mask[i, start : start + len(whole)] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: value.to(structure.device) for name, value in inputs.items()}


def fast_bfloat16(structure: ModelStructure) -> bool:
    """Whether rounds are cheaper in a bfloat16 copy: an fp32 model on a processor that multiplies bfloat16."""
    if structure.device.type != "cpu" or structure.dtype != torch.float32:
        return False
    features = native.cpu.cpu_features() if native.cpu is not None else {}
    return bool(features.get("avx512_bf16"))


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """Plain attention on a CPU: torch's fused kernel is made for long rows, its bfloat16 backward ten times slower."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
