"""Gram matrices of weights: their energies, and keeping them current under low-rank updates."""

from sphere_kernels.gram.api import gram, gram_energy, gram_update_energy_

__all__ = ["gram", "gram_energy", "gram_update_energy_"]
