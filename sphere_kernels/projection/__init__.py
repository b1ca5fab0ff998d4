"""Projection of updates away from principal directions."""

from sphere_kernels.projection.api import apply_projected_update_, sparse_projection
from sphere_kernels.projection.types import LowRankUpdate

__all__ = ["LowRankUpdate", "apply_projected_update_", "sparse_projection"]
