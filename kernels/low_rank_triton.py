"""Triton form of `low_rank`: a split-K shrink into fp32 planes, and an expand that sums them in a fixed order.

No atomics: two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from perfbench.kernels.launch import INTERPRETED, check, check_own, check_rows, check_stack, requests_of, tile
from perfbench.kernels.low_rank import Expansion, add_between_vectors, add_bias, each_request_s
from perfbench.kernels.settings import setting


@triton.jit
def _shrink(
    x, a, own, planes, M, R, D_IN, A_STRIDE, PLANE,
    OWN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    rank_blocks = tl.cdiv(R, BLOCK_R)
    rows = (tl.program_id(1) // rank_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = (tl.program_id(1) % rank_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2).to(tl.int64)
    adapter = group
    if OWN:
        adapter = tl.load(own + group).to(tl.int64)
    there = (ranks < R) & (adapter >= 0)
    x_rows = x + group * M * D_IN + rows[:, None] * D_IN
    a_rows = a + tl.maximum(adapter, 0) * A_STRIDE + ranks[:, None] * D_IN
    sums = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(0, SPLIT_K, BLOCK_K):
        columns = split * SPLIT_K + start + tl.arange(0, BLOCK_K)
        inside = (columns < D_IN)[None, :]
        left = tl.load(x_rows + columns[None, :], mask=(rows < M)[:, None] & inside, other=0.0)
        right = tl.load(a_rows + columns[None, :], mask=there[:, None] & inside, other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, tl.trans(right), sums, input_precision="ieee")
    place = planes + split * PLANE + group * M * R + rows[:, None] * R + ranks[None, :]
    tl.store(place, sums, mask=(rows < M)[:, None] & (ranks < R)[None, :])


@triton.jit
def _expand(
    y, planes, b, own, M, R, D_OUT, ROW, B_STRIDE, PLANE, H_ROW,
    SPLITS: tl.constexpr, OWN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    adapter = group
    if OWN:
        adapter = tl.load(own + group).to(tl.int64)
    place = y + group * M * ROW + rows[:, None] * ROW + columns[None, :]
    inside = (adapter >= 0) & (rows < M)[:, None] & (columns < D_OUT)[None, :]
    sums = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    for first in range(0, R, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        there = (rows < M)[:, None] & (ranks < R)[None, :]
        h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for split in range(SPLITS):
            plane = planes + split * PLANE + group * M * H_ROW
            h += tl.load(plane + rows[:, None] * H_ROW + ranks[None, :], mask=there, other=0.0)
        weight = b + tl.maximum(adapter, 0) * B_STRIDE + ranks[:, None] * D_OUT + columns[None, :]
        right = tl.load(weight, mask=(ranks < R)[:, None] & (columns < D_OUT)[None, :], other=0.0)
        if UPCAST:
            right = right.to(tl.float32)
        sums = tl.dot(h.to(right.dtype), right, sums, input_precision="ieee")
    tl.store(place, sums.to(y.dtype.element_ty), mask=inside)


@triton.jit
def own_adapter(own, row, M, OWN: tl.constexpr):
    """Which of the stacked adapters the request of `row` has, -1 for none; M rows of each request."""
    adapter = row // M
    if OWN:
        adapter = tl.load(own + adapter).to(tl.int64)
    return adapter


@triton.jit
def owns(module, adapter, FIRST):
    """Whether the column FIRST of a fused product is one to which `module` of the row's adapter adds something."""
    _, _, _, _, FIRST_COLUMN, D, _ = module
    return (adapter >= 0) & (FIRST >= FIRST_COLUMN) & (FIRST < FIRST_COLUMN + D)


@triton.jit
def near_tiles(
    product, modules, adapter, FIRST, columns, mask,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, NEXT_R: tl.constexpr,
):  # fmt: skip
    """Tiles [BLOCK_R, BLOCK] of b, of the first ranks, at `columns` from FIRST on, which one module of `modules` (as
    `expand_columns` has them) owns, or none, and [NEXT_R, BLOCK], of the ranks behind them; where 0 ranks are asked for
    there is none. They hang on nothing that a kernel of the step makes."""
    near = (_near_tile(product, modules, adapter, FIRST, columns, mask, 0, BLOCK, BLOCK_R),) if BLOCK_R > 0 else ()
    if NEXT_R > 0:  # then there is a first one
        following = _near_tile(product, modules, adapter, FIRST, columns, mask, BLOCK_R, BLOCK, NEXT_R)
        near = near[0], following  # type: ignore
    return near


@triton.jit
def _near_tile(
    product, modules, adapter, FIRST, columns, mask, START: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr
):
    """No branch: so all loads of a program are under way at once."""
    ranks = START + tl.arange(0, BLOCK_R)
    near = tl.zeros((BLOCK_R, BLOCK), dtype=product.dtype.element_ty)
    for i in tl.static_range(len(modules)):
        if len(modules[i]) == 7:
            b, _, _, R, FIRST_COLUMN, D, B_STRIDE = modules[i]
            own = owns(modules[i], adapter, FIRST)
            weights = b + adapter * B_STRIDE + ranks[:, None] * D + (columns - FIRST_COLUMN)[None, :]
            tile = tl.load(weights, mask=(own & (ranks < R))[:, None] & mask[None, :], other=0.0)
            near = tl.where(own, tile, near)
    return near


@triton.jit
def expand_near(
    values, near, h, modules, adapter, FIRST, columns, mask, H_SPLIT,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, NEXT_R: tl.constexpr,
    FAR_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `expand_columns`, where the `near_tiles` of these columns are there. Tile by tile: the values of all of them
    in fp32 would be more than a thread has registers for."""
    for t in tl.static_range(len(near)):
        ranks = t * BLOCK_R + tl.arange(0, near[t].shape[0])
        inner = tl.zeros((near[t].shape[0],), dtype=tl.float32)
        for i in tl.static_range(len(modules)):
            if len(modules[i]) == 7:
                _, FIRST_RANK, H_OWN, R, _, _, _ = modules[i]
                there = owns(modules[i], adapter, FIRST) & (ranks < R)
                for split in tl.static_range(SPLITS):
                    place = h + adapter * H_OWN + FIRST_RANK + split * H_SPLIT + ranks
                    inner += tl.load(place, mask=there, other=0.0).to(tl.float32)
        values += tl.sum(inner[:, None] * near[t].to(tl.float32), axis=0)
    return expand_columns(
        values, h, modules, adapter, FIRST, columns, mask, H_SPLIT, BLOCK_R + NEXT_R, SPLITS, BLOCK, FAR_R, STAGES
    )


@triton.jit
def expand_columns(
    values, h, modules, adapter, FIRST, columns, mask, H_SPLIT, START: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, FAR_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`values` [BLOCK] of one row of a fused product, at `columns` from FIRST on, plus what the low-rank pairs add; of
    an adapter's own pairs the ranks from START on.

    h: where the row's ranks begin; modules: (b, first rank with the first adapter, elements of h from there to the next
    adapter's, ranks, first column, columns, elements between adapters) of each, and the others that `Expand` names. A
    module that owns none of the columns costs one comparison; of the others FAR_R ranks are loaded as one tile [FAR_R,
    BLOCK], and STAGES - 1 tiles are under way while one is added; 0: no module has ranks beyond START.
    """
    for i in tl.static_range(len(modules)):
        if len(modules[i]) == 7:
            if STAGES > 0:
                values = _expand_module(
                    values, h, modules[i], adapter, FIRST, columns, mask, H_SPLIT, START, SPLITS, BLOCK, FAR_R, STAGES
                )
        elif len(modules[i]) == 4:
            values = _add_bias(values, modules[i], adapter, columns, mask)
        else:
            # With its sums it holds more at once: of a quarter of the ranks nothing spills.
            values = _expand_between_vectors(
                values, h, modules[i], adapter, FIRST, columns, mask, H_SPLIT, SPLITS, BLOCK, (FAR_R + 3) // 4
            )
    return values


@triton.jit
def _expand_module(
    values, h, module, adapter, FIRST, columns, mask, H_SPLIT, START: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, FAR_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b, FIRST_RANK, H_OWN, R, FIRST_COLUMN, D, B_STRIDE = module
    ranks_of_row = h + adapter * H_OWN + FIRST_RANK
    if (adapter >= 0) & (FIRST < FIRST_COLUMN + D) & (FIRST + BLOCK > FIRST_COLUMN):
        own = mask & (columns >= FIRST_COLUMN) & (columns < FIRST_COLUMN + D)
        for first in tl.range(START, R, FAR_R, num_stages=STAGES):
            ranks = first + tl.arange(0, FAR_R)
            there = ranks < R
            weights = b + adapter * B_STRIDE + ranks[:, None] * D + (columns - FIRST_COLUMN)[None, :]
            tile = tl.load(weights, mask=there[:, None] & own[None, :], other=0.0).to(tl.float32)
            inner = tl.zeros((FAR_R,), dtype=tl.float32)
            for split in tl.static_range(SPLITS):
                inner += tl.load(ranks_of_row + split * H_SPLIT + ranks, mask=there, other=0.0).to(tl.float32)
            values += tl.sum(inner[:, None] * tile, axis=0)
    return values


@triton.jit
def _add_bias(values, module, adapter, columns, mask):
    bias, FIRST_COLUMN, D, STRIDE = module
    own = mask & (adapter >= 0) & (columns >= FIRST_COLUMN) & (columns < FIRST_COLUMN + D)
    return values + tl.load(bias + adapter * STRIDE + columns - FIRST_COLUMN, mask=own, other=0.0).to(tl.float32)


@triton.jit
def _expand_between_vectors(
    values, h, module, adapter, FIRST, columns, mask, H_SPLIT,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    b, FIRST_RANK, R, FIRST_COLUMN, D, of_ranks, RANKS_STRIDE, of_columns, COLUMNS_STRIDE = module
    if (adapter >= 0) & (FIRST < FIRST_COLUMN + D) & (FIRST + BLOCK > FIRST_COLUMN):
        own = mask & (columns >= FIRST_COLUMN) & (columns < FIRST_COLUMN + D)
        sums = tl.zeros_like(values)
        for first in range(0, R, BLOCK_R):
            ranks = first + tl.arange(0, BLOCK_R)
            there = ranks < R
            weights = b + ranks[:, None] * D + (columns - FIRST_COLUMN)[None, :]
            tile = tl.load(weights, mask=there[:, None] & own[None, :], other=0.0).to(tl.float32)
            inner = tl.zeros((BLOCK_R,), dtype=tl.float32)
            for split in tl.static_range(SPLITS):
                inner += tl.load(h + split * H_SPLIT + FIRST_RANK + ranks, mask=there, other=0.0).to(tl.float32)
            inner *= tl.load(of_ranks + adapter * RANKS_STRIDE + ranks, mask=there, other=0.0).to(tl.float32)
            sums += tl.sum(inner[:, None] * tile, axis=0)
        last = of_columns + adapter * COLUMNS_STRIDE + columns - FIRST_COLUMN
        values += sums * tl.load(last, mask=own, other=0.0).to(tl.float32)
    return values


def shrink(x: torch.Tensor, a: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
    """x [requests x M, D_in], a [T, R, D_in], own int64 [requests] or None as in `Expansion` -> fp32 planes
    [splits, requests x M, R], whose sum is the product; zeros for requests without an adapter.

    ValueError on inputs that do not fit each other or are not on a GPU.
    """
    adapters, rank, d_in = a.shape
    requests = adapters if own is None else len(own)
    rows = x.shape[0] // requests
    check("x", x, (requests * rows, d_in), x)
    check_stack("a", a, (adapters, rank, d_in), x)
    check_own(own, x)
    if rows * d_in >= 2**31:
        raise ValueError(f"x: {rows} rows of one adapter are more than 32-bit offsets reach; choose kernels eager")
    chosen = setting("low_rank.shrink", x.device)
    split = chosen["SPLIT_K"]
    splits = triton.cdiv(d_in, split)
    planes = torch.empty(splits, requests * rows, rank, dtype=torch.float32, device=x.device)
    block_m, block_r = tile(rows, 64), tile(rank, 32)
    _shrink[(requests, triton.cdiv(rows, block_m) * triton.cdiv(rank, block_r), splits)](
        x, a, x if own is None else own, planes, rows, rank, d_in, a.stride(0), planes[0].numel(),
        OWN=own is not None, BLOCK_M=block_m, BLOCK_R=block_r, BLOCK_K=tile(d_in, chosen["BLOCK_K"]), SPLIT_K=split,
        UPCAST=INTERPRETED, num_warps=chosen["num_warps"],
    )  # fmt: skip
    return planes


def joined(own: torch.Tensor | None, shared: torch.Tensor) -> torch.Tensor:
    """Planes of ranks that hang on the adapter [splits, rows, any], if there are any, and the one plane of those that
    do not [1, rows, any], side by side."""
    if own is None:
        return shared
    others = torch.cat([shared, shared.new_zeros(len(own) - 1, *shared.shape[1:])])
    return torch.cat([own, others], dim=2)


def as_plane(columns: torch.Tensor, groups: int) -> torch.Tensor:
    """The one plane of what a product gave for the ranks that all adapters share, [rows, R]."""
    return columns.float().unsqueeze(0)


def one_plane(columns: torch.Tensor, adapters: int, shared: int = 0) -> torch.Tensor:
    """What the fused kernels take for h of columns [rows, T x R + shared], what every row gives with every adapter, and
    with any."""
    rows = columns if columns.stride(1) == 1 else columns.contiguous()  # a GPU's product lies in rows
    return rows.unsqueeze(0)


def add_low_rank(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """As `low_rank.eager`, in two launches. ValueError on inputs that do not fit each other or are not on a GPU."""
    groups, rows, d_in = x.shape
    rank, d_out = a.shape[1], b.shape[2]
    check("x", x, (groups, rows, d_in), y)
    check_stack("a", a, (groups, rank, d_in), y)
    check_stack("b", b, (groups, rank, d_out), y)
    check("y", y, (groups, rows, d_out), y)
    planes = shrink(x.view(groups * rows, d_in), a)
    expand(y.view(groups * rows, d_out), planes, Expansion(((0, 0, b),)))


def expand(y: torch.Tensor, planes: torch.Tensor, expansion: Expansion, acts: torch.Tensor | None = None) -> None:
    """As `low_rank.expand`, for many rows of each request, with the planes of `shrink` [splits, rows, R]; one launch
    for each module, and torch's own for a bias and for the products between vectors. ValueError on inputs that do not
    fit each other or are not on a GPU."""
    parts, own = expansion.parts, expansion.own
    every, columns = y.shape
    check_rows("y", y, (every, columns), y)
    check_own(own, y)
    requests = requests_of(expansion.adapters, own, every)
    rows = every // requests
    if planes.shape[1:] != (every, expansion.ranks) or planes.dtype != torch.float32:
        raise ValueError(f"planes: expected fp32 [splits, {every}, {expansion.ranks}], got {list(planes.shape)}")
    if rows * y.stride(0) >= 2**31:
        raise ValueError(f"y: {rows} rows of one adapter are more than 32-bit offsets reach; choose kernels eager")
    chosen = setting("low_rank.expand", y.device)
    for first, column, b in parts:
        rank, d_out = b.shape[1:]
        check_stack("b", b, (expansion.adapters, rank, d_out), y)
        block_m, block_n = tile(rows, 64), tile(d_out, chosen["BLOCK_N"])
        _expand[(requests, triton.cdiv(rows, block_m), triton.cdiv(d_out, block_n))](
            y[:, column:], planes[:, :, first:], b, y if own is None else own,
            rows, rank, d_out, y.stride(0), b.stride(0), planes.stride(0), planes.stride(1),
            SPLITS=len(planes), OWN=own is not None, BLOCK_M=block_m, BLOCK_R=tile(rank, 32), BLOCK_N=block_n,
            UPCAST=INTERPRETED, num_warps=chosen["num_warps"],
        )  # fmt: skip
    if expansion.bias is not None:
        first, bias = expansion.bias
        add_bias(y, first, each_request_s(bias, own), acts)
    for part in expansion.vectors:
        of_ranks, of_columns = (each_request_s(one, own) for one in (part.of_ranks, part.of_columns))
        h = planes.sum(dim=0).to(y.dtype).unflatten(0, (len(of_ranks), -1))
        add_between_vectors(y.unflatten(0, (len(of_ranks), -1)), h, part, of_ranks, of_columns)
