"""A forward pass of the model itself, as a whole: it tells which facts of a batch the model has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sphere_edit.data.requests import EditRequest
from sphere_edit.model.inference import compact_head, last_logits
from sphere_edit.model.structure import ModelStructure
from sphere_edit.model.tokens import Row, pad_left
from sphere_edit.targets.passes import alike


@dataclass(frozen=True)
class Plain:
    """Result of the pass, on the CPU except for ``keys`` and ``outputs``.

    Attributes:
        nll: ``[facts]`` fp32, mean negative log-likelihood of a target token, in nats.
        known: ``[facts]`` bool, whether every target token is the likeliest.
        keys: ``{layer: [facts, d]}`` fp32, inputs of the edited maps at the subject's last token.
        outputs: ``{layer: [facts, n]}`` fp32, the maps' own outputs there, before other hooks.
        flops: floating-point operations of the linear maps.
    """

    nll: Tensor
    known: Tensor
    keys: dict[int, Tensor]
    outputs: dict[int, Tensor]
    flops: float


@torch.no_grad()
def look(model: Any, structure: ModelStructure, rows: Sequence[Row], layers: Sequence[int]) -> Plain:
    """Ask the model, in evaluation mode, for the targets of ``rows`` (see `sphere_edit.model.inference.frozen`)."""
    nll, known = torch.zeros(len(rows), dtype=torch.float32), torch.zeros(len(rows), dtype=torch.bool)
    maps = [structure.edited[layer] for layer in layers]
    keys = {m.layer: m.weight.new_zeros(len(rows), m.weight.shape[1], dtype=torch.float32) for m in maps}
    outputs = {m.layer: m.weight.new_zeros(len(rows), m.weight.shape[0], dtype=torch.float32) for m in maps}
    flops = 0.0
    for part in alike([len(row.ids) for row in rows]):
        chosen = [rows[i] for i in part]
        inputs: dict[str, Any] = pad_left([row.ids for row in chosen], structure.device)
        shape = inputs["input_ids"].shape
        subject = torch.tensor([shape[1] - len(row.ids) + row.subject_last for row in chosen], device=structure.device)
        takes = [(m.module, _take(m.layer, part, shape, subject, keys, outputs)) for m in maps]
        handles = [module.register_forward_hook(take, prepend=True) for module, take in takes]
        longest = max(len(row.target) for row in chosen)
        try:
            with compact_head(model):
                logits = model(**inputs, use_cache=False, **last_logits(model, longest)).logits[:, -longest:]
        finally:
            for handle in handles:
                handle.remove()
        for i, row, own in zip(part, chosen, logits, strict=True):
            want = torch.tensor(row.target, device=own.device)
            log_probs = own[longest - len(want) :].float().log_softmax(-1)
            nll[i] = -log_probs.gather(1, want[:, None]).mean()
            known[i] = bool((log_probs.argmax(-1) == want).all())
        flops += 2.0 * (shape.numel() * sum(structure.block_weights) + len(part) * longest * structure.head_weights)
    return Plain(nll, known, keys, outputs, flops)


def learned(seen: Plain, requests: Sequence[EditRequest]) -> dict[str, Any]:
    """Number of facts that the model has, and ids of the facts that it lacks."""
    unlearned = [request.id for request, known in zip(requests, seen.known.tolist(), strict=True) if not known]
    return {"learned": len(requests) - len(unlearned), "unlearned": unlearned}


def _take(
    layer: int,
    part: Sequence[int],
    shape: torch.Size,
    subject: Tensor,
    keys: dict[int, Tensor],
    outputs: dict[int, Tensor],
) -> Any:
    """A hook that keeps an edited map's input and output at the subjects."""
    at = torch.arange(len(part), device=subject.device), subject

    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        keys[layer][list(part)] = args[0].reshape(*shape, -1)[at].float()
        outputs[layer][list(part)] = out.reshape(*shape, -1)[at].float()

    return hook
