"""Triton form of `row_scale`: one launch, y * (1 + s) formed in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from perfbench.kernels.launch import check, check_stack, tile
from perfbench.kernels.settings import setting


@triton.jit
def _scale(y, scale_minus_one, M, D, STRIDE, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    place = y + row * D + columns
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    value = scale_values(value, scale_minus_one, row // M, columns, inside, STRIDE, 0, D)
    tl.store(place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def scale_values(values, scale_minus_one, adapter, columns, mask, STRIDE, FIRST, COLUMNS):
    """`values` [columns] of one row of a fused product, times 1 + s on the columns that the scales are for."""
    own = mask & (adapter >= 0) & (columns >= FIRST) & (columns < FIRST + COLUMNS)
    scale = tl.load(scale_minus_one + tl.maximum(adapter, 0) * STRIDE + columns - FIRST, mask=own, other=0.0)
    return values + values * scale.to(tl.float32)


def scale_rows(y: torch.Tensor, scale_minus_one: torch.Tensor) -> None:
    """As `row_scale.eager`. ValueError on inputs that do not fit each other or are not on a GPU."""
    groups, rows, columns = y.shape
    check_stack("scale_minus_one", scale_minus_one, (groups, columns), y)
    check("y", y, (groups, rows, columns), y)
    chosen = setting("row_scale", y.device)
    block = tile(columns, chosen["BLOCK"])
    _scale[(groups * rows, triton.cdiv(columns, block))](
        y, scale_minus_one, rows, columns, scale_minus_one.stride(0), BLOCK=block, num_warps=chosen["num_warps"]
    )
