"""The grouped sum of a linear's input: h_j = the sum of all x_k with k % R = j, the first half of a low-rank pair that
has no matrix of its own. It is the same with every adapter of rank R."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from perfbench.kernels.later import later


def eager(x: torch.Tensor, rank: int, groups: int) -> torch.Tensor:
    """x [G x M, D_in] -> h [G, M, R], as `low_rank.shrink` gives it."""
    rows, features = x.shape
    if rest := features % rank:
        x = pad(x, (0, rank - rest))
    return x.view(rows, -1, rank).sum(dim=1).view(groups, -1, rank)


def matrix(rank: int, like: torch.Tensor) -> torch.Tensor:
    """[R, D_in] of zeros and ones, whose product with x [..., D_in] is the sum; in the type of `like` [..., D_in]."""
    ranks, features = (torch.arange(size, device=like.device) for size in (rank, like.shape[-1]))
    return (features % rank == ranks[:, None]).to(like.dtype)


FORMS = {"eager": eager, "compiled": eager, "triton": later("grouped_sum_triton", "planes")}
