"""Hyperspherical energy and spectrum of every MLP down-projection of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sphere_edit.model.structure import check_weights_finite, find_structure
from sphere_kernels import hyperspherical_energy, orthogonal_energy, principal_directions


def layer_energies(
    model: Any, s: float = 1.0, energy_ratio: float = 0.5, progress: Callable[[int, int], None] | None = None
) -> list[dict[str, Any]]:
    """One record per block: ``layer``, ``name``, ``n``, ``d``, ``energy``, ``orthogonal`` (the energy of n orthogonal
    rows), ``excess``, ``rank`` at ``energy_ratio``, and the ``eigenvalues`` of ``ŴᵀŴ/n``, descending.

    Raises:
        StructureError: the model has no recognisable MLP down-projections, or a parameter holds NaN or Inf.
    """
    structure = find_structure(model)
    check_weights_finite(model)
    rows = []
    for i, down in enumerate(structure.down):
        weight = down.weight
        n, d = weight.shape
        directions = principal_directions(weight, energy_ratio)
        energy, orthogonal = float(hyperspherical_energy(weight, s)), orthogonal_energy(n, s)
        rows.append(
            {
                "layer": down.layer,
                "name": down.name,
                "n": n,
                "d": d,
                "energy": energy,
                "orthogonal": orthogonal,
                "excess": energy - orthogonal,
                "rank": int(directions.rank),
                "eigenvalues": directions.eigenvalues.tolist(),
            }
        )
        if progress is not None:
            progress(i + 1, len(structure.down))
    return rows
