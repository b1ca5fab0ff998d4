"""The ``SPHERE_*`` environment variables: every one is declared, documented and read here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, the value that an unset one stands for, and what it does."""

    name: str
    default: str
    meaning: str

    @property
    def value(self) -> str:
        """The value in force now; unset and empty both mean the default."""
        return os.environ.get(self.name) or self.default


KERNELS_IMPL = Variable(
    "SPHERE_KERNELS_IMPL",
    "auto",
    'The implementation that impl="auto" stands for: auto, reference, native, triton or cuda. '
    "Like an explicit argument, it raises where the named one cannot run.",
)
KERNELS_ISA = Variable(
    "SPHERE_KERNELS_ISA",
    "auto",
    "The instruction set of the native kernels: auto (the fastest that this machine can run), scalar, avx2 or avx512. "
    "One that the machine lacks is refused.",
)
KERNELS_DOT = Variable(
    "SPHERE_KERNELS_DOT",
    "auto",
    "How the Triton and CUDA kernels multiply fp32 operands: ieee (fp32 throughout), tf32x3 (three tensor-core "
    "products, errors near fp32's), tf32 (one, operands rounded to 11 bits) or auto: tf32x3 on NVIDIA GPUs, ieee "
    "elsewhere. One that the GPU lacks is refused. 16-bit and fp64 operands are multiplied as they are.",
)
EDIT_CACHE = Variable(
    "SPHERE_EDIT_CACHE",
    "~/.cache/sphere-edit",
    "Folder for what the editing loop makes once per model: the converted demo model, covariances of keys.",
)
EDIT_DATA = Variable(
    "SPHERE_EDIT_DATA",
    "",
    "Folder with published data sets, for sphere-edit harness and the tests that read some; "
    "empty: those tests are skipped.",
)
VARIABLES = (KERNELS_IMPL, KERNELS_ISA, KERNELS_DOT, EDIT_CACHE, EDIT_DATA)


def kernels_impl() -> str:
    """The implementation that ``impl="auto"`` stands for."""
    return KERNELS_IMPL.value


def kernels_isa() -> str:
    """The instruction set of the native kernels, or ``"auto"``."""
    return KERNELS_ISA.value


def kernels_dot() -> str:
    """How the Triton kernels multiply fp32 operands, or ``"auto"``."""
    return KERNELS_DOT.value


def edit_cache() -> Path:
    """The folder for artefacts computed once per model (it may not exist yet)."""
    return Path(EDIT_CACHE.value).expanduser()


def edit_data() -> Path | None:
    """The folder of published data sets, if one is named."""
    return Path(EDIT_DATA.value).expanduser() if EDIT_DATA.value else None


def table() -> list[dict[str, str]]:
    """All variables as rows of ``name``, ``value`` (in force now), ``default`` and ``meaning``."""
    return [{"name": v.name, "value": v.value, "default": v.default, "meaning": v.meaning} for v in VARIABLES]
