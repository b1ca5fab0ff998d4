"""Keys and present values: the inputs of the edited maps, and the output of the last edited layer, at each subject.

Prompts are cut at the subject's last token and padded on the left, so that this token is the last column of every
row. The pass goes up layer by layer: after a layer's weight is written, its block runs once more, so the layers above
see the edited weights without another pass from the bottom. A layer's key depends only on the layers below, and these
are final when the key is computed: the same keys therefore serve the solve and the history.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sphere_edit.data.requests import EditRequest
from sphere_edit.model.partial_forward import Replay, added, record
from sphere_edit.model.structure import ModelStructure
from sphere_edit.model.tokens import encode, pad_left
from sphere_edit.targets.contexts import in_context

_TOKENS_PER_PASS = 4096


class LayerPass:
    """A forward pass over a batch of facts that halts at each edited layer.

    Args:
        contexts: templates with ``{}``; the first is the bare prompt.
        layers: the edited blocks, ascending.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        structure: ModelStructure,
        requests: Sequence[EditRequest],
        contexts: Sequence[str],
        layers: Sequence[int],
    ) -> None:
        self._structure = structure
        self._first, self._last = layers[0], layers[-1]
        self._facts, self._contexts = len(requests), len(contexts)
        rows = []
        for context in contexts:  # context-major: the bare prompts are the first rows
            for request in requests:
                row = encode(tokenizer, in_context(context, request.prompt), request.subject)
                rows.append(row.ids[: row.subject_last + 1])
        size = max(1, _TOKENS_PER_PASS // max(map(len, rows)))
        bare = [_record(model, structure, rows[: self._facts], self._first, self._last)]
        others = [
            _record(model, structure, rows[at : at + size], self._first, self._last)
            for at in range(self._facts, len(rows), size)
        ]
        self._parts = bare + others
        self._at = 0

    @property
    def layer(self) -> int:
        return self._first + self._at

    @torch.no_grad()
    def keys(self) -> Tensor:
        """Keys ``[facts, d]``, fp32: the mean of the bare prompt's key and the mean key of the generated contexts."""
        seen: list[Tensor] = []
        down = self._structure.edited[self.layer].module
        handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            for part in self._parts:
                part.block(self._at, part.hidden)
        finally:
            handle.remove()
        # OPT flattens rows and tokens before its MLP
        last = [x.reshape(*part.hidden.shape[:2], -1)[:, -1] for x, part in zip(seen, self._parts, strict=True)]
        keys = torch.cat(last).float().view(self._contexts, self._facts, -1)
        return keys[0] if self._contexts == 1 else (keys[0] + keys[1:].mean(0)) / 2

    @torch.no_grad()
    def values(self) -> Tensor:
        """The last edited layer's outputs ``[facts, hidden]``, fp32, at the bare prompts under the present weights."""
        return self._parts[0].run(self._parts[0].hidden, self._at)[:, -1].float()

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """The edited map's own outputs ``[facts, n]``, fp32, at the bare prompts under the present weights."""
        part = self._parts[0]
        nothing = part.hidden.new_zeros(len(part.hidden), self._structure.edited[self.layer].weight.shape[0])
        with added(self._structure.edited[self.layer].module, part.hidden.shape[:2], -1, nothing) as said:
            part.block(self._at, part.hidden)
        return said[0].float()

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Go up to ``layer``: run the blocks below it with their present weights."""
        while self.layer < layer:
            for part in self._parts:
                part.hidden = part.block(self._at, part.hidden)
            self._at += 1


def _record(model: Any, structure: ModelStructure, rows: Sequence[Sequence[int]], first: int, last: int) -> Replay:
    inputs: dict[str, Any] = pad_left(rows, structure.device)
    return record(model, structure, {**inputs, "use_cache": False}, first, last)
