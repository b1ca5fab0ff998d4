"""Effects of edits on a weight besides the energy: movement, spectrum, output change, and the theorem's bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sphere_edit.config import EditConfig
from sphere_edit.evaluation.metrics import finite
from sphere_edit.events import Event
from sphere_edit.updates import Update
from sphere_kernels import LowRankUpdate, hyperspherical_energy
from sphere_kernels._common.rows import EPSILON, row_chunks
from sphere_kernels.streaming import HypersphereState

_COLUMNS = 2048  # columns of a weight converted to fp64 at a time
_SINGULAR = 1e-6  # share of the largest singular value; smaller values cannot be told from 0


class Measures:
    """Measures the edited weights before the first batch and after every ``measure_every``-th batch.

    Args:
        config: ``measure_every`` and ``energy_s``.
        originals: ``{layer: [n, d]}``, the weights before all edits.
        covariances: ``{layer: E[k kᵀ]}`` ``[d, d]`` fp64, second moments of the keys of general text. A layer without
            one has no ``output_change``.

    A batch costs one product n×n×d and an eigenproblem of the smaller side in fp64, one product n×n×d in fp32, and
    O(b d²) for the outputs, or O(n d²) if the update is dense (RECT): 0.1 s a layer at 576×1536 on one core. The
    covariances stay in memory for the outputs, 8 d² bytes a layer: 1.6 GB at d = 14336; none with ``measure_every`` 0.
    All figures follow from three weights: before all edits, before the batch and after it. So a resumed run reports the
    same figures.
    """

    def __init__(self, config: EditConfig, originals: Mapping[int, Tensor], covariances: Mapping[int, Tensor]) -> None:
        self._every, self._bounded = config.measure_every, config.energy_s == 1
        self._originals = originals
        self._covariances = covariances if self._every else {}
        self._outputs = {layer: output_square(originals[layer], c) for layer, c in self._covariances.items()}

    def of_weight(self, layer: int, weight: Tensor, batch: int) -> Event:
        """`spectrum` of a weight, and the movement of the neurons since before all edits.

        Returns:
            Empty for a batch that is not measured; else ``neurons`` (n), ``moved_mean`` and ``moved_max`` of
            ``‖ŵ_i − ŵ_i⁰‖``, and the fields of `spectrum`.
        """
        if not self._every or batch % self._every:
            return {}
        moved = movement(weight, self._originals[layer])
        ends = {"moved_mean": float(moved.mean()), "moved_max": float(moved.max())}
        return {"neurons": len(weight), **ends, **spectrum(weight)}

    def of_batch(
        self, layer: int, batch: int, before: Mapping[str, Tensor], state: HypersphereState, update: Update
    ) -> Event:
        """`of_weight`, and the effect of the batch beside the theorem's bound.

        The lemma bounds the change of HE by ``K ‖ΔŴ‖_F`` to first order, see `lipschitz`. If keys were uncorrelated
        with variance 1, ``‖ΔŴ‖_F²`` would be the expected squared change of ``Ŵ k``, and therefore at least
        ``(ΔHE / K)²``: this is the theorem. The theorem says nothing about real keys or about ``W`` itself;
        ``output_change`` measures these.

        Args:
            before: ``state``'s `state_dict` before the batch.
            update: the update that was added to the weight.

        Returns:
            The fields of `of_weight`, and: ``step_squared``, ``‖ΔŴ‖_F²`` of the batch; ``output_change``, the expected
            squared change of the layer's output on general text, ``tr(ΔW Cov ΔWᵀ)``, as a share of
            ``tr(W⁰ Cov W⁰ᵀ)``; for s = 1 also ``energy_step`` (ΔHE), ``lipschitz`` (K of the weight before the batch)
            and ``bound``, ``(ΔHE / K)²``. A figure that is not finite is None.

        Source: SPHERE, arXiv 2510.01172.
        """
        found = self.of_weight(layer, state.master, batch)
        if not found:
            return {}
        found["step_squared"] = float(movement(state.master, before["master"]).square().sum())
        if layer in self._covariances:
            found["output_change"] = _ratio(output_square(update, self._covariances[layer]), self._outputs[layer])
        if self._bounded:
            step = float(state.energy - before["neuron_energy"].sum())
            constant = lipschitz(before["master"])
            found |= {"energy_step": step, "lipschitz": constant, "bound": _ratio(step, constant) ** 2}
        return {name: finite(value) for name, value in found.items()}


def movement(weight: Tensor, other: Tensor) -> Tensor:
    """Distance on the sphere between the neurons of two weights ``[n, d]``, ``‖ŵ_i − v̂_i‖``: fp64 ``[n]``, 0 to 2."""
    return torch.cat([(_unit(weight[i]) - _unit(other[i])).norm(dim=1) for i in row_chunks(*weight.shape)])


def spectrum(weight: Tensor) -> dict[str, Any]:
    """Rank, norm and condition of a weight ``[n, d]``.

    Returns:
        ``weight_rank``: number of singular values above ``max(n, d)`` eps of fp32 times the largest.
        ``spectral_norm``: the largest. ``condition``: the largest over the smallest of all ``min(n, d)``; None if the
        smallest is not above 1e-6 of the largest.

    Numerics:
        Computed from the Gram matrix of the smaller side in fp64. Squaring leaves a singular value σ with a relative
        error of about ``eps (σ₁/σ)²``: 2e-4 measured at 1e-6 σ₁ of 576×1536. An fp32 Gram matrix could not resolve
        values below 1e-3 σ₁.
    """
    weight = weight.detach()
    side = weight if weight.shape[0] <= weight.shape[1] else weight.T
    gram = side.new_zeros(len(side), len(side), dtype=torch.float64)
    for columns in side.split(_COLUMNS, dim=1):
        part = columns.double()
        gram.addmm_(part, part.T)
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    smallest, largest = float(values[0]), float(values[-1])
    floor = max(weight.shape) * torch.finfo(torch.float32).eps * largest
    return {
        "weight_rank": int((values > floor).sum()),
        "spectral_norm": largest,
        "condition": largest / smallest if smallest > _SINGULAR * largest else None,
    }


def lipschitz(weight: Tensor) -> float:
    """``K = 4 (Σ_k (Σ_{j≠k} ‖ŵ_k − ŵ_j‖⁻³)²)^{1/2}`` of a weight ``[n, d]``: ``|ΔHE_1| ≤ K ‖ΔŴ‖_F`` to first order.

    The gradient of HE_1 for ``ŵ_k`` is ``−2 Σ_{j≠k} (ŵ_k − ŵ_j) / ‖ŵ_k − ŵ_j‖³``, with 2 for the two ordered pairs, and
    no distance is above 2. So K is four times the norm of the per-neuron energies of s = 3. The bound is loose, since
    the differences mostly cancel in the sum. Two equal neurons count at distance 1e-6.
    """
    return 4 * float(hyperspherical_energy(weight.detach(), 3.0, reduction="none").norm())


def output_square(update: Update, covariance: Tensor) -> float:
    """``E‖Δ k‖² = tr(Δ Cov Δᵀ)`` of a matrix ``[n, d]`` or its factors, for ``Cov = E[k kᵀ]`` ``[d, d]`` fp64."""
    if isinstance(update, LowRankUpdate):
        left, right = update.left.double(), update.right.double()
        return float(((right @ covariance @ right.T) * (left.T @ left)).sum().clamp_min(0))
    total = covariance.new_zeros(())
    for chunk in row_chunks(*update.shape):
        rows = update[chunk].detach().double()
        total += ((rows @ covariance) * rows).sum()
    return float(total.clamp_min(0))


def cosines(weight: Tensor, neurons: Tensor) -> tuple[Tensor, float]:
    """Cosines between the chosen neurons of a weight ``[n, d]``, and the mean ``|cosine|`` of all pairs of neurons.

    Args:
        neurons: ``[m]`` int64, rows of the chosen neurons.

    Returns:
        ``[m, m]`` fp64, and the mean: fp32 products summed in fp64; NaN if n is 1.
    """
    n, d = weight.shape
    unit = torch.cat([_unit(weight[i]).float() for i in row_chunks(n, d)])
    total = torch.zeros((), dtype=torch.float64, device=unit.device)
    for chunk in row_chunks(n, n):
        products = unit[chunk] @ unit.T
        products.diagonal(chunk.start).zero_()
        total += products.abs().sum(dtype=torch.float64)
    chosen = _unit(weight[neurons])
    return chosen @ chosen.T, _ratio(float(total), n * (n - 1))


def _unit(rows: Tensor) -> Tensor:
    rows = rows.detach().double()
    return rows / (rows.norm(dim=1, keepdim=True) + EPSILON)


def _ratio(value: float, whole: float) -> float:
    return value / whole if whole else math.nan
