"""Triton form of `row_scale`: one launch, y * (1 + s) formed in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from perfbench.kernels.launch import check, tile


@triton.jit
def _scale(y, scale_minus_one, M, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    place = y + row * D + columns
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_minus_one + (row // M) * D + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (value + value * scale).to(y.dtype.element_ty), mask=inside)


def scale_rows(y: torch.Tensor, scale_minus_one: torch.Tensor) -> None:
    """As `row_scale.eager`. ValueError on inputs that do not fit each other or are not on a GPU."""
    groups, rows, columns = y.shape
    check("scale_minus_one", scale_minus_one, (groups, columns), y)
    check("y", y, (groups, rows, columns), y)
    block = tile(columns, 1024)
    _scale[(groups * rows, triton.cdiv(columns, block))](y, scale_minus_one, rows, columns, BLOCK=block)
