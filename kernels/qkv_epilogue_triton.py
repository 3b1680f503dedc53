"""Triton form of `qkv_epilogue`: expand, scales, rotations, RoPE and the cache write of all heads in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from perfbench.kernels.early_start_triton import wait
from perfbench.kernels.launch import (
    check,
    check_rows,
    early_start,
    expand_arguments,
    rank_tiles,
    scale_arguments,
    turn_arguments,
)
from perfbench.kernels.low_rank import Expansion
from perfbench.kernels.low_rank_triton import expand_near, near_tiles, own_adapter
from perfbench.kernels.rotation import Rotation
from perfbench.kernels.rotation_triton import turn_row
from perfbench.kernels.row_scale import Scale
from perfbench.kernels.row_scale_triton import scale_values
from perfbench.kernels.settings import setting


@triton.jit
def _epilogue(
    qkv, h, own, modules, scale_minus_one, scale_own, sine, sine_own, cos, sin, entry, at, q,
    H_SPLIT, H_ROW, M, SCALE_STRIDE, SCALE_FROM, SCALE_COLUMNS, SCALE_M,
    SINE_STRIDE, SINE_FROM, SINE_COLUMNS, SINE_M, ROW, Q_ROW, ROTATION_STRIDE,
    LENGTH, AT_STRIDE, Q_STRIDE, S_STRIDE, KV_STRIDE, HEAD_STRIDE, HEADS, KV_HEADS,
    SPLITS: tl.constexpr, OWN: tl.constexpr, SCALED: tl.constexpr, SCALE_OWN: tl.constexpr,
    TURNED: tl.constexpr, SINE_OWN: tl.constexpr, SINE_HALF: tl.constexpr,
    AT: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    NEXT_R: tl.constexpr, FAR_R: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program owns one head of one row: of Q, of K or of V, as the heads lie in the product. It loads the two halves
    of the head that RoPE turns into each other, adds the low-rank part, applies the scale and the rotation, turns Q and
    K, and writes Q to `q` and K and V into the cache. `q` is the product itself, unless a rotation reads there what
    another program would have overwritten. The adapter's first ranks are loaded before it waits for the product."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < HALF
    begin = head * 2 * HALF
    low = begin + offsets
    high = low + HALF
    if len(modules) > 0:
        adapter = own_adapter(own, row, M, OWN)
        near_low = near_tiles(qkv, modules, adapter, begin, low, mask, BLOCK, BLOCK_R, NEXT_R)
        near_high = near_tiles(qkv, modules, adapter, begin + HALF, high, mask, BLOCK, BLOCK_R, NEXT_R)
    wait(EARLY)
    first = tl.load(qkv + row * ROW + low, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(qkv + row * ROW + high, mask=mask, other=0.0).to(tl.float32)
    if len(modules) > 0:
        ranks = h + row * H_ROW
        first = expand_near(
            first, near_low, ranks, modules, adapter, begin, low, mask, H_SPLIT,
            SPLITS, BLOCK, BLOCK_R, NEXT_R, FAR_R, STAGES,
        )  # fmt: skip
        second = expand_near(
            second, near_high, ranks, modules, adapter, begin + HALF, high, mask, H_SPLIT,
            SPLITS, BLOCK, BLOCK_R, NEXT_R, FAR_R, STAGES,
        )  # fmt: skip
    if SCALED:
        adapter = own_adapter(scale_own, row, SCALE_M, SCALE_OWN)
        first = scale_values(first, scale_minus_one, adapter, low, mask, SCALE_STRIDE, SCALE_FROM, SCALE_COLUMNS)
        second = scale_values(second, scale_minus_one, adapter, high, mask, SCALE_STRIDE, SCALE_FROM, SCALE_COLUMNS)
    if TURNED:
        first = turn_row(
            first, qkv, h, own, modules, sine, sine_own, row, begin, low, mask, H_SPLIT, H_ROW, M,
            SINE_STRIDE, SINE_FROM, SINE_COLUMNS, SINE_M, ROW, SPLITS, OWN, SINE_OWN, SINE_HALF, BLOCK, FAR_R,
        )  # fmt: skip
        second = turn_row(
            second, qkv, h, own, modules, sine, sine_own, row, begin + HALF, high, mask, H_SPLIT, H_ROW, M,
            SINE_STRIDE, SINE_FROM, SINE_COLUMNS, SINE_M, ROW, SPLITS, OWN, SINE_OWN, SINE_HALF, BLOCK, FAR_R,
        )  # fmt: skip
    if head < HEADS + KV_HEADS:
        angle = row * ROTATION_STRIDE + offsets
        turned = first * tl.load(cos + angle, mask=mask, other=0.0).to(tl.float32)
        turned += second * tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
        second = second * tl.load(cos + angle + HALF, mask=mask, other=0.0).to(tl.float32)
        second += first * tl.load(sin + angle + HALF, mask=mask, other=0.0).to(tl.float32)
        first = turned
    if head < HEADS:
        place = q + row * Q_ROW + low
    else:
        kv_head = head - HEADS
        place = entry + (row // LENGTH) * Q_STRIDE + (row % LENGTH) * S_STRIDE
        place += (kv_head // KV_HEADS) * KV_STRIDE + (kv_head % KV_HEADS) * HEAD_STRIDE + offsets
        if AT:
            place += tl.load(at) * AT_STRIDE
    tl.store(place, first.to(qkv.dtype.element_ty), mask=mask)
    tl.store(place + HALF, second.to(qkv.dtype.element_ty), mask=mask)


def epilogue(
    qkv: torch.Tensor,
    h: torch.Tensor | None,
    expansion: Expansion | None,
    scale: Scale | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    entry: torch.Tensor,
    at: torch.Tensor | None = None,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """As `qkv_epilogue.eager`, with h as `expand_arguments` takes it. ValueError on what does not fit."""
    rows, columns = qkv.shape
    kv_heads, dim = entry.shape[-2:]
    heads = columns // dim - 2 * kv_heads
    check_rows("qkv", qkv, (rows, (heads + 2 * kv_heads) * dim), qkv)
    check("cos", cos, (len(cos), dim), qkv)
    check("sin", sin, (len(cos), dim), qkv)
    if len(cos) not in (1, rows):
        raise ValueError(f"cos: expected 1 row or {rows}, got {len(cos)}")
    step = entry if at is None else entry[0]
    if step.numel() != rows * 2 * kv_heads * dim or entry.stride(-1) != 1 or entry.dtype != qkv.dtype:
        raise ValueError(f"entry: expected {rows} rows of keys and values in {qkv.dtype}, got {list(entry.shape)}")
    places = step if step.dim() == 5 else step.unsqueeze(1)  # [Q, S, 2, H_kv, D]
    expanded, scaled = expand_arguments(h, expansion, qkv), scale_arguments(scale, qkv)
    turned = turn_arguments(rotation, qkv)
    q = qkv if rotation is None else torch.empty(rows, heads * dim, dtype=qkv.dtype, device=qkv.device)
    chosen, block = setting("qkv_epilogue", qkv.device), triton.next_power_of_2(dim // 2)
    _epilogue[(rows, heads + 2 * kv_heads)](
        qkv, *expanded.tensors, expanded.modules, *scaled.tensors, *turned.tensors, cos, sin, entry,
        qkv if at is None else at, q, *expanded.numbers, *scaled.numbers, *turned.numbers, qkv.stride(0), q.stride(0),
        dim if len(cos) > 1 else 0,
        places.shape[1], 0 if at is None else entry.stride(0), *places.stride()[:4], heads, kv_heads,
        **expanded.constants, **scaled.constants, **turned.constants, AT=at is not None,
        HALF=dim // 2, BLOCK=block, **rank_tiles(expanded, block, chosen["num_warps"], 2), **chosen, **early_start(qkv),
    )  # fmt: skip
    return q.view(rows, -1, dim)[:, :heads]
