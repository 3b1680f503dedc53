"""The low-rank pair of each request's own adapter: y += (x a^T) b, unmerged; and the two halves of it.

Shapes: y [G, M, D_out] (written in place), x [G, M, D_in], a [G, R, D_in], b [G, R, D_out]; G groups of rows that
share an adapter (one per request, or one in all), M rows of each: beams x tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from perfbench.kernels.later import later


def eager(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Two batched products. a stays in rows and is read transposed: on CPUs the product along contiguous D_in was
    2 to 4 times as fast as with a [D_in, R] copy, and 10 times as fast as one masked GEMM over all adapters."""
    y.baddbmm_(torch.bmm(x, a.transpose(1, 2)), b)


def shrink(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """x [G x M, D_in] in rows of groups -> [G, M, R]; `a` holds the pairs of all modules that read x."""
    return torch.bmm(x.view(a.shape[0], -1, x.shape[-1]), a.transpose(1, 2))


class Expansion(NamedTuple):
    """The second halves of the modules that lie side by side in one fused product.

    parts: for each module (first rank, first column, b [G, R, D_out]); alike: [G, modules, R, D_out] where the modules
    fill the product and have one size, whose views the parts then are; else None.
    """

    parts: tuple[tuple[int, int, torch.Tensor], ...]
    alike: torch.Tensor | None = None


def expand(y: torch.Tensor, h: torch.Tensor, expansion: Expansion) -> None:
    """Adds to y [G x M, D] in place, for each module the product of its ranks of h [G, M, R] and its b."""
    groups, rows, _ = h.shape
    if expansion.alike is not None and rows == 1:
        # One product for all modules: on a CPU 6 microseconds in place of 40 for three.
        weight = expansion.alike.flatten(0, 1)
        y.view(len(weight), 1, -1).baddbmm_(h.view(len(weight), 1, -1), weight)
        return
    grouped = y.view(groups, rows, -1)
    for rank, column, weight in expansion.parts:
        own = h[:, :, rank : rank + weight.shape[1]]
        if weight.shape[2] == y.shape[1]:
            grouped.baddbmm_(own, weight)
        else:  # in place on some of the columns torch would take the groups one by one
            grouped[:, :, column : column + weight.shape[2]].add_(torch.bmm(own, weight))


FORMS = {"eager": eager, "triton": later("low_rank_triton", "add_low_rank")}
# Triton's gives fp32 planes [splits, G, M, R], which the Triton forms of the fused operations add up.
SHRINKS = {"eager": shrink, "triton": later("low_rank_triton", "shrink")}
