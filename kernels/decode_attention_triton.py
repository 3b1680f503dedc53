"""Triton form of `decode_attention`: the prompt's keys and values are read once for all beams and heads of a group.

Where requests and heads are too few to fill a GPU the length is split over programs, and with several beams the
generated tokens are a part of their own; a second launch joins the parts in a fixed order. One part needs no join.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from perfbench.kernels.launch import INTERPRETED, tile
from perfbench.kernels.placement import on_gpu
from perfbench.kernels.settings import setting

# Beams x heads of a group that one program holds.
MOST_QUERIES = 128
# Fewer tokens of the prompt than this are not worth a program of their own.
LEAST_SPLIT = 64
# Generated tokens that a program of several beams loads at once: each beam has its own.
STEPS_AT_ONCE = 4


@triton.jit
def _parts(
    q, prompt, generated, where, mask, filled, out, statistics,
    LENGTH, STEPS, WHERE_STRIDE, HEADS, KV_HEADS, BEAMS, GROUP, DIM, SCALE, Q_STRIDE, REQUEST_STRIDE, KV_STRIDE,
    HEAD_STRIDE, MASK_STRIDE, ROWS,
    HAS_MASK: tl.constexpr, HAS_FILLED: tl.constexpr, BEAM: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """A program owns one request, one head of keys and values with all beams and heads that read it, and one part:
    of SPLITS stretches of SPLIT tokens of the prompt, or, the last where BEAM, the generated tokens. It walks its
    tokens in blocks, with the largest score, the sum of the weights and the weighted sum of the values so far. The
    only part writes the result; one of several writes these three, fp32, for `_join`."""
    request = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    kv = tl.program_id(0) % KV_HEADS
    part = tl.program_id(1)
    length, steps = LENGTH, STEPS
    if HAS_FILLED:
        if BEAM:
            steps = tl.load(filled).to(tl.int32)
        else:
            length = tl.load(filled).to(tl.int32)
    if part < SPLITS:
        queries = tl.arange(0, BLOCK_R)
        rows, heads = request * BEAMS + queries // GROUP, kv * GROUP + queries % GROUP
        query = _load_queries(q, rows, heads, queries < BEAMS * GROUP, Q_STRIDE, DIM, BLOCK_D)
        begin = part * SPLIT
        found = _read_prompt(
            query, prompt + request * REQUEST_STRIDE + kv * HEAD_STRIDE, mask + request * MASK_STRIDE,
            begin, begin + tl.minimum(SPLIT, length - begin), KV_STRIDE, SCALE, DIM,
            HAS_MASK, BLOCK_L, BLOCK_R, BLOCK_D, UPCAST,
        )  # fmt: skip
        if SPLITS == 1 and not BEAM:
            there = (queries < BEAMS * GROUP)[:, None] & (tl.arange(0, BLOCK_D) < DIM)[None, :]
            place = out + (rows * HEADS + heads)[:, None] * DIM + tl.arange(0, BLOCK_D)[None, :]
            tl.store(place, (found[2] / found[1][:, None]).to(out.dtype.element_ty), mask=there)
        else:
            slot = (part * ROWS + rows) * HEADS + heads
            _store_part(out, statistics, found, slot, queries < BEAMS * GROUP, DIM, BLOCK_D)
    elif BEAM:  # a constant: without generated tokens this branch is not compiled, `where` being no table then
        few_queries = tl.arange(0, BLOCK_G)
        few_rows, few_heads = request * BEAMS + few_queries // GROUP, kv * GROUP + few_queries % GROUP
        few = few_queries < BEAMS * GROUP
        few_query = _load_queries(q, few_rows, few_heads, few, Q_STRIDE, DIM, BLOCK_D)
        made = _read_generated(
            few_query, generated + kv * DIM, where + few_rows * WHERE_STRIDE, few, steps, KV_HEADS, SCALE, DIM,
            BLOCK_G, BLOCK_S, BLOCK_D,
        )  # fmt: skip
        few_slot = (part * ROWS + few_rows) * HEADS + few_heads
        _store_part(out, statistics, made, few_slot, few, DIM, BLOCK_D)


@triton.jit
def _load_queries(q, rows, heads, there, Q_STRIDE, DIM, BLOCK_D: tl.constexpr):
    """[queries, BLOCK_D] of q, zeros where none is."""
    dims = tl.arange(0, BLOCK_D)
    place = q + rows[:, None] * Q_STRIDE + heads[:, None] * DIM + dims[None, :]
    return tl.load(place, mask=there[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def _read_prompt(
    query, keys, mask, begin, end, KV_STRIDE, SCALE, DIM,
    HAS_MASK: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(largest score [BLOCK_R], sum of weights [BLOCK_R], weighted values [BLOCK_R, BLOCK_D]) of the query over the
    tokens from begin to end of the cache's prompt, BLOCK_L at once, which all queries share."""
    dims = tl.arange(0, BLOCK_D)
    inside = dims < DIM
    largest = tl.full((BLOCK_R,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    sums = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for start in range(begin, end, BLOCK_L):
        tokens = start + tl.arange(0, BLOCK_L)
        seen = tokens < end
        tiles = seen[:, None] & inside[None, :]
        places = tokens[:, None] * DIM + dims[None, :]
        key = tl.load(keys + places, mask=tiles, other=0.0)
        value = tl.load(keys + KV_STRIDE + places, mask=tiles, other=0.0)
        if HAS_MASK:
            seen = seen & (tl.load(mask + tokens, mask=seen, other=0) != 0)
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
    return largest, total, sums


@triton.jit
def _read_generated(
    query, generated, where, there, steps, KV_HEADS, SCALE, DIM,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The same over the generated tokens, BLOCK_S at once, of which each query [BLOCK_G] has its own: `where` says in
    which row of the cache each lies."""
    dims = tl.arange(0, BLOCK_D)
    query = query.to(tl.float32)
    largest = tl.full((BLOCK_G,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_G,), dtype=tl.float32)
    sums = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32)
    for start in range(0, steps, BLOCK_S):
        step = start + tl.arange(0, BLOCK_S)
        seen = there[:, None] & (step < steps)[None, :]
        source = tl.load(where[:, None] + step[None, :], mask=seen, other=0)
        places = (source * 2 * KV_HEADS)[:, :, None] * DIM + dims[None, None, :]
        tiles = seen[:, :, None] & (dims < DIM)[None, None, :]
        key = tl.load(generated + places, mask=tiles, other=0.0).to(tl.float32)
        value = tl.load(generated + KV_HEADS * DIM + places, mask=tiles, other=0.0).to(tl.float32)
        scores = tl.where(seen, tl.sum(query[:, None, :] * key, axis=2) * SCALE, -1.0e30)
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.where(seen, tl.exp(scores - higher[:, None]), 0.0)
        shrink = tl.exp(largest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        sums = sums * shrink[:, None] + tl.sum(weights[:, :, None] * value, axis=1)
        largest = higher
    return largest, total, sums


@triton.jit
def _store_part(out, statistics, found, slot, there, DIM, BLOCK_D: tl.constexpr):
    """Writes (largest, total, sums) of a part to its slots."""
    dims = tl.arange(0, BLOCK_D)
    tl.store(out + slot[:, None] * DIM + dims[None, :], found[2], mask=there[:, None] & (dims < DIM)[None, :])
    tl.store(statistics + slot * 2, found[0], mask=there)
    tl.store(statistics + slot * 2 + 1, found[1], mask=there)


@triton.jit
def _join(parts, statistics, out, ROW_HEADS, DIM, PARTS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program owns one head of one row: it brings the parts to their largest score and adds them in order."""
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
    if not (on_gpu(q) or INTERPRETED):
        raise ValueError(f"q: expected a tensor on one CUDA device, got {q.device}; choose kernels eager")
    if rows % requests or heads % kv_heads or prompt.shape[-1] != dim or prompt.dtype != q.dtype:
        raise ValueError(f"prompt: expected keys and values for q {list(q.shape)}, got {list(prompt.shape)}")
    if q.stride()[1:] != (dim, 1) or prompt.stride()[3:] != (dim, 1):
        raise ValueError("q, prompt: expected heads and tokens without gaps")
    if rows // requests * (heads // kv_heads) > MOST_QUERIES:
        raise ValueError(f"q: beams x heads of a group: expected at most {MOST_QUERIES}; choose kernels eager")
    steps = 0
    if generated is not None and where is not None:
        steps = where.shape[1]
        if not generated.is_contiguous() or where.stride(1) != 1:
            raise ValueError("generated, where: expected tensors without gaps")
    if filled is not None and (filled.dtype != torch.int64 or filled.numel() != 1 or filled.device != q.device):
        raise ValueError(f"filled: expected int64 [1] on {q.device}, got {filled.dtype} {list(filled.shape)}")
    chosen, beams, group = setting("decode_attention", q.device), rows // requests, heads // kv_heads
    split = split_of(length, requests * kv_heads, chosen["PROGRAMS"])
    splits = triton.cdiv(length, split)
    parts = splits + (steps > 0)
    out = torch.empty(rows, heads * dim, dtype=q.dtype, device=q.device)
    sums = statistics = out
    if parts > 1:
        sums = torch.empty(parts, rows, heads, dim, dtype=torch.float32, device=q.device)
        statistics = torch.empty(parts, rows, heads, 2, dtype=torch.float32, device=q.device)
    block_d = tile(dim, 256)
    bits = q if mask is None else mask.view(torch.uint8)
    _parts[(requests * kv_heads, parts)](
        q, prompt, q if generated is None else generated, q if where is None else where, bits,
        q if filled is None else filled, sums, statistics,
        length, steps, 0 if where is None else where.stride(0), heads, kv_heads, beams, group, dim, dim**-0.5,
        q.stride(0), *prompt.stride()[:3], 0 if mask is None else mask.stride(0), rows,
        HAS_MASK=mask is not None, HAS_FILLED=filled is not None, BEAM=steps > 0, SPLITS=splits, SPLIT=split,
        BLOCK_L=tile(min(length, split), chosen["BLOCK_L"]), BLOCK_R=tile(beams * group, MOST_QUERIES),
        BLOCK_G=triton.next_power_of_2(beams * group), BLOCK_S=STEPS_AT_ONCE, BLOCK_D=block_d,
        UPCAST=INTERPRETED, num_warps=chosen["num_warps"],
    )  # fmt: skip
    if parts > 1:
        _join[(rows * heads,)](sums, statistics, out, rows * heads, dim, PARTS=parts, BLOCK_D=block_d)
    return out


def split_of(length: int, heads: int, programs: int) -> int:
    """How many of `length` tokens a program reads, a power of two: all of them where the requests' heads alone are as
    many as the `programs` that fill the GPU, else so few that there are about as many, LEAST_SPLIT at least."""
    splits = max(1, programs // heads)
    return max(LEAST_SPLIT, int(triton.next_power_of_2(triton.cdiv(length, splits))))
