"""Principal directions of weight matrices."""

from sphere_kernels.directions.api import principal_directions
from sphere_kernels.directions.types import PrincipalDirections

__all__ = ["PrincipalDirections", "principal_directions"]
