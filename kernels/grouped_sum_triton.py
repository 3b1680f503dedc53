"""Triton form of `grouped_sum`: one launch, each sum in fp32 in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from perfbench.kernels.launch import check, tile
from perfbench.kernels.settings import setting


@triton.jit
def _sum(x, planes, D_IN, R, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    sums = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for start in range(0, tl.cdiv(D_IN, R), BLOCK_K):
        features = (start + tl.arange(0, BLOCK_K))[:, None] * R + ranks[None, :]
        inside = (features < D_IN) & (ranks < R)[None, :]
        values = tl.load(x + row * D_IN + features, mask=inside, other=0.0)
        sums += tl.sum(values.to(tl.float32), axis=0)
    tl.store(planes + row * R + ranks, sums, mask=ranks < R)


def planes(x: torch.Tensor, rank: int, groups: int) -> torch.Tensor:
    """x [rows, D_in] -> fp32 [1, rows, R], as the fused kernels take h. ValueError on what does not lie on a GPU."""
    rows, features = x.shape
    check("x", x, (rows, features), x)
    out = torch.empty(1, rows, rank, dtype=torch.float32, device=x.device)
    chosen = setting("grouped_sum", x.device)
    block = tile(rank, 64)
    _sum[(rows, triton.cdiv(rank, block))](
        x, out, features, rank, BLOCK_K=tile(triton.cdiv(features, rank), chosen["BLOCK_K"]), BLOCK_R=block,
        num_warps=chosen["num_warps"],
    )  # fmt: skip
    return out
