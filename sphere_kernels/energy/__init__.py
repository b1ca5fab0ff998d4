"""Hyperspherical energy of weight matrices."""

from sphere_kernels.energy.api import hyperspherical_energy, orthogonal_energy

__all__ = ["hyperspherical_energy", "orthogonal_energy"]
