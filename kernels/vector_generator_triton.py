"""Triton form of `vector_generator`: the whole generator of a layer in one launch.

Every program makes the bottleneck of its prompt again, which is cheaper than a second launch: w_down of one adapter
is small and comes from the cache after the first program has read it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from perfbench.kernels.launch import check, tile


@triton.jit
def _generate(
    h, w_down, w_up, bias_minus_one, out, PER_GROUP, HIDDEN, R, D,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    prompt = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = prompt // PER_GROUP
    ranks = tl.arange(0, BLOCK_R)
    inner = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        features = start + tl.arange(0, BLOCK_K)
        there = (features < HIDDEN)[:, None] & (ranks < R)[None, :]
        values = tl.load(h + prompt * HIDDEN + features, mask=features < HIDDEN, other=0.0).to(tl.float32)
        down = tl.load(w_down + (group * HIDDEN + features)[:, None] * R + ranks[None, :], mask=there, other=0.0)
        inner += tl.sum(values[:, None] * down.to(tl.float32), axis=0)
    inner = 0.5 * inner * (1.0 + tl.erf(inner * 0.7071067811865476))
    there = (ranks < R)[:, None] & (columns < D)[None, :]
    up = tl.load(w_up + (group * R + ranks)[:, None] * D + columns[None, :], mask=there, other=0.0).to(tl.float32)
    bias = tl.load(bias_minus_one + group * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    made = tl.sum(inner[:, None] * up, axis=0) + bias
    tl.store(out + prompt * D + columns, made.to(out.dtype.element_ty), mask=columns < D)


def generate(
    h: torch.Tensor, w_down: torch.Tensor, w_up: torch.Tensor, bias_minus_one: torch.Tensor
) -> torch.Tensor:
    """As `vector_generator.eager`. ValueError on inputs that do not fit each other or are not on a GPU."""
    groups, hidden, rank = w_down.shape
    prompts, columns = h.shape[0], w_up.shape[2]
    check("h", h, (prompts, hidden), h)
    check("w_down", w_down, (groups, hidden, rank), h)
    check("w_up", w_up, (groups, rank, columns), h)
    check("bias_minus_one", bias_minus_one, (groups, columns), h)
    if prompts % groups:
        raise ValueError(f"h: expected a multiple of {groups} prompts, one for each group, got {prompts}")
    out = torch.empty(prompts, columns, dtype=h.dtype, device=h.device)
    block = tile(columns, 512)
    _generate[(prompts, triton.cdiv(columns, block))](
        h, w_down, w_up, bias_minus_one, out, prompts // groups, hidden, rank, columns,
        BLOCK_K=tile(hidden, 64), BLOCK_R=tile(rank, 128), BLOCK_N=block,
    )  # fmt: skip
    return out
