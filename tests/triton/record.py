"""Every kind of launch that the operations make, recorded as if a GPU of one architecture were here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from aot import Launch, recorded

from sphere_kernels._backends import gpu
from sphere_kernels._backends.triton import configs, pair_sums
from sphere_kernels._backends.triton import launch as launching
from sphere_kernels._products.triton import TRITON
from sphere_kernels.energy import triton as energy
from sphere_kernels.gram import triton as grams
from sphere_kernels.projection import triton as projection

PRECISIONS = {"sm_80": gpu.PRECISIONS, "sm_90": gpu.PRECISIONS, "sm_100": gpu.PRECISIONS, "gfx942": ("ieee", "tf32")}
SIZES = (96, configs.MEDIUM + 128)  # rows, of the table's classes but the smallest
PLAIN = (1.0, "euclidean", False)
GENERAL = (1.5, "angular", True)  # holds the code of the other variants


@contextlib.contextmanager
def recording(monkeypatch, arch: str, precision: str) -> Iterator[dict[Launch, None]]:
    """Launches on CPU tensors are noted and not run."""
    seen: dict[Launch, None] = {}

    def note(kernel, programs, config, like, **arguments):
        if programs:
            seen[recorded(kernel, arguments, config)] = None

    with monkeypatch.context() as patch:
        patch.setenv("SPHERE_KERNELS_DOT", precision)
        patch.setattr(gpu, "architecture", lambda device: arch)
        patch.setattr(energy, "GROUP", 1 << 20)  # its parts differ in what 16 divides only
        for module in (launching, pair_sums, energy, grams):
            patch.setattr(module, "launch", note)
        yield seen


def launches(monkeypatch, arch: str) -> list[Launch]:
    """What the operations launch on one architecture: each kernel with each configuration that is shipped for it."""
    found: dict[Launch, None] = {}
    for precision in ("auto", *PRECISIONS[arch]):
        with recording(monkeypatch, arch, precision) as seen:
            for n in SIZES:
                weight = torch.zeros(n, n)
                energies(weight, PLAIN)
                energy.pair_energy(weight, *GENERAL)
                energy.pair_energy_backward(weight[:, 0], weight, *GENERAL)
                grams.gram(weight, False)
                TRITON.matmul(weight, weight)
        found |= seen
    with recording(monkeypatch, arch, "auto") as seen:
        energies(torch.zeros(96, 96), GENERAL)
        for dtype, variant in ((torch.float32, PLAIN), (torch.bfloat16, PLAIN), (torch.float64, GENERAL)):
            for n in SIZES:
                weight = torch.zeros(n, n, dtype=dtype)
                energies(weight, variant)
                for normalize in (True, False):
                    grams.gram(weight, normalize)
                projection.apply_projected_update_(weight, weight, weight, torch.zeros(n, n), 0.5)
                TRITON.matmul(weight, weight)
        TRITON.subtract_gram_(torch.zeros(96, 96), torch.zeros(96, 96))
        energy.pair_energy(torch.zeros(96, 96, dtype=torch.bfloat16), *GENERAL)
        energy.pair_energy_backward(torch.zeros(96), torch.zeros(96, 96, dtype=torch.bfloat16), *GENERAL)
        energy.pair_energy(torch.zeros(96, 96, dtype=torch.float16), *PLAIN)
        energies(torch.zeros(8, 32, 64), PLAIN)  # many small matrices
    return distinct(found | seen)


def distinct(found: dict[Launch, None]) -> list[Launch]:
    """Kernels without products once per variant: they know no configurations."""
    kept: dict[object, Launch] = {}
    for launch in found:
        constants = dict(launch.constants)
        plain = "PRECISION" not in constants
        variant = [constants.get(name) for name in ("ANGULAR", "FROM_GRAM", "NORMALIZE", "ROUND")]
        kept.setdefault((launch.kernel, *variant) if plain else launch, launch)
    return list(kept.values())


def energies(weight: torch.Tensor, *variants: tuple[float, str, bool]) -> None:
    """Energies, gradients and Gram matrices in these variants."""
    for variant in variants:
        energy.pair_energy(weight, *variant)
        energy.pair_energy_backward(weight.new_zeros(weight.shape[:-1]), weight, *variant)
        if weight.dtype in (torch.float32, torch.float64):
            square = weight.new_zeros(*weight.shape[:-1], weight.shape[-2])
            factor, inner = square[..., :48], square[..., :48, :48]
            grams.gram_update_energy_(square, factor, factor, inner, weight, *variant)
            grams.gram_energy(square, weight, *variant)
