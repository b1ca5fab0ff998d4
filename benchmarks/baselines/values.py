"""Values optimised the published way: one fact at a time, every step through the whole model.

Written from the description in MEMIT (``compute_z``). Prompts, loss, clamp and stop rule are those of
`sphere_edit.targets.optimised.optimise_values`; only the way of computing differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sphere_edit.config import EditConfig
from sphere_edit.data.requests import EditRequest
from sphere_edit.model.structure import ModelStructure
from sphere_edit.model.tokens import encode
from sphere_edit.targets.contexts import in_context
from sphere_edit.targets.optimised import Values


def optimise_one_by_one(
    model: Any,
    tokenizer: Any,
    structure: ModelStructure,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    config: EditConfig,
    layer: int,
) -> Values:
    """`optimise_values`, one fact at a time; the model must be in evaluation mode without parameter gradients."""
    found = [_optimise(model, tokenizer, structure, r, contexts, config, layer) for r in requests]
    target, loss, nll = (torch.stack(part) for part in list(zip(*found, strict=True))[:3])
    return Values(target, loss, nll, torch.tensor([f[3] for f in found]))


def _optimise(
    model: Any,
    tokenizer: Any,
    structure: ModelStructure,
    request: EditRequest,
    contexts: Sequence[str],
    config: EditConfig,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor, int]:
    rows = [encode(tokenizer, in_context(c, request.prompt), request.subject, request.target_new) for c in contexts]
    rows.append(encode(tokenizer, "{} is a", request.subject))
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([list(row.ids) + [0] * (width - len(row.ids)) for row in rows])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows])
    at = torch.tensor([row.subject_last for row in rows])
    row_index = torch.arange(len(rows))
    target = torch.tensor(rows[0].target)
    places = [(i, len(row.ids) - len(target) + k) for i, row in enumerate(rows[:-1]) for k in range(len(target))]
    read_row, read_column = torch.tensor(places).T
    wanted = target.repeat(len(rows) - 1)

    delta = torch.zeros(structure.hidden_size, requires_grad=True)
    first: list[Tensor] = []

    def shift(_: nn.Module, __: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        if not first:
            first.append(hidden[0, at[0]].detach().clone())
        moved = hidden.clone()
        moved[row_index, at] += delta
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    adam = torch.optim.Adam([delta], lr=config.value_lr)
    reference: Tensor | None = None
    handle = structure.blocks[layer].register_forward_hook(shift)
    try:
        for step in range(1, config.value_steps + 1):
            adam.zero_grad()
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            essence = logits[-1, at[-1]].log_softmax(-1)
            reference = essence.detach().clone() if reference is None else reference
            log_probs = logits[read_row, read_column].log_softmax(-1)
            nll = -log_probs.gather(1, wanted[:, None]).mean()
            kl = (essence.exp() * (essence - reference)).sum()
            norm = first[0].norm()
            loss = nll + config.value_kl * kl + config.value_weight_decay * delta.norm() / norm**2
            if (loss if config.value_stop_on == "loss" else nll) < config.value_stop or step == config.value_steps:
                break
            loss.backward()
            adam.step()
            with torch.no_grad():
                delta *= (config.value_clamp * norm / delta.norm()).clamp_max(1.0)
    finally:
        handle.remove()
    return first[0] + delta.detach(), loss.detach(), nll.detach(), step
