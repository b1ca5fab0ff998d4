"""Matrices that take low-rank updates by the thousand, at the cost of the low rank."""

from sphere_kernels.streaming.hypersphere import HypersphereState
from sphere_kernels.streaming.least_squares import FactoredCovariance, IllConditioned, NullSpace, RecursiveLeastSquares

__all__ = ["FactoredCovariance", "HypersphereState", "IllConditioned", "NullSpace", "RecursiveLeastSquares"]
