"""A baseline: the adapters of a batch in two launches of their own after the base product, as in Punica.

Row by row (BGMV): the first launch gives every row's ranks of all modules at once, split over D_in; the second adds
every module's product to its columns. Written to be fast: it is what the fused kernels have to beat.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# Launch settings to choose from; each is timed at the size at hand before the peers are. None spills on sm_86.
SHRINK_CANDIDATES: tuple[dict[str, int], ...] = tuple(
    {"SPLIT_K": split, "BLOCK_K": block, "num_warps": warps}
    for split in (512, 1024, 2048, 4096)
    for block, warps in ((64, 2), (128, 2), (128, 4), (256, 4))
)
EXPAND_CANDIDATES: tuple[dict[str, int], ...] = tuple(
    {"BLOCK_N": block, "num_warps": warps} for block in (128, 256, 512) for warps in (2, 4, 8)
)


@triton.jit
def _shrink(
    x, a, own, planes, R, D_IN, A_STRIDE, PLANE,
    SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    adapter = tl.load(own + row).to(tl.int64)
    ranks = tl.arange(0, BLOCK_R)
    sums = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for start in range(0, SPLIT_K, BLOCK_K):
        columns = split * SPLIT_K + start + tl.arange(0, BLOCK_K)
        inside = columns < D_IN
        values = tl.load(x + row * D_IN + columns, mask=inside, other=0.0).to(tl.float32)
        there = (adapter >= 0) & (ranks < R)[:, None] & inside[None, :]
        weights = a + tl.maximum(adapter, 0) * A_STRIDE + ranks[:, None] * D_IN + columns[None, :]
        sums += values[None, :] * tl.load(weights, mask=there, other=0.0).to(tl.float32)
    tl.store(planes + split * PLANE + row * R + ranks, tl.sum(sums, axis=1), mask=ranks < R)


@triton.jit
def _expand(
    y, planes, b, own, R, D_OUT, ROW, PLANE, MODULES, ADAPTER_STRIDE, MODULE_STRIDE,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    module = tl.program_id(2).to(tl.int64)
    adapter = tl.load(own + row).to(tl.int64)
    if adapter >= 0:
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        ranks = tl.arange(0, BLOCK_R)
        h = tl.zeros((BLOCK_R,), dtype=tl.float32)
        for split in range(SPLITS):
            mine = planes + split * PLANE + (row * MODULES + module) * R + ranks
            h += tl.load(mine, mask=ranks < R, other=0.0)
        there = (ranks < R)[:, None] & (columns < D_OUT)[None, :]
        weights = b + adapter * ADAPTER_STRIDE + module * MODULE_STRIDE + ranks[:, None] * D_OUT + columns[None, :]
        added = tl.sum(h[:, None] * tl.load(weights, mask=there, other=0.0).to(tl.float32), axis=0)
        place = y + row * ROW + module * D_OUT + columns
        found = tl.load(place, mask=columns < D_OUT, other=0.0).to(tl.float32) + added
        tl.store(place, found.to(y.dtype.element_ty), mask=columns < D_OUT)


def add_low_rank(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    own: torch.Tensor,
    shrink: dict[str, Any],
    expand: dict[str, Any],
) -> None:
    """y [rows, modules x D_out] += in place, module by module, (x [rows, D_in] a^T) b of each row's own adapter.

    a [T, modules x R, D_in], b [T, modules, R, D_out]; own int64 [rows], -1 none; shrink, expand: launch settings.
    """
    rows, d_in = x.shape
    _, modules, rank, d_out = b.shape
    splits = triton.cdiv(d_in, shrink["SPLIT_K"])
    planes = torch.empty(splits, rows, modules * rank, dtype=torch.float32, device=x.device)
    _shrink[(rows, splits)](
        x, a, own, planes, modules * rank, d_in, a.stride(0), planes[0].numel(),
        BLOCK_R=triton.next_power_of_2(modules * rank), **shrink,
    )  # fmt: skip
    _expand[(rows, triton.cdiv(d_out, expand["BLOCK_N"]), modules)](
        y, planes, b, own, rank, d_out, y.stride(0), planes[0].numel(), modules, b.stride(0), b.stride(1),
        SPLITS=splits, BLOCK_R=triton.next_power_of_2(rank), **expand,
    )  # fmt: skip
