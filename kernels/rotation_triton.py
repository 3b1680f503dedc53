"""Triton form of `rotation`: one launch out of place, and what the fused kernels share of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from perfbench.kernels.launch import check, check_stack, tile
from perfbench.kernels.low_rank_triton import expand_columns, own_adapter
from perfbench.kernels.row_scale_triton import scale_values
from perfbench.kernels.settings import setting


@triton.jit
def _rotate(
    y, scale_minus_one, sine, out, M, D, SCALE_STRIDE, SINE_STRIDE,
    SCALED: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < D
    adapter = row // M
    value = tl.load(y + row * D + columns, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(y + row * D + partner_of(columns, 0, HALF), mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        value = scale_values(value, scale_minus_one, adapter, columns, mask, SCALE_STRIDE, 0, D)
    value = turn_values(value, other, sine, adapter, columns, mask, SINE_STRIDE, 0, D)
    tl.store(out + row * D + columns, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def partner_of(columns, FIRST, HALF):
    """The column that each of `columns` is paired with; the groups of 2 x HALF begin at FIRST."""
    return tl.where((columns - FIRST) // HALF % 2 == 0, columns + HALF, columns - HALF)


@triton.jit
def turn_values(values, others, sine, adapter, columns, mask, STRIDE, FIRST, COLUMNS):
    """`values` [columns] of one row of a fused product, plus their partners times the sines of the row's adapter."""
    own = mask & (adapter >= 0) & (columns >= FIRST) & (columns < FIRST + COLUMNS)
    turned = tl.load(sine + tl.maximum(adapter, 0) * STRIDE + columns - FIRST, mask=own, other=0.0)
    return values + others * turned.to(tl.float32)


@triton.jit
def turn_row(
    values, product, h, own, modules, sine, sine_own, row, begin, columns, mask,
    H_SPLIT, H_ROW, M, STRIDE, FIRST, COLUMNS, SINE_M, ROW,
    SPLITS: tl.constexpr, OWN: tl.constexpr, SINE_OWN: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, FAR_R: tl.constexpr,
):  # fmt: skip
    """`values` [BLOCK] of one row of the fused product, at `columns` from `begin` on, already scaled, turned: the
    partners are read from the product, and what the low-rank pairs add to them is added again."""
    inside = mask & (columns >= FIRST) & (columns < FIRST + COLUMNS)
    pairs = partner_of(columns, FIRST, HALF)
    others = tl.load(product + row * ROW + pairs, mask=inside, other=0.0).to(tl.float32)
    if len(modules) > 0:
        adapter = own_adapter(own, row, M, OWN)
        ranks = h + row * H_ROW
        others = expand_columns(
            others, ranks, modules, adapter, begin - HALF, pairs, inside, H_SPLIT, 0, SPLITS, BLOCK + 2 * HALF, FAR_R, 1
        )  # fmt: skip
    adapter = own_adapter(sine_own, row, SINE_M, SINE_OWN)
    return turn_values(values, others, sine, adapter, columns, mask, STRIDE, FIRST, COLUMNS)


def rotate(y: torch.Tensor, scale_minus_one: torch.Tensor | None, sine: torch.Tensor, half: int) -> torch.Tensor:
    """As `rotation.eager`. ValueError on inputs that do not fit each other or are not on a GPU."""
    groups, rows, columns = y.shape
    check("y", y, (groups, rows, columns), y)
    check_stack("sine", sine, (groups, columns), y)
    if scale_minus_one is not None:
        check_stack("scale_minus_one", scale_minus_one, (groups, columns), y)
    if columns % (2 * half):
        raise ValueError(f"half: expected groups of 2 x half that divide {columns} columns, got {half}")
    out = torch.empty_like(y)
    chosen = setting("rotation", y.device)
    block = tile(columns, chosen["BLOCK"])
    scales = sine if scale_minus_one is None else scale_minus_one
    _rotate[(groups * rows, triton.cdiv(columns, block))](
        y, scales, sine, out, rows, columns, scales.stride(0), sine.stride(0),
        SCALED=scale_minus_one is not None, HALF=half, BLOCK=block, num_warps=chosen["num_warps"],
    )  # fmt: skip
    return out
