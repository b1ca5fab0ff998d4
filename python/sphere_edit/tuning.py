"""Fine-tune the edited weights on a batch of facts, as an update that is not written yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sphere_edit.config import EditConfig
from sphere_edit.replay import Replay, record
from sphere_edit.requests import EditRequest
from sphere_edit.structure import ModelStructure
from sphere_edit.tokens import Row, encode, pad_left

_TOKENS_PER_PASS = 4096


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning gave.

    Attributes:
        updates: ``{layer: [n, d]}`` fp32.
        nll: ``[facts]`` fp32, mean negative log-likelihood of a target token before the last step, in nats.
        steps: how many were made.
    """

    updates: dict[int, Tensor]
    nll: Tensor
    steps: int


@dataclass
class _Part:
    """Facts that are run together; ``read``s are the places of target tokens, ``want`` the tokens."""

    facts: slice
    replay: Replay
    read_row: Tensor
    read_column: Tensor
    want: Tensor
    share: Tensor  # of a place in its fact's mean

    def nll(self, structure: ModelStructure) -> Tensor:
        out = self.replay.run(self.replay.hidden)[self.read_row, self.read_column]
        log_probs = structure.logits(out).float().log_softmax(-1)
        picked = log_probs.gather(1, self.want[:, None])[:, 0]
        zero = torch.zeros(self.facts.stop - self.facts.start, dtype=torch.float32, device=out.device)
        return zero.index_add(0, self.read_row, -picked * self.share)


@torch.enable_grad()
def tune(
    model: Any,
    tokenizer: Any,
    structure: ModelStructure,
    requests: Sequence[EditRequest],
    config: EditConfig,
    layers: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Adam on updates of the edited weights: the mean over facts of the NLL of their targets after the bare prompts.

    It stops when that is below ``ft_stop``, or after ``ft_steps`` steps. Each step takes the whole batch; only the
    blocks from the first edited one on are run, under weights that stay as they are.

    Args:
        model: causal LM in evaluation mode without parameter gradients (see `replay.frozen`).

    Source: the FT baseline of ROME and AlphaEdit, whose code predicts every target token from the prompt's last
        position, where here each follows those before it, and steps once for each part of a batch.
    """
    rows = [encode(tokenizer, request.prompt, request.subject, request.target_new) for request in requests]
    size = max(1, _TOKENS_PER_PASS // max(len(row.ids) for row in rows))
    parts = [_part(model, structure, rows[at : at + size], at, layers[0]) for at in range(0, len(rows), size)]
    updates = {
        layer: structure.edited[layer].weight.new_zeros(
            structure.edited[layer].weight.shape, dtype=torch.float32, requires_grad=True
        )
        for layer in layers
    }
    adam = torch.optim.Adam(updates.values(), lr=config.ft_lr)
    with ExitStack() as stack:
        for layer, update in updates.items():
            stack.enter_context(_added(structure.edited[layer].module, update))
        for step in range(config.ft_steps):
            adam.zero_grad()
            found = []
            for part in parts:
                nll = part.nll(structure)
                (nll.sum() / len(rows)).backward()
                found.append(nll.detach())
            known = float(torch.cat(found).mean()) < config.ft_stop
            if progress is not None:
                progress(config.ft_steps if known else step + 1, config.ft_steps)
            if known:
                break
            adam.step()
    made = step if known else step + 1
    return Tuned({layer: update.detach() for layer, update in updates.items()}, torch.cat(found), made)


def _part(model: Any, structure: ModelStructure, rows: Sequence[Row], first: int, layer: int) -> _Part:
    inputs = {**pad_left([row.ids for row in rows], structure.device), "use_cache": False}
    replay = record(model, structure, inputs, layer, len(structure.blocks) - 1)
    width = replay.hidden.shape[1]
    places = [
        (i, width - len(row.target) + k, token, 1 / len(row.target))
        for i, row in enumerate(rows)
        for k, token in enumerate(row.target)
    ]
    device = structure.device
    row, column, want = (torch.tensor(x, device=device) for x in list(zip(*places, strict=True))[:3])
    share = torch.tensor([p[3] for p in places], dtype=torch.float32, device=device)
    return _Part(slice(first, first + len(rows)), replay, row, column, want, share)


@contextmanager
def _added(module: nn.Module, update: Tensor):
    """Within, the linear map also applies ``update [n, d]``."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + nn.functional.linear(args[0].to(update.dtype), update).to(out.dtype)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
