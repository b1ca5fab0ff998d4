"""Run a whole model: without gradients, and with logits only at the positions that are read."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def last_logits(model: Any, count: int) -> dict[str, int]:
    """The argument that limits logits to the last ``count`` positions, if the model has such an argument."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode and turn parameter gradients off; restore both at the end."""
    training = [(module, module.training) for module in model.modules()]
    wants = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in wants:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wants:
            parameter.requires_grad_(True)
        for module, mode in training:
            module.training = mode  # train() would set the children too


@contextmanager
def compact_head(model: Any) -> Iterator[None]:
    """Make the head's input contiguous: a CPU multiplies a slice of positions row by row, ten times as slowly."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(
        lambda _, args, kwargs: tree_map_only(Tensor, Tensor.contiguous, (args, kwargs)), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()
