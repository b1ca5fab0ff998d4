"""Launching: what depends on the device, the dtype and the sizes; tensors here are ``[batch, rows, cols]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from sphere_kernels._backends import gpu
from sphere_kernels._backends.triton import configs
from sphere_kernels._backends.triton.common import NORM, SCALE
from sphere_kernels._backends.triton.configs import Config
from sphere_kernels._backends.triton.gram import gram_kernel
from sphere_kernels._backends.triton.product import product_kernel
from sphere_kernels._backends.triton.rows import rows_pack_kernel
from sphere_kernels._backends.triton.schedule import triangle
from sphere_kernels._common.rows import compute_dtype

HALF = (torch.bfloat16, torch.float16)
FP16_SHIFT = 8  # rows of norm 256: what fp16 then loses to its smallest number is below fp32's rounding
ALIGNED = 16  # elements; rows that are multiples of it are read in vectors
WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}


def launch(kernel: Any, programs: int, config: Config, like: Tensor, **arguments: Any) -> None:
    """Run a kernel in so many programs on the device of a tensor."""
    if not programs:
        return
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if config.registers and gpu.architecture(like.device).startswith("sm_"):
        options["maxnreg"] = config.registers
    with gpu.on(like):
        kernel[(programs,)](**arguments, **options)


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Plan:
    """How matrices of one dtype are multiplied on one device.

    Attributes:
        arch: see `sphere_kernels._backends.gpu.architecture`.
        operands: their column of the table of configurations.
        dtype: of sums and inner products, fp32 or fp64.
    """

    arch: str
    operands: str
    dtype: torch.dtype

    @classmethod
    def of(cls, device: torch.device, *dtypes: torch.dtype) -> Plan:
        """For operands of these dtypes; 16-bit ones are multiplied as they are if all have one dtype."""
        arch = gpu.architecture(device)
        asked = gpu.precision(arch)
        if torch.float64 in dtypes:
            return cls(arch, "double", torch.float64)
        half = len(set(dtypes)) == 1 and dtypes[0] in HALF
        return cls(arch, "half" if half else asked, torch.float32)

    def precision(self, kind: str) -> str:
        """How blocks are multiplied in a kernel of this kind."""
        if self.operands not in gpu.PRECISIONS or (kind == "general slopes" and self.operands == "tf32x3"):
            return "ieee"  # the latter for lack of registers: fp64 slopes take what three products would
        return self.operands

    def config(self, kind: str, n: int) -> Config:
        """The shipped configuration of a kind of kernel for n rows."""
        return configs.find(self.arch, kind, self.operands, n)


@dataclass(frozen=True)
class Packed:
    """Rows ready for products of their own, see `rows_pack_kernel`.

    Attributes:
        rows: ``[batch, n, width]``.
        row_data: ``[3, batch, n]`` fp64: norms, deficits ``1 - |unit row|^2``, scales that make unit rows of the packed
            ones; without normalisation, what a pointer needs.
        plan: how they are multiplied.
    """

    rows: Tensor
    row_data: Tensor
    plan: Plan

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype, normalize: bool) -> Packed:
        """Rows of a weight (`gpu.merged`) that was given in ``dtype``; itself where nothing has to be done."""
        batch, n, d = weight.shape
        plan = Plan.of(weight.device, dtype)
        if not normalize and plan.operands != "tf32" and _ready(weight):
            return cls(weight, weight.new_empty(1, dtype=torch.float64), plan)
        width = max(1, cdiv(d, ALIGNED)) * ALIGNED
        packed = weight.new_empty(batch, n, width)
        row_data = weight.new_empty(3, batch, n, dtype=torch.float64)
        launch(
            rows_pack_kernel,
            cdiv(batch * n, configs.ROWS.block),
            configs.ROWS,
            weight,
            p_weight=weight,
            p_packed=packed,
            p_row_data=row_data,
            total=batch * n,
            n=n,
            d=d,
            width=width,
            stride_matrix=weight.stride(0),
            stride_row=weight.stride(1),
            stride_col=weight.stride(2),
            NORMALIZE=normalize,
            SHIFT=FP16_SHIFT if dtype == torch.float16 else 0,
            ROUND=plan.operands == "tf32",
            BR=configs.ROWS.block,
            BK=configs.ROWS.depth,
        )
        return cls(packed, row_data, plan)

    @property
    def norm(self) -> Tensor:
        """``[batch, n]`` fp64."""
        return self.row_data[NORM.value]

    @property
    def scale(self) -> Tensor:
        """``[batch, n]`` fp64."""
        return self.row_data[SCALE.value]


def _ready(weight: Tensor) -> bool:
    _, n, d = weight.shape
    return weight.is_contiguous() and d > 0 and d % ALIGNED == 0 and weight.data_ptr() % 16 == 0


def symmetric_product(packed: Packed, out: Tensor, *, normalize: bool = False, subtract: bool = False) -> None:
    """``out = [out -] A A^T`` of packed rows, for ``out [batch, n, n]`` whose rows have no gaps between elements."""
    batch, n, width = packed.rows.shape
    config = packed.plan.config("gram", n)
    schedule = triangle(cdiv(n, config.block), out.device)
    launch(
        gram_kernel,
        batch * len(schedule),
        config,
        out,
        p_packed=packed.rows,
        p_row_data=packed.row_data,
        p_schedule=schedule,
        p_out=out,
        n=n,
        width=width,
        count=len(schedule),
        plane=batch * n,
        out_matrix=out.stride(0),
        out_row=out.stride(1),
        NORMALIZE=normalize,
        SUBTRACT=subtract,
        PRECISION=packed.plan.precision("gram"),
        WIDE=WIDE[packed.plan.dtype],
        BM=config.block,
        BK=config.depth,
    )


def gram(weight: Tensor, normalize: bool) -> Tensor:
    """Inner products of the rows of ``[..., n, d]`` or of its unit rows, ``[..., n, n]``."""
    rows = gpu.merged(weight)
    batch, n, _ = rows.shape
    out = rows.new_empty(batch, n, n, dtype=compute_dtype(weight))
    symmetric_product(Packed.of(rows, weight.dtype, normalize), out, normalize=normalize)
    return out.view(*weight.shape[:-1], n)


def product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    scale: Tensor | None = None,
    addend: Tensor | None = None,
    accumulate: bool = False,
    dtypes: tuple[torch.dtype, ...] = (),
) -> None:
    """``out = [out +] [addend +] left diag(scale) right``; the batch of any but out may be 1 where out's is not.

    ``dtypes``: those the operands were given in, where the interpreter widened them.
    """
    batch, rows, cols = out.shape
    depth = left.shape[-1]
    given = dtypes or (left.dtype, right.dtype)
    wide = [t.dtype for t in (out, addend) if t is not None]
    plan = Plan.of(out.device, *given) if torch.float64 not in wide else Plan.of(out.device, torch.float64)
    as_is = plan.operands == "half" and scale is None
    if plan.operands == "half" and not as_is:
        plan = Plan.of(out.device, torch.float32)
    left, right = left.expand(batch, -1, -1), right.expand(batch, -1, -1)
    addend = out if addend is None else addend.expand(batch, -1, -1)
    config = plan.config("product", configs.side(rows, cols))
    launch(
        product_kernel,
        batch * cdiv(rows, config.block) * cdiv(cols, config.block),
        config,
        out,
        p_a=left,
        p_b=right,
        p_scale=out if scale is None else scale,
        p_addend=addend,
        p_out=out,
        rows=rows,
        cols=cols,
        depth=depth,
        scale_matrix=0 if scale is None else scale.stride(0),
        a_matrix=left.stride(0),
        a_row=left.stride(1),
        a_col=left.stride(2),
        b_matrix=right.stride(0),
        b_row=right.stride(1),
        b_col=right.stride(2),
        addend_matrix=addend.stride(0),
        addend_row=addend.stride(1),
        addend_col=addend.stride(2),
        out_matrix=out.stride(0),
        out_row=out.stride(1),
        out_col=out.stride(2),
        SCALE=scale is not None,
        ADDEND=addend is not out,
        ACCUMULATE=accumulate,
        AS_IS=as_is,
        PRECISION=plan.precision("product"),
        WIDE=WIDE[plan.dtype],
        BM=config.block,
        BN=config.block,
        BK=config.depth,
    )
