"""Gram matrices of weights, and keeping them current under low-rank updates."""

from sphere_kernels.gram.api import gram, gram_update_energy_

__all__ = ["gram", "gram_update_energy_"]
