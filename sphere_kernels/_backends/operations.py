"""The table of operations and their implementations; importing it fills the registry."""

from __future__ import annotations

import torch

from sphere_kernels import dispatch
from sphere_kernels._backends import cuda, gpu, native
from sphere_kernels._common.checks import DTYPES, WIDE


def _everywhere(device_type: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    return None


SUPPORTS: dict[str, dispatch.Supports] = {
    "reference": _everywhere,
    "native": native.supports,
    "triton": gpu.supports,
    "cuda": cuda.supports,
}


def declare(
    op: str,
    package: str,
    impls: tuple[str, ...],
    *,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    derivative: str | None = None,
    **missing: str,
) -> None:
    """Declare an operation: for each of ``impls`` its function is named ``op`` and lies in the module ``package.impl``.

    Args:
        op: the operation's name.
        package: in ``sphere_kernels``; a module of it is imported when its implementation first runs.
        impls: names from `SUPPORTS`.
        dtypes, derivative, missing: see `sphere_kernels.dispatch.Operation`.
    """
    places = {impl: f"sphere_kernels.{package}.{impl}:{op}" for impl in impls}
    made = {impl: dispatch.Implementation(place, SUPPORTS[impl]) for impl, place in places.items()}
    dispatch.register(op, dispatch.Operation(made, dtypes, derivative, missing))


ALL = ("reference", "native", "triton", "cuda")
BUT_CUDA = ("reference", "native", "triton")
NO_BACKWARD = "the CUDA kernels have no backward pass; impl='triton' has"

declare("pair_energy", "energy", ALL, derivative="pair_energy_backward")
declare("pair_energy_backward", "energy", BUT_CUDA, cuda=NO_BACKWARD)
declare("gram", "gram", BUT_CUDA, derivative=dispatch.PLAIN)
declare("gram_energy", "gram", BUT_CUDA, dtypes=WIDE)
declare("gram_update_energy_", "gram", ALL, dtypes=WIDE)
declare("principal_directions", "directions", BUT_CUDA)
declare("sparse_projection", "projection", ALL, derivative="sparse_projection")
declare("apply_projected_update_", "projection", ALL)
declare("products", "_products", BUT_CUDA, dtypes=WIDE)  # matrix products: what directions and streaming build on
