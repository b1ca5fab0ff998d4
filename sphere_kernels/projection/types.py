"""The low-rank form of an editor's update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_kernels._common import checks


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """An update ``left @ right`` kept as its factors.

    Attributes:
        left: ``[..., n, b]``, residuals.
        right: ``[..., b, d]``, same leading dimensions and device; the dtype may differ.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        checks.matrix("left", self.left)
        checks.matrix("right", self.right)
        expected = [*self.left.shape[:-2], self.left.shape[-1]]
        if list(self.right.shape[:-1]) != expected:
            raise ValueError(
                f"right must have shape {[*expected, 'd']} to follow left {list(self.left.shape)}, "
                f"got {list(self.right.shape)}"
            )
        checks.same_device("right", self.right, "left", self.left)

    @property
    def shape(self) -> torch.Size:
        """Shape of the update, ``[..., n, d]``."""
        return torch.Size((*self.left.shape[:-1], self.right.shape[-1]))

    def dense(self) -> Tensor:
        """The update ``[..., n, d]``, in the wider dtype of the factors."""
        dtype = torch.promote_types(self.left.dtype, self.right.dtype)
        return self.left.to(dtype) @ self.right.to(dtype)
