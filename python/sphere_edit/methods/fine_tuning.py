"""FT: fine-tune the edited weights on the facts; the result is updates, not yet written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sphere_edit.config import EditConfig, count, flag, not_negative, positive, positive_int
from sphere_edit.data.requests import EditRequest
from sphere_edit.methods.base import Method
from sphere_edit.model.partial_forward import Replay, record
from sphere_edit.model.structure import ModelStructure
from sphere_edit.model.tokens import Row, encode, pad_left

_TOKENS_PER_PASS = 4096


class FineTuning(Method, name="ft"):
    """Adam on the edited weights, without a history (see `tune`).

    Training each batch to its end, one after the other, is depth-first: later batches overwrite earlier ones.
    Breadth-first (``ft_minibatch``) goes through all facts of a batch in epochs, so the batch should be the whole set.
    Such a batch is kept whole or undone, and an interrupted one begins anew.
    """

    settings = {
        "ft_steps": positive_int(25, "The most steps of Adam on the edited weights; with ft_minibatch, epochs."),
        "ft_lr": positive(5e-4, "Learning rate of Adam."),
        "ft_stop": not_negative(1e-2, "Training stops when the mean NLL of the targets falls below this."),
        "ft_minibatch": count(
            0,
            "Facts per step of Adam; the batch should then be the whole set (LocFT-BF's breadth-first order, see "
            "`sphere_edit.methods.fine_tuning`). 0: each step takes the whole batch.",
        ),
        "ft_eos": flag(False, "Targets end in the end-of-text token."),
    }
    presets = {"*": {"layers": ()}, "llama3-8b": {"layers": (21,)}, "qwen2.5-7b": {"layers": (27,)}}
    place = 21 / 32
    trains = True
    dense = True


@dataclass(frozen=True)
class Tuned:
    """Result of fine-tuning.

    Attributes:
        updates: ``{layer: [n, d]}`` fp32.
        nll: ``[facts]`` fp32, mean negative log-likelihood of a target token at the fact's last pass, in nats.
        steps: number of steps made.
    """

    updates: dict[int, Tensor]
    nll: Tensor
    steps: int


@dataclass
class _Part:
    """Facts that run together; ``read_row``, ``read_column`` are the places that predict the target tokens ``want``."""

    facts: list[int]
    replay: Replay
    read_row: Tensor
    read_column: Tensor
    want: Tensor
    share: Tensor  # weight of a place in its fact's mean

    def nll(self, structure: ModelStructure) -> Tensor:
        out = self.replay.run(self.replay.hidden)[self.read_row, self.read_column]
        log_probs = structure.logits(out).float().log_softmax(-1)
        picked = log_probs.gather(1, self.want[:, None])[:, 0]
        zero = torch.zeros(len(self.facts), dtype=torch.float32, device=out.device)
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
    """Train updates of the edited weights by Adam: minimise the mean over facts of their targets' NLL.

    Targets follow the bare prompts. Each step takes the whole batch. Training stops when the mean is below ``ft_stop``,
    or after ``ft_steps`` steps. Only the blocks from the first edited one on are run; the weights stay as they are.

    Breadth-first, with ``ft_minibatch``, a step takes that many facts, and ``ft_steps`` counts epochs: rounds through
    all facts of the batch, each in an order of its own. A step is left out when its mean is below ``ft_stop``, and an
    epoch with a mean below ``ft_stop`` is the last. With ``ft_eos`` every target ends in the end-of-text token.

    Args:
        model: causal LM in evaluation mode without parameter gradients (see `sphere_edit.model.inference.frozen`).

    Source: the FT baseline of ROME and AlphaEdit. Their code predicts every target token from the prompt's last
        position, and steps once for each part of a batch; here each target token follows the tokens before it.
        Breadth-first: Yang et al., Fine-tuning Done Right in Model Editing (LocFT-BF, arXiv 2509.22072), whose code was
        read. Epochs, stop rules, EOS and Adam are as in that code. Orders are drawn differently, and Adam moves an fp32
        update that is (projected and) written at the end; in that code Adam moves the weight itself.
    """
    rows = [encode(tokenizer, r.prompt, r.subject, r.target_new, ended=config.ft_eos) for r in requests]
    updates = {
        layer: structure.edited[layer].weight.new_zeros(
            structure.edited[layer].weight.shape, dtype=torch.float32, requires_grad=True
        )
        for layer in layers
    }
    adam = torch.optim.Adam(updates.values(), lr=config.ft_lr)
    nll = torch.zeros(len(rows), dtype=torch.float32, device=structure.device)
    drawn, steps = torch.Generator().manual_seed(config.seed), 0
    everything = [] if config.ft_minibatch else _parts(model, structure, rows, range(len(rows)), layers[0])
    with ExitStack() as stack:
        for layer, update in updates.items():
            stack.enter_context(_added(structure.edited[layer].module, update))
        for epoch in range(config.ft_steps):
            for chosen in _minibatches(len(rows), config.ft_minibatch, drawn):
                adam.zero_grad()
                for part in everything or _parts(model, structure, rows, chosen, layers[0]):
                    found = part.nll(structure)
                    (found.sum() / len(chosen)).backward()
                    nll[part.facts] = found.detach()
                if not float(nll[chosen].mean()) < config.ft_stop:
                    adam.step()
                    steps += 1
            known = float(nll.mean()) < config.ft_stop
            if progress is not None:
                progress(config.ft_steps if known else epoch + 1, config.ft_steps)
            if known:
                break
    return Tuned({layer: update.detach() for layer, update in updates.items()}, nll, steps)


def _minibatches(facts: int, size: int, drawn: torch.Generator) -> list[list[int]]:
    """The facts of an epoch, ``size`` at a time in an order of its own; with size 0, all at once in their order."""
    if not size:
        return [list(range(facts))]
    order = torch.randperm(facts, generator=drawn).tolist()
    return [order[at : at + size] for at in range(0, facts, size)]


def _parts(
    model: Any, structure: ModelStructure, rows: Sequence[Row], chosen: Sequence[int], layer: int
) -> list[_Part]:
    size = max(1, _TOKENS_PER_PASS // max(len(rows[i].ids) for i in chosen))
    return [_part(model, structure, rows, chosen[at : at + size], layer) for at in range(0, len(chosen), size)]


def _part(model: Any, structure: ModelStructure, every: Sequence[Row], facts: Sequence[int], layer: int) -> _Part:
    rows = [every[i] for i in facts]
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
    return _Part(list(facts), replay, row, column, want, share)


@contextmanager
def _added(module: nn.Module, update: Tensor):
    """Inside the context, the linear map also applies ``update [n, d]``."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + nn.functional.linear(args[0].to(update.dtype), update).to(out.dtype)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
