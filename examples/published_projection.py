"""SPHERE's published projection, written out in plain torch and by its drop-in replacement.

Run: python examples/published_projection.py
"""

import time

import torch

from sphere_kernels.published import sparse_projection


def published(weight: torch.Tensor, update: torch.Tensor, eta: float, alpha: float) -> torch.Tensor:
    """The formula of the paper (arXiv 2510.01172) with its d × d matrices: ``update (I - alpha U Uᵀ)``."""
    unit = weight / (weight.norm(dim=1, keepdim=True) + 1e-8)
    eigenvalues, eigenvectors = torch.linalg.eigh(unit.T @ unit / len(unit))  # d × d, ascending
    share = eigenvalues.flip(0).cumsum(0) / eigenvalues.sum()
    rank = int((share <= eta).sum()) + 1
    U = eigenvectors[:, -rank:]  # the fewest directions with more than the share eta of the energy
    projector = torch.eye(weight.shape[1], dtype=weight.dtype) - alpha * U @ U.T
    return update @ projector


torch.manual_seed(0)
n, d = 288, 1536  # half the rows of SmolLM2's down-projection
weight = torch.randn(n, d) * torch.logspace(0, -1, d)
update = torch.randn(n, d)

start = time.perf_counter()
by_formula = published(weight, update, eta=0.5, alpha=0.5)
middle = time.perf_counter()
B_proj, P_soft, U = sparse_projection(weight, update, eta=0.5, alpha=0.5)  # the same names and order as there
end = time.perf_counter()

exact = published(weight.double(), update.double(), eta=0.5, alpha=0.5)
print(f"directions: {U.shape[1]} of {d}")
for name, found, seconds in (("formula", by_formula, middle - start), ("drop-in", B_proj, end - middle)):
    error = float((found - exact).norm() / exact.norm())
    print(f"{name}: {1e3 * seconds:7.1f} ms, error {error:.1e} against fp64")
