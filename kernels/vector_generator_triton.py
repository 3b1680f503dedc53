"""Triton form of `vector_generator`: the whole generator of a layer in one launch.

Every program makes the bottleneck of its prompt again, which is cheaper than a second launch: w_down of one adapter
is small and comes from the cache after the first program has read it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from perfbench.kernels.launch import check, check_own, check_stack, requests_of, tile
from perfbench.kernels.low_rank_triton import own_adapter
from perfbench.kernels.settings import setting


@triton.jit
def _generate(
    h, w_down, w_up, bias_minus_one, own, out, PER_GROUP, HIDDEN, R, D, DOWN_STRIDE, UP_STRIDE, BIAS_STRIDE,
    OWN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    prompt = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    adapter = own_adapter(own, prompt, PER_GROUP, OWN)
    has = adapter >= 0
    adapter = tl.maximum(adapter, 0)
    ranks = tl.arange(0, BLOCK_R)
    inner = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        features = start + tl.arange(0, BLOCK_K)
        there = has & (features < HIDDEN)[:, None] & (ranks < R)[None, :]
        values = tl.load(h + prompt * HIDDEN + features, mask=features < HIDDEN, other=0.0).to(tl.float32)
        down = tl.load(w_down + adapter * DOWN_STRIDE + features[:, None] * R + ranks[None, :], mask=there, other=0.0)
        inner += tl.sum(values[:, None] * down.to(tl.float32), axis=0)
    inner = 0.5 * inner * (1.0 + tl.erf(inner * 0.7071067811865476))
    there = has & (ranks < R)[:, None] & (columns < D)[None, :]
    up = tl.load(w_up + adapter * UP_STRIDE + ranks[:, None] * D + columns[None, :], mask=there, other=0.0)
    bias = tl.load(bias_minus_one + adapter * BIAS_STRIDE + columns, mask=has & (columns < D), other=0.0).to(tl.float32)
    made = tl.sum(inner[:, None] * up.to(tl.float32), axis=0) + bias
    tl.store(out + prompt * D + columns, made.to(out.dtype.element_ty), mask=columns < D)


def generate(
    h: torch.Tensor,
    w_down: torch.Tensor,
    w_up: torch.Tensor,
    bias_minus_one: torch.Tensor,
    own: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `vector_generator.eager`; own int64 [Q] or None as in `low_rank.Expansion`, zeros for -1. ValueError on inputs
    that do not fit each other or are not on a GPU."""
    adapters, hidden, rank = w_down.shape
    prompts, columns = h.shape[0], w_up.shape[2]
    check("h", h, (prompts, hidden), h)
    check_stack("w_down", w_down, (adapters, hidden, rank), h)
    check_stack("w_up", w_up, (adapters, rank, columns), h)
    check_stack("bias_minus_one", bias_minus_one, (adapters, columns), h)
    check_own(own, h)
    out = torch.empty(prompts, columns, dtype=h.dtype, device=h.device)
    chosen = setting("vector_generator", h.device)
    block = tile(columns, chosen["BLOCK_N"])
    _generate[(prompts, triton.cdiv(columns, block))](
        h, w_down, w_up, bias_minus_one, h if own is None else own, out,
        prompts // requests_of(adapters, own, prompts), hidden, rank, columns,
        w_down.stride(0), w_up.stride(0), bias_minus_one.stride(0),
        OWN=own is not None, BLOCK_K=tile(hidden, chosen["BLOCK_K"]), BLOCK_R=tile(rank, 128), BLOCK_N=block,
        num_warps=chosen["num_warps"],
    )  # fmt: skip
    return out
