"""Triton form of `decode_attention`: the prompt's keys and values are read once for all beams and heads of a group.

The length is split over programs, the generated tokens being a part of their own; a second launch joins the parts in a
fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from perfbench.kernels.launch import INTERPRETED, tile
from perfbench.kernels.settings import setting

# Beams x heads of a group that one program holds.
MOST_QUERIES = 128


@triton.jit
def _parts(
    q, prompt, generated, where, mask, filled, out, statistics,
    LENGTH, STEPS, WHERE_STRIDE, HEADS, KV_HEADS, BEAMS, GROUP, DIM, SCALE, Q_STRIDE, REQUEST_STRIDE, KV_STRIDE,
    HEAD_STRIDE, MASK_STRIDE, ROWS,
    HAS_MASK: tl.constexpr, HAS_FILLED: tl.constexpr, BEAM: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    request = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    kv = tl.program_id(0) % KV_HEADS
    part = tl.program_id(1)
    queries = tl.arange(0, BLOCK_R)
    there = queries < BEAMS * GROUP
    rows = request * BEAMS + queries // GROUP
    heads = kv * GROUP + queries % GROUP
    dims = tl.arange(0, BLOCK_D)
    inside = dims < DIM
    both = there[:, None] & inside[None, :]
    query = tl.load(q + rows[:, None] * Q_STRIDE + heads[:, None] * DIM + dims[None, :], mask=both, other=0.0)
    largest = tl.full((BLOCK_R,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    sums = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    length, steps = LENGTH, STEPS
    if HAS_FILLED:
        if BEAM:
            steps = tl.load(filled).to(tl.int32)
        else:
            length = tl.load(filled).to(tl.int32)
    if part < SPLITS:
        keys = prompt + request * REQUEST_STRIDE + kv * HEAD_STRIDE
        for start in range(0, tl.minimum(SPLIT, length - part * SPLIT), BLOCK_L):
            tokens = part * SPLIT + start + tl.arange(0, BLOCK_L)
            seen = tokens < length
            tiles = seen[:, None] & inside[None, :]
            places = tokens[:, None] * DIM + dims[None, :]
            key = tl.load(keys + places, mask=tiles, other=0.0)
            value = tl.load(keys + KV_STRIDE + places, mask=tiles, other=0.0)
            if HAS_MASK:
                seen = seen & (tl.load(mask + request * MASK_STRIDE + tokens, mask=seen, other=0) != 0)
            if UPCAST:
                scores = tl.dot(query.to(tl.float32), tl.trans(key.to(tl.float32)), input_precision="ieee")
            else:
                scores = tl.dot(query, tl.trans(key), input_precision="ieee")
            scores = tl.where(seen[None, :], scores * SCALE, -1.0e30)
            higher = tl.maximum(largest, tl.max(scores, axis=1))
            weights = tl.where(seen[None, :], tl.exp(scores - higher[:, None]), 0.0)
            shrink = tl.exp(largest - higher)
            total = total * shrink + tl.sum(weights, axis=1)
            if UPCAST:
                sums = tl.dot(weights, value.to(tl.float32), sums * shrink[:, None], input_precision="ieee")
            else:
                sums = tl.dot(weights.to(value.dtype), value, sums * shrink[:, None], input_precision="ieee")
            largest = higher
    elif BEAM:  # a constant: without generated tokens this branch is not compiled, `where` being no table then
        for step in range(0, steps):
            source = tl.load(where + rows * WHERE_STRIDE + step, mask=there, other=0)
            place = generated + (source[:, None] * 2 * KV_HEADS + kv) * DIM + dims[None, :]
            key = tl.load(place, mask=both, other=0.0).to(tl.float32)
            value = tl.load(place + KV_HEADS * DIM, mask=both, other=0.0).to(tl.float32)
            score = tl.sum(query.to(tl.float32) * key, axis=1) * SCALE
            higher = tl.maximum(largest, score)
            shrink, weight = tl.exp(largest - higher), tl.exp(score - higher)
            total = total * shrink + weight
            sums = sums * shrink[:, None] + weight[:, None] * value
            largest = higher
    slot = (part * ROWS + rows) * HEADS + heads
    tl.store(out + slot[:, None] * DIM + dims[None, :], sums, mask=both)
    tl.store(statistics + slot * 2, largest, mask=there)
    tl.store(statistics + slot * 2 + 1, total, mask=there)


@triton.jit
def _join(parts, statistics, out, ROW_HEADS, DIM, PARTS: tl.constexpr, BLOCK_D: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    largest = -1.0e30
    for part in range(PARTS):
        largest = tl.maximum(largest, tl.load(statistics + (part * ROW_HEADS + slot) * 2))
    total = 0.0
    sums = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for part in range(PARTS):
        place = part * ROW_HEADS + slot
        weight = tl.exp(tl.load(statistics + place * 2) - largest)
        total += weight * tl.load(statistics + place * 2 + 1)
        sums += weight * tl.load(parts + place * DIM + dims, mask=dims < DIM, other=0.0)
    tl.store(out + slot * DIM + dims, (sums / total).to(out.dtype.element_ty), mask=dims < DIM)


def attend(
    q: torch.Tensor,
    prompt: torch.Tensor,
    generated: torch.Tensor | None,
    where: torch.Tensor | None,
    mask: torch.Tensor | None,
    filled: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `decode_attention.eager`, with the padding alone as mask where `filled` is given.

    ValueError on inputs that do not fit each other or are not on a GPU.
    """
    rows, heads, dim = q.shape
    requests, _, kv_heads, length, _ = prompt.shape
    if not (q.is_cuda or INTERPRETED):
        raise ValueError(f"q: expected a tensor on one CUDA device, got {q.device}; choose kernels eager")
    if rows % requests or heads % kv_heads or prompt.shape[-1] != dim or prompt.dtype != q.dtype:
        raise ValueError(f"prompt: expected keys and values for q {list(q.shape)}, got {list(prompt.shape)}")
    if q.stride()[1:] != (dim, 1) or prompt.stride()[3:] != (dim, 1):
        raise ValueError("q, prompt: expected heads and tokens without gaps")
    if rows // requests * (heads // kv_heads) > MOST_QUERIES:
        raise ValueError(f"q: beams x heads of a group: expected at most {MOST_QUERIES}; choose kernels eager")
    chosen = setting("decode_attention", q.device)
    splits = triton.cdiv(length, chosen["SPLIT"])
    steps = 0
    if generated is not None and where is not None:
        steps = where.shape[1]
        if not generated.is_contiguous() or where.stride(1) != 1:
            raise ValueError("generated, where: expected tensors without gaps")
    if filled is not None and (filled.dtype != torch.int64 or filled.numel() != 1 or filled.device != q.device):
        raise ValueError(f"filled: expected int64 [1] on {q.device}, got {filled.dtype} {list(filled.shape)}")
    parts = splits + (steps > 0)
    sums = torch.empty(parts, rows, heads, dim, dtype=torch.float32, device=q.device)
    statistics = torch.empty(parts, rows, heads, 2, dtype=torch.float32, device=q.device)
    out = torch.empty(rows, heads * dim, dtype=q.dtype, device=q.device)
    beams, group = rows // requests, heads // kv_heads
    block_d = tile(dim, 256)
    bits = q if mask is None else mask.view(torch.uint8)
    _parts[(requests * kv_heads, parts)](
        q, prompt, q if generated is None else generated, q if where is None else where, bits,
        q if filled is None else filled, sums, statistics,
        length, steps, 0 if where is None else where.stride(0), heads, kv_heads, beams, group, dim, dim**-0.5,
        q.stride(0), *prompt.stride()[:3], 0 if mask is None else mask.stride(0), rows,
        HAS_MASK=mask is not None, HAS_FILLED=filled is not None, BEAM=steps > 0, SPLITS=splits, SPLIT=chosen["SPLIT"],
        BLOCK_L=tile(length, chosen["BLOCK_L"]), BLOCK_R=tile(beams * group, MOST_QUERIES), BLOCK_D=block_d,
        UPCAST=INTERPRETED, num_warps=chosen["num_warps"],
    )  # fmt: skip
    _join[(rows * heads,)](sums, statistics, out, rows * heads, dim, PARTS=parts, BLOCK_D=block_d)
    return out
