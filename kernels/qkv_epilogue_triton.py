"""Triton form of `qkv_epilogue`: expand, scales, RoPE and the cache write of every head of every row in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from perfbench.kernels.launch import check, check_scale, parts_of
from perfbench.kernels.low_rank import Expansion
from perfbench.kernels.low_rank_triton import expand_columns


@triton.jit
def _epilogue(
    qkv, planes, b0, b1, b2, scale_minus_one, cos, sin, entry,
    RANK0, R0, COLUMN0, D0, RANK1, R1, COLUMN1, D1, RANK2, R2, COLUMN2, D2, R_ALL, PLANE,
    M, SCALE_M, SCALE_FROM, SCALED, COLUMNS, ROTATION_STRIDE,
    LENGTH, Q_STRIDE, S_STRIDE, KV_STRIDE, HEAD_STRIDE, HEADS, KV_HEADS,
    PARTS: tl.constexpr, SPLITS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    group = row // M
    offsets = tl.arange(0, BLOCK)
    mask = offsets < HALF
    low = head * 2 * HALF + offsets
    high = low + HALF
    first = tl.load(qkv + row * COLUMNS + low, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(qkv + row * COLUMNS + high, mask=mask, other=0.0).to(tl.float32)
    if PARTS > 0:
        first = expand_columns(
            first, planes, b0, row, group, low, mask, RANK0, R0, COLUMN0, D0, R_ALL, PLANE, SPLITS)
        second = expand_columns(
            second, planes, b0, row, group, high, mask, RANK0, R0, COLUMN0, D0, R_ALL, PLANE, SPLITS)
    if PARTS > 1:
        first = expand_columns(
            first, planes, b1, row, group, low, mask, RANK1, R1, COLUMN1, D1, R_ALL, PLANE, SPLITS)
        second = expand_columns(
            second, planes, b1, row, group, high, mask, RANK1, R1, COLUMN1, D1, R_ALL, PLANE, SPLITS)
    if PARTS > 2:
        first = expand_columns(
            first, planes, b2, row, group, low, mask, RANK2, R2, COLUMN2, D2, R_ALL, PLANE, SPLITS)
        second = expand_columns(
            second, planes, b2, row, group, high, mask, RANK2, R2, COLUMN2, D2, R_ALL, PLANE, SPLITS)
    # Without a scale SCALED is 0: every load is masked off and gives 0.
    scale = scale_minus_one + (row // SCALE_M) * SCALED - SCALE_FROM
    there = mask & (low >= SCALE_FROM) & (low < SCALE_FROM + SCALED)
    first += first * tl.load(scale + low, mask=there, other=0.0).to(tl.float32)
    there = mask & (high >= SCALE_FROM) & (high < SCALE_FROM + SCALED)
    second += second * tl.load(scale + high, mask=there, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        angle = row * ROTATION_STRIDE + offsets
        turned = first * tl.load(cos + angle, mask=mask, other=0.0).to(tl.float32)
        turned += second * tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
        second = second * tl.load(cos + angle + HALF, mask=mask, other=0.0).to(tl.float32)
        second += first * tl.load(sin + angle + HALF, mask=mask, other=0.0).to(tl.float32)
        first = turned
    if head < HEADS:
        place = qkv + row * COLUMNS + low
    else:
        own = head - HEADS
        place = entry + (row // LENGTH) * Q_STRIDE + (row % LENGTH) * S_STRIDE
        place += (own // KV_HEADS) * KV_STRIDE + (own % KV_HEADS) * HEAD_STRIDE + offsets
    tl.store(place, first.to(qkv.dtype.element_ty), mask=mask)
    tl.store(place + HALF, second.to(qkv.dtype.element_ty), mask=mask)


def epilogue(
    qkv: torch.Tensor,
    planes: torch.Tensor | None,
    expansion: Expansion | None,
    scale_minus_one: torch.Tensor | None,
    scale_from: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    entry: torch.Tensor,
) -> torch.Tensor:
    """As `qkv_epilogue.eager`, with `planes` of `low_rank_triton.shrink` for h. ValueError on what does not fit."""
    rows, columns = qkv.shape
    kv_heads, dim = entry.shape[-2:]
    heads = columns // dim - 2 * kv_heads
    check("qkv", qkv, (rows, (heads + 2 * kv_heads) * dim), qkv)
    check("cos", cos, (len(cos), dim), qkv)
    check("sin", sin, (len(cos), dim), qkv)
    if len(cos) not in (1, rows):
        raise ValueError(f"cos: expected 1 row or {rows}, got {len(cos)}")
    if entry.numel() != rows * 2 * kv_heads * dim or entry.stride(-1) != 1 or entry.dtype != qkv.dtype:
        raise ValueError(f"entry: expected {rows} rows of keys and values in {qkv.dtype}, got {list(entry.shape)}")
    places = entry if entry.dim() == 5 else entry.unsqueeze(1)  # [Q, S, 2, H_kv, D]
    scale, scale_rows = check_scale(scale_minus_one, scale_from, qkv)
    arguments, parts, splits = parts_of(planes, expansion, qkv)
    _epilogue[(rows, heads + 2 * kv_heads)](
        qkv, *arguments[:4], scale, cos, sin, entry, *arguments[4:],
        rows if planes is None else rows // planes.shape[1], scale_rows, scale_from,
        0 if scale_minus_one is None else scale.shape[1], columns, dim if len(cos) > 1 else 0,
        places.shape[1], *places.stride()[:4], heads, kv_heads,
        PARTS=parts, SPLITS=splits, HALF=dim // 2, BLOCK=triton.next_power_of_2(dim // 2),
    )  # fmt: skip
    return qkv.view(rows, -1, dim)[:, :heads]
