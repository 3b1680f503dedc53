"""Triton form of `low_rank`: a split-K shrink into fp32 planes, and an expand that sums them in a fixed order.

No atomics: two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from perfbench.kernels.launch import INTERPRETED, check, tile

# One program reads this much of D_in; a decode step has too few rows to fill a GPU with less splitting.
SPLIT_COLUMNS = 1024


@triton.jit
def _shrink(
    x, a, planes, M, R, D_IN, G_M_R,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    rank_blocks = tl.cdiv(R, BLOCK_R)
    rows = (tl.program_id(1) // rank_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = (tl.program_id(1) % rank_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2).to(tl.int64)
    x_rows = x + group * M * D_IN + rows[:, None] * D_IN
    a_rows = a + group * R * D_IN + ranks[:, None] * D_IN
    sums = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(0, SPLIT_K, BLOCK_K):
        columns = split * SPLIT_K + start + tl.arange(0, BLOCK_K)
        inside = (columns < D_IN)[None, :]
        left = tl.load(x_rows + columns[None, :], mask=(rows < M)[:, None] & inside, other=0.0)
        right = tl.load(a_rows + columns[None, :], mask=(ranks < R)[:, None] & inside, other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, tl.trans(right), sums, input_precision="ieee")
    place = planes + split * G_M_R + group * M * R + rows[:, None] * R + ranks[None, :]
    tl.store(place, sums, mask=(rows < M)[:, None] & (ranks < R)[None, :])


@triton.jit
def _expand(
    y, planes, b, M, R, D_OUT, G_M_R,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = y + group * M * D_OUT + rows[:, None] * D_OUT + columns[None, :]
    inside = (rows < M)[:, None] & (columns < D_OUT)[None, :]
    sums = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    for first in range(0, R, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        there = (rows < M)[:, None] & (ranks < R)[None, :]
        h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for split in range(SPLITS):
            plane = planes + split * G_M_R + group * M * R
            h += tl.load(plane + rows[:, None] * R + ranks[None, :], mask=there, other=0.0)
        weight = b + group * R * D_OUT + ranks[:, None] * D_OUT + columns[None, :]
        right = tl.load(weight, mask=(ranks < R)[:, None] & (columns < D_OUT)[None, :], other=0.0)
        if UPCAST:
            right = right.to(tl.float32)
        sums = tl.dot(h.to(right.dtype), right, sums, input_precision="ieee")
    tl.store(place, sums.to(y.dtype.element_ty), mask=inside)


@triton.jit
def expand_columns(
    values, planes, b, row, group, columns, mask, first_rank, R, first_column, D, R_ALL, PLANE, SPLITS: tl.constexpr
):
    """`values` [columns] of one row of a fused product, plus what one module's pair adds to those that are its own."""
    own = mask & (columns >= first_column) & (columns < first_column + D)
    for rank in range(0, R):
        h = 0.0
        for split in range(SPLITS):
            h += tl.load(planes + split * PLANE + row * R_ALL + first_rank + rank)
        weight = tl.load(b + (group * R + rank) * D + (columns - first_column), mask=own, other=0.0)
        values += h * weight.to(tl.float32)
    return values


def shrink(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """x [G x M, D_in] in rows of groups, a [G, R, D_in] -> fp32 planes [splits, G, M, R], whose sum is the product.

    ValueError on inputs that do not fit each other or are not on a GPU.
    """
    groups, rank, d_in = a.shape
    rows = x.shape[0] // groups
    check("x", x, (groups * rows, d_in), x)
    check("a", a, (groups, rank, d_in), x)
    if rows * d_in >= 2**31:
        raise ValueError(f"x: {rows} rows of one adapter are more than 32-bit offsets reach; choose kernels eager")
    splits = triton.cdiv(d_in, SPLIT_COLUMNS)
    planes = torch.empty(splits, groups, rows, rank, dtype=torch.float32, device=x.device)
    block_m, block_r = tile(rows, 64), tile(rank, 32)
    _shrink[(groups, triton.cdiv(rows, block_m) * triton.cdiv(rank, block_r), splits)](
        x, a, planes, rows, rank, d_in, planes[0].numel(),
        BLOCK_M=block_m, BLOCK_R=block_r, BLOCK_K=tile(d_in, 64), SPLIT_K=SPLIT_COLUMNS, UPCAST=INTERPRETED,
    )  # fmt: skip
    return planes


def add_low_rank(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """As `low_rank.eager`, in two launches. ValueError on inputs that do not fit each other or are not on a GPU."""
    groups, rows, d_in = x.shape
    rank, d_out = a.shape[1], b.shape[2]
    check("x", x, (groups, rows, d_in), y)
    check("a", a, (groups, rank, d_in), y)
    check("b", b, (groups, rank, d_out), y)
    check("y", y, (groups, rows, d_out), y)
    if rows * d_out >= 2**31:
        raise ValueError(f"y: {rows} rows of one adapter are more than 32-bit offsets reach; choose kernels eager")
    planes = shrink(x.view(groups * rows, d_in), a)
    block_m, block_n = tile(rows, 64), tile(d_out, 64)
    _expand[(groups, triton.cdiv(rows, block_m), triton.cdiv(d_out, block_n))](
        y, planes, b, rows, rank, d_out, planes[0].numel(),
        SPLITS=len(planes), BLOCK_M=block_m, BLOCK_R=tile(rank, 32), BLOCK_N=block_n, UPCAST=INTERPRETED,
    )  # fmt: skip
