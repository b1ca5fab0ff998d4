"""Kernels for hyperspherical energy, Gram matrices, principal directions and sparse projection; needs torch only."""

from sphere_kernels._backends import operations as _operations  # noqa: F401  (fills the registry)
from sphere_kernels.directions import PrincipalDirections, principal_directions
from sphere_kernels.energy import hyperspherical_energy, orthogonal_energy
from sphere_kernels.gram import gram, gram_energy, gram_update_energy_
from sphere_kernels.projection import LowRankUpdate, apply_projected_update_, sparse_projection

__version__ = "0.2.0"

__all__ = [
    "LowRankUpdate",
    "PrincipalDirections",
    "__version__",
    "apply_projected_update_",
    "gram",
    "gram_energy",
    "gram_update_energy_",
    "hyperspherical_energy",
    "orthogonal_energy",
    "principal_directions",
    "sparse_projection",
]
