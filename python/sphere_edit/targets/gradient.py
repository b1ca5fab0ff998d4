"""Wanted changes from one forward and backward pass, comparable over the whole life of the edits.

No subject, no iteration. At every position that predicts a target token, the input of an edited map is the key, and the
wanted change goes against the gradient of the target's NLL with respect to the map's output. Running statistics of all
positions so far, this batch's included, normalise both, so that each position asks for a step of about the same length,
however sure the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sphere_edit.config import EditConfig, count, flag, positive
from sphere_edit.model.inference import compact_head, last_logits
from sphere_edit.model.structure import ModelStructure
from sphere_edit.model.tokens import Row, pad_left
from sphere_edit.state import add_prefix, strip_prefix
from sphere_edit.targets.base import Targets, all_at_once
from sphere_edit.targets.passes import alike

_CONSTANT = 1e-6  # a feature that deviates by at most this share of its mean deviates by rounding
_FLOOR = 1e-3  # share of the mean eigenvalue; smaller eigenvalues are raised to it before whitening


Targets(
    settings={
        "gradient_lr": positive(
            4e-3, "Length of the wanted changes: η·d of UltraEdit's η and the number d of the map's inputs."
        ),
        "gradient_whiten": flag(
            False,
            "Whiten gradients by their running covariance, once there are more positions than dimensions, instead of "
            "only dividing them by their deviations (StableEdit).",
        ),
        "gradient_preheat": count(
            0, "Number of other facts (world-facts, not edited) that the running statistics begin with."
        ),
    },
    # The step is wide and the blocks are high up; the key covariance there has no eigenvalue below the threshold.
    presets={
        "smollm2-135m": {"layers": (24, 25, 26, 27, 28), "gradient_lr": 1.0, "ridge": 1.0, "null_space": False},
    },
    check=all_at_once,
    # Down-projections of these blocks worked best in the demo's model; UltraEdit uses 29, 30 of 32 in Mistral-7B.
    first_layer=lambda depth: max(depth - 6, 0),
).register("gradient")


@dataclass(frozen=True)
class Seen:
    """Result of one pass, by fact and by token: ``p`` positions in all.

    Attributes:
        nll: ``[facts]`` fp32, mean negative log-likelihood of a target token, in nats.
        keys: ``{layer: [p, d]}`` fp32, inputs of the edited maps.
        gradients: ``{layer: [p, n]}`` fp32, gradients of the sum of ``nll`` with respect to the maps' outputs.
    """

    nll: Tensor
    keys: dict[int, Tensor]
    gradients: dict[int, Tensor]


def look_back(
    model: Any,
    structure: ModelStructure,
    rows: Sequence[Row],
    layers: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> Seen:
    """Run one forward and backward pass of whole rows through the model itself.

    Args:
        model: causal LM in evaluation mode without parameter gradients (see `sphere_edit.model.inference.frozen`).
        rows: each with a target.
        layers: the edited blocks.
        progress: called with (rows done, rows).
    """
    maps, device = [structure.edited[layer] for layer in layers], structure.device
    counts = [len(row.target) for row in rows]
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    nll = torch.zeros(len(rows), dtype=torch.float32, device=device)
    keys = {m.layer: torch.zeros(starts[-1], m.weight.shape[1], dtype=torch.float32, device=device) for m in maps}
    gradients = {m.layer: torch.zeros(starts[-1], m.weight.shape[0], dtype=torch.float32, device=device) for m in maps}
    done = 0
    for part in alike([len(row.ids) for row in rows]):
        chosen = [rows[i] for i in part]
        inputs = pad_left([row.ids for row in chosen], device)
        shape, longest = inputs["input_ids"].shape, max(counts[i] for i in part)
        places = [(at, k - len(row.target)) for at, row in enumerate(chosen) for k in range(len(row.target))]
        at, back = (torch.tensor(x, device=device) for x in zip(*places, strict=True))
        want = torch.tensor([token for row in chosen for token in row.target], device=device)
        share = torch.tensor([1 / len(row.target) for row in chosen], dtype=torch.float32, device=device)[at]
        with torch.enable_grad(), _Probes([m.module for m in maps]) as probes, compact_head(model):
            logits = model(**inputs, use_cache=False, **last_logits(model, longest)).logits[at, back]
            each = -logits.float().log_softmax(-1).gather(1, want[:, None])[:, 0] * share
            found = torch.autograd.grad(each.sum(), [probes.added[m.module] for m in maps])
        nll[part] = torch.zeros(len(part), dtype=torch.float32, device=device).index_add(0, at, each.detach())
        to = [place for i in part for place in range(starts[i], starts[i + 1])]
        for m, gradient in zip(maps, found, strict=True):  # OPT flattens rows and tokens before its MLP
            keys[m.layer][to] = probes.inputs[m.module].reshape(*shape, -1)[at, back].float()
            gradients[m.layer][to] = gradient.reshape(*shape, -1)[at, back].float()
        done += len(part)
        if progress is not None:
            progress(done, len(rows))
    return Seen(nll, keys, gradients)


class _Probes:
    """Inside the context, add to each module's output a zero that has a gradient; it is added before other hooks run,
    like the output of the weight."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self.inputs: dict[nn.Module, Tensor] = {}
        self.added: dict[nn.Module, Tensor] = {}

    def __enter__(self) -> _Probes:
        self._handles = [module.register_forward_hook(self._hook, prepend=True) for module in self._modules]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        self.inputs[module] = args[0].detach()
        self.added[module] = torch.zeros_like(out, requires_grad=True)
        return out + self.added[module]


@dataclass(frozen=True)
class Moments:
    """Count, mean and squared deviations of all ``z = [h; g]`` so far, fp64; merged batch by batch, never changed.

    Attributes:
        count: positions.
        mean: ``[d + n]``.
        squares: ``[d + n]``, sums of squared deviations from the mean.
        products: ``[n, n]``, sums of products of the deviations of g, or None where whitening is off.
    """

    count: int
    mean: Tensor
    squares: Tensor
    products: Tensor | None

    @classmethod
    def none(cls, weight: Tensor, whiten: bool) -> Moments:
        """The empty statistics of a map ``weight [n, d]``."""
        n = len(weight)
        zero = torch.zeros(sum(weight.shape), dtype=torch.float64, device=weight.device)
        return cls(0, zero, zero.clone(), zero.new_zeros(n, n) if whiten else None)

    def merged(self, z: Tensor) -> Moments:
        """The statistics with the positions ``[p, d + n]`` of one batch added.

        Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm (1979): exact for any two parts.
        """
        z, total = z.double(), self.count + len(z)
        mean = z.mean(0)
        own, between = z - mean, mean - self.mean
        weight = self.count * len(z) / total
        products = self.products
        if products is not None:
            g, shift = own[:, -len(products) :], between[-len(products) :]
            products = products + g.T @ g + weight * torch.outer(shift, shift)
        squares = self.squares + own.square().sum(0) + weight * between.square()
        return Moments(total, self.mean + between * (len(z) / total), squares, products)

    def normalised(self, z: Tensor) -> Tensor:
        """``(z − mean) / deviation`` ``[p, d + n]`` fp64; 0 for a feature that does not vary (yet)."""
        deviation = (self.squares / max(self.count - 1, 1)).sqrt()
        varies = deviation > _CONSTANT * self.mean.abs()
        return torch.where(varies, (z.double() - self.mean) / deviation, 0.0)

    def whitened(self, g: Tensor) -> Tensor | None:
        """``Σ^(−½) (g − mean)`` ``[p, n]`` fp64; None while there are not more positions than dimensions."""
        n = g.shape[1]
        if self.products is None or self.count <= n + 1:
            return None
        values, vectors = torch.linalg.eigh(self.products / (self.count - n - 1))
        floor = _FLOOR * values.mean()
        if floor <= 0:
            return None
        centred = (g.double() - self.mean[-n:]) @ vectors
        return (centred * values.clamp_min(floor).rsqrt()) @ vectors.T


class Lifelong:
    """The statistics of every edited map, kept or forgotten batch by batch; they give a batch's wanted changes.

    Args:
        weights: ``{layer: [n, d]}`` of the edited maps; empty where targets do not come from gradients.
        config: ``gradient_lr`` and ``gradient_whiten``.
    """

    def __init__(self, weights: Mapping[int, Tensor], config: EditConfig) -> None:
        self._config = config
        self._moments = {layer: Moments.none(weight, config.gradient_whiten) for layer, weight in weights.items()}
        self._next: dict[int, Moments] = {}
        self._gradients: dict[int, Tensor] = {}

    def follows(self, layer: int) -> bool:
        """Whether the layer has statistics."""
        return layer in self._moments

    def see(self, layer: int, keys: Tensor, gradients: Tensor) -> None:
        """Take the positions of the next batch: ``keys [p, d]`` and ``gradients [p, n]``, fp32."""
        self._next[layer] = self._moments[layer].merged(torch.cat([keys, gradients], 1))
        self._gradients[layer] = gradients

    def seen(self, layer: int) -> Tensor | None:
        """The gradients of the batch since the last `commit`, if any."""
        return self._gradients.get(layer)

    def residuals(self, layer: int, keys: Tensor) -> Tensor:
        """The wanted changes ``v = −η ‖ĥ‖² ĝ`` ``[p, n]`` fp32 of the batch that `see` took, ``η = gradient_lr / d``.

        ĥ and ĝ are key and gradient, normalised by the statistics with this batch; with ``gradient_whiten`` ĝ is
        whitened once there are more positions than dimensions. The very first position asks for nothing.

        Source: Gu et al., UltraEdit (arXiv 2505.14679), whose code has one set of statistics for all
            maps of a shape. Whitening and clamped eigenvalues: StableEdit (arXiv 2605.11836), whose clamp is 1e-6 at
            any scale of the gradients; ours is a share of the eigenvalues' mean.
        """
        moments, gradients, d = self._next[layer], self._gradients[layer], keys.shape[1]
        z = moments.normalised(torch.cat([keys, gradients], 1))
        toward = moments.whitened(gradients)
        toward = z[:, d:] if toward is None else toward
        return (-self._config.gradient_lr / d * z[:, :d].square().sum(1, keepdim=True) * toward).float()

    def commit(self) -> None:
        """Keep the batch in the statistics: it has been written."""
        self._moments |= self._next
        self.rollback()

    def rollback(self) -> None:
        """Forget the batch: it was not written."""
        self._next, self._gradients = {}, {}

    def state_dict(self) -> dict[str, Tensor]:
        """The statistics, by reference."""
        found: dict[str, Tensor] = {}
        for layer, m in self._moments.items():
            parts = {"count": torch.tensor(m.count), "mean": m.mean, "squares": m.squares}
            found |= add_prefix(layer, parts if m.products is None else parts | {"products": m.products})
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`; raise ValueError for one of other maps, before anything changes."""
        own = self.state_dict()
        kinds = [{name: list(value.shape) for name, value in sorted(s.items())} for s in (own, state)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"statistics of gradients: expected {kinds[0]}, got {kinds[1]}")
        for layer, m in list(self._moments.items()):
            parts = {name: value.to(m.mean.device) for name, value in strip_prefix(layer, state).items()}
            count = int(parts["count"])
            self._moments[layer] = replace(
                m, count=count, mean=parts["mean"], squares=parts["squares"], products=parts.get("products")
            )
        self.rollback()
