"""What the Triton launchers share: inputs checked, tiles rounded, the arguments of a fused expand and scale."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver

from perfbench.kernels.low_rank import Expansion
from perfbench.kernels.placement import on_gpu
from perfbench.kernels.rotation import Rotation
from perfbench.kernels.row_scale import Scale
from perfbench.kernels.settings import Setting, setting

# Below 16 tl.dot has no instruction to compile to.
SMALLEST_TILE = 16
# Of an adapter's weights that a thread has in registers, in one tile and in all, and the ranks of a tile: with more it
# spills.
TILE_BYTES, NEAR_BYTES, MOST_RANKS = 128, 384, 16
# Of shared memory for tiles of adapters on their way; what any GPU has, with room beside it.
PIPELINE_BYTES = 64 * 1024
# Rows that Triton's product takes: as many as one instruction does beside a tile of W; more are the library's.
MOST_ROWS = 16
# The compute capability from which on a kernel can start before the one ahead of it has ended.
EARLY_START = (9, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter takes bf16 for raw bits, and anything runs there only to be checked.
INTERPRETED = bool(triton.knobs.runtime.interpret)


class Expand(NamedTuple):
    """What a fused kernel is told of the expand. tensors: h, and which adapter each request has; numbers: elements of h
    between splits and rows, and rows of a request; modules: for each (b, first rank, elements of h between adapters,
    ranks, first column, columns, elements between adapters), or of a shared b (b, first rank, ranks, first column,
    columns, vectors of ranks, elements between them, vectors of columns, elements between them), or of a bias (bias,
    first column, columns, elements between adapters); most_ranks: of one
    module; apart: whether no column is of two modules; constants by name."""

    tensors: tuple[torch.Tensor, torch.Tensor]
    numbers: tuple[int, int, int]
    modules: tuple[tuple[Any, ...], ...]
    most_ranks: int
    apart: bool
    constants: dict[str, Any]


class Scaling(NamedTuple):
    """What a fused kernel is told of the scales. tensors: the scales, and which of them each request has; numbers:
    elements between adapters, first column, columns, rows of a request; constants by name."""

    tensors: tuple[torch.Tensor, torch.Tensor]
    numbers: tuple[int, int, int, int]
    constants: dict[str, Any]


class Turning(NamedTuple):
    """What a fused kernel is told of the rotation. tensors: the sines, and which of them each request has; numbers:
    elements between adapters, first column, columns, rows of a request; constants by name."""

    tensors: tuple[torch.Tensor, torch.Tensor]
    numbers: tuple[int, int, int, int]
    constants: dict[str, Any]


def tile(size: int, largest: int) -> int:
    """The power of two that covers `size`, at least SMALLEST_TILE and at most `largest`."""
    return max(SMALLEST_TILE, min(triton.next_power_of_2(size), largest))


def of_few_rows(x: torch.Tensor) -> Setting | None:
    """How Triton's product is launched for so many rows of x's type; None where the library's takes its place: by
    default on a GPU on which it was not timed (BLOCK_N 0), with more than MOST_ROWS rows, and in 32 bits."""
    chosen = setting("few_rows_product", x.device)
    return chosen if chosen["BLOCK_N"] and len(x) <= MOST_ROWS and x.dtype.itemsize == 2 else None


def starts_early(like: torch.Tensor) -> bool:
    """Whether the GPU of `like` can start a kernel before the one ahead of it has ended."""
    return not INTERPRETED and _starts_early(like.device.index if like.is_cuda else None)


def early_start(product: torch.Tensor) -> dict[str, bool]:
    """Options of the launch of an epilogue, which calls `early_start_triton.wait`: it starts early where `product`
    [rows, D] was made by Triton's product, which lets it."""
    if of_few_rows(product) is None or not starts_early(product):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


@cache
def _starts_early(index: int | None) -> bool:
    """Of the CUDA device of this number; None: of the driver's, which is no GPU while launches are only recorded."""
    if index is not None:
        return torch.cuda.get_device_capability(index) >= EARLY_START
    return int(driver.active.get_current_target().arch) >= 10 * EARLY_START[0]


def check(name: str, tensor: torch.Tensor, sizes: tuple[int, ...], like: torch.Tensor) -> None:
    """ValueError unless `tensor` has these sizes, the type and device of `like`, and lies in rows without gaps."""
    _check_kind(name, tensor, sizes, like)
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def check_rows(name: str, tensor: torch.Tensor, sizes: tuple[int, int], like: torch.Tensor) -> None:
    """The same of a matrix whose rows may have gaps between them."""
    _check_kind(name, tensor, sizes, like)
    if tensor.stride(1) != 1 and sizes[1] > 1:
        raise ValueError(f"{name}: expected rows without gaps in them, got strides {tensor.stride()}")


def check_stack(name: str, tensor: torch.Tensor, sizes: tuple[int, ...], like: torch.Tensor) -> None:
    """The same of adapters [T, ...], each without gaps, with whatever else lies in between."""
    _check_kind(name, tensor, sizes, like)
    if not tensor[0].is_contiguous():
        raise ValueError(f"{name}: expected adapters without gaps in them, got strides {tensor.stride()}")


def _check_kind(name: str, tensor: torch.Tensor, sizes: tuple[int, ...], like: torch.Tensor) -> None:
    if tuple(tensor.shape) != sizes:
        raise ValueError(f"{name}: expected sizes {list(sizes)}, got {list(tensor.shape)}")
    if tensor.dtype != like.dtype or tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: expected {like.dtype}, one of fp32, bf16, fp16, got {tensor.dtype}")
    if tensor.device != like.device or not (on_gpu(tensor) or INTERPRETED):
        raise ValueError(f"{name}: expected a tensor on one CUDA device, got {tensor.device}; choose kernels eager")


def check_own(own: torch.Tensor | None, like: torch.Tensor) -> None:
    """ValueError unless `own` is None, or int64 [requests] beside `like`."""
    if own is not None and (own.dtype != torch.int64 or own.dim() != 1 or own.device != like.device):
        raise ValueError(f"own: expected int64 [requests] on {like.device}, got {own.dtype} {list(own.shape)}")


def requests_of(stacked: int, own: torch.Tensor | None, rows: int) -> int:
    """How many requests share `rows`, a divisor of them. ValueError."""
    requests = stacked if own is None else len(own)
    if requests == 0 or rows % requests:
        raise ValueError(f"own: expected a request for each of the {rows} rows or for as many of them, got {requests}")
    return requests


def scale_arguments(scale: Scale | None, y: torch.Tensor) -> Scaling:
    """What a fused kernel that scales y [rows, D] is told. Without a scale y stands in, unread. ValueError."""
    if scale is None:
        return Scaling((y, y), (0, 0, 0, 1), {"SCALED": False, "SCALE_OWN": False})
    minus_one, first, own = scale
    check_rows("scale_minus_one", minus_one, (len(minus_one), minus_one.shape[-1]), y)
    check_own(own, y)
    columns = minus_one.shape[1]
    if first + columns > y.shape[1]:
        raise ValueError(f"scale_minus_one: expected at most {y.shape[1] - first} columns, got {columns}")
    rows = len(y) // requests_of(len(minus_one), own, len(y))
    return Scaling(
        (minus_one, y if own is None else own),
        (minus_one.stride(0), first, columns, rows),
        {"SCALED": True, "SCALE_OWN": own is not None},
    )


def turn_arguments(rotation: Rotation | None, y: torch.Tensor) -> Turning:
    """What a fused kernel that rotates y [rows, D] is told. Without a rotation y stands in, unread. ValueError."""
    if rotation is None:
        return Turning((y, y), (0, 0, 0, 1), {"TURNED": False, "SINE_OWN": False, "SINE_HALF": 1})
    sine, half, first, own = rotation
    columns = sine.shape[-1]
    check_rows("sine", sine, (len(sine), columns), y)
    check_own(own, y)
    if first + columns > y.shape[1] or half < 1 or columns % (2 * half):
        raise ValueError(f"sine: expected groups of {2 * half} of the {y.shape[1] - first} columns, got {columns}")
    rows = len(y) // requests_of(len(sine), own, len(y))
    return Turning(
        (sine, y if own is None else own),
        (sine.stride(0), first, columns, rows),
        {"TURNED": True, "SINE_OWN": own is not None, "SINE_HALF": half},
    )


def expand_arguments(h: torch.Tensor | None, expansion: Expansion | None, y: torch.Tensor) -> Expand:
    """What a fused kernel that expands onto y [rows, D] is told.

    h: [splits, rows, R], or [1, rows, T x R] with every row's ranks with every adapter (but once those that are shared,
    which come last), in any type. Without an expansion y stands in, unread. ValueError.
    """
    if h is None or expansion is None:
        return Expand((y, y), (0, 0, 1), (), 1, True, {"SPLITS": 1, "OWN": False})
    parts, _, own, shared, vectors, bias, _ = expansion
    ranks, adapters = expansion.ranks, expansion.adapters
    every = adapters * (ranks - shared) + shared
    check_own(own, y)
    if h.dim() != 3 or h.shape[1] != len(y) or h.shape[2] not in (ranks, every) or h.stride(2) != 1:
        raise ValueError(f"h: expected [splits, {len(y)}, {ranks} or {every}], got {list(h.shape)}")
    modules: list[tuple[Any, ...]] = []
    for rank, column, b in parts:
        check_stack("b", b, (adapters, b.shape[1], b.shape[2]), y)
        if rank < ranks - shared:  # its ranks with one adapter follow those of all modules with the one before
            first, between = rank, ranks - shared if h.shape[2] != ranks else 0
        else:
            first, between = rank + h.shape[2] - ranks, 0
        modules.append((b, first, between, b.shape[1], column, b.shape[2], b.stride(0)))
    for rank, column, b, of_ranks, of_columns in vectors:
        check("b", b, tuple(b.shape), y)
        check_stack("of_ranks", of_ranks, (adapters, len(b)), y)
        check_stack("of_columns", of_columns, (adapters, b.shape[1]), y)
        two = of_ranks, of_ranks.stride(0), of_columns, of_columns.stride(0)
        modules.append((b, rank + h.shape[2] - ranks, len(b), column, b.shape[1], *two))
    if bias is not None:
        first, added = bias
        check_stack("bias", added.unsqueeze(1), (adapters, 1, added.shape[1]), y)
        modules.append((added, first, added.shape[1], added.stride(0)))
    return Expand(
        (h, y if own is None else own),
        (h.stride(0), h.stride(1), len(y) // requests_of(adapters, own, len(y))),
        tuple(modules),
        max([b.shape[1] for _, _, b in parts] + [len(part.b) for part in vectors]),
        _apart(parts),
        {"SPLITS": len(h), "OWN": own is not None},
    )


def _apart(parts: Sequence[tuple[int, int, torch.Tensor]]) -> bool:
    """Whether no column is of two of them: it is where tenants of unlike methods share a bank."""
    stretches = sorted((first, first + b.shape[2]) for _, first, b in parts)
    return all(end <= begin for (_, end), (begin, _) in pairwise(stretches))


def rank_tiles(expand: Expand, block: int, num_warps: int, places: int = 1) -> dict[str, int]:
    """How a program takes the ranks of `places` times `block` columns. The first of them are in its registers before
    the product is there, as a tile of BLOCK_R and one of NEXT_R ranks: TILE_BYTES of a thread at most in a tile and
    NEAR_BYTES in all; 0 where a column is of two modules. Of the ranks that follow FAR_R are one tile, of which
    STAGES - 1 are on their way while one is added; STAGES 0: there are none."""
    most, of_thread = expand.most_ranks, 32 * num_warps
    bytes_of_rank = block * expand.tensors[0].element_size()
    # In halves, but for the fewest: what a tile is in fp32 takes twice its registers.
    half = triton.next_power_of_2(most if most <= 4 else -(-most // 2))
    ranks = min(half, MOST_RANKS, max(1, TILE_BYTES * of_thread // bytes_of_rank))
    near, following = ranks, 0
    if not expand.apart:
        near = 0
    elif most > ranks:
        following = min(ranks, triton.next_power_of_2(most - ranks))
        if (ranks + following) * bytes_of_rank * places > NEAR_BYTES * of_thread:
            following = 0
    far = max(1, min(ranks, PIPELINE_BYTES // (2 * bytes_of_rank)))
    stages = 1 + max(1, min(3, PIPELINE_BYTES // (far * bytes_of_rank)))
    return {"BLOCK_R": near, "NEXT_R": following, "FAR_R": far, "STAGES": stages if most > near + following else 0}
