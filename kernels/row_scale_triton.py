"""Triton form of `row_scale`: one launch, y * (1 + s) formed in fp32, in place or into a new tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from perfbench.kernels.launch import check, check_own, check_stack, requests_of, tile
from perfbench.kernels.low_rank_triton import own_adapter
from perfbench.kernels.settings import setting


@triton.jit
def _scale(y, scale_minus_one, own, out, M, D, STRIDE, OWN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    place = row * D + columns
    value = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
    adapter = own_adapter(own, row, M, OWN)
    value = scale_values(value, scale_minus_one, adapter, columns, inside, STRIDE, 0, D)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


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
    _launch(y, scale_minus_one, None, y)


def scaled_rows(x: torch.Tensor, scale_minus_one: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
    """As `row_scale.scaled_rows`, -1 in `own` being no adapter. ValueError as `scale_rows`."""
    check("x", x, tuple(x.shape), x)
    check_stack("scale_minus_one", scale_minus_one, (len(scale_minus_one), x.shape[1]), x)
    check_own(own, x)
    out = torch.empty_like(x)
    _launch(x, scale_minus_one, own, out)
    return out


def _launch(y: torch.Tensor, scale_minus_one: torch.Tensor, own: torch.Tensor | None, out: torch.Tensor) -> None:
    columns = y.shape[-1]
    rows = y.numel() // columns
    chosen = setting("row_scale", y.device)
    block = tile(columns, chosen["BLOCK"])
    _scale[(rows, triton.cdiv(columns, block))](
        y, scale_minus_one, y if own is None else own, out,
        rows // requests_of(len(scale_minus_one), own, rows), columns, scale_minus_one.stride(0),
        OWN=own is not None, BLOCK=block, num_warps=chosen["num_warps"],
    )  # fmt: skip
