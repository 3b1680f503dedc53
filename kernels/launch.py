"""What the Triton launchers share: inputs checked, tiles rounded, the arguments of a fused expand."""

from __future__ import annotations

from typing import Any

import torch
import triton

from perfbench.kernels.low_rank import Expansion

# Below 16 tl.dot has no instruction to compile to.
SMALLEST_TILE = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter takes bf16 for raw bits, and anything runs there only to be checked.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def tile(size: int, largest: int) -> int:
    """The power of two that covers `size`, at least SMALLEST_TILE and at most `largest`."""
    return max(SMALLEST_TILE, min(triton.next_power_of_2(size), largest))


def check(name: str, tensor: torch.Tensor, sizes: tuple[int, ...], like: torch.Tensor) -> None:
    """ValueError unless `tensor` has these sizes, the type and device of `like`, and lies in rows without gaps."""
    if tuple(tensor.shape) != sizes:
        raise ValueError(f"{name}: expected sizes {list(sizes)}, got {list(tensor.shape)}")
    if tensor.dtype != like.dtype or tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: expected {like.dtype}, one of fp32, bf16, fp16, got {tensor.dtype}")
    if tensor.device != like.device or not (tensor.is_cuda or INTERPRETED):
        raise ValueError(f"{name}: expected a tensor on one CUDA device, got {tensor.device}; choose kernels eager")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def check_scale(scale: torch.Tensor | None, first: int, y: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(scale [G, columns], rows of y [rows, D] for each of its groups); without one y stands in, unread. ValueError."""
    if scale is None:
        return y, len(y)
    check("scale_minus_one", scale, tuple(scale.shape), y)
    if len(y) % len(scale) or first + scale.shape[1] > y.shape[1]:
        raise ValueError(
            f"scale_minus_one: expected a group for each of the {len(y)} rows or for as many of them, and at most "
            f"{y.shape[1] - first} columns, got {list(scale.shape)}"
        )
    return scale, len(y) // len(scale)


def parts_of(
    planes: torch.Tensor | None, expansion: Expansion | None, y: torch.Tensor, most: int = 3
) -> tuple[list[Any], int, int]:
    """(arguments, number of modules, number of planes) of a fused kernel that expands at most `most` modules.

    Arguments: planes, each b, then for each (first rank, ranks, first column, columns), all ranks, a plane's size;
    where a module is not there y stands in, unread. ValueError.
    """
    if planes is None or expansion is None:
        return [y] * (1 + most) + [0] * (4 * most + 2), 0, 1
    splits, groups, rows, ranks = planes.shape
    if groups * rows != len(y) or len(expansion.parts) > most:
        raise ValueError(f"planes: expected {len(y)} rows and at most {most} modules, got {list(planes.shape)}")
    tensors: list[torch.Tensor] = []
    numbers: list[int] = []
    for rank, column, b in expansion.parts:
        check("b", b, (groups, b.shape[1], b.shape[2]), y)
        tensors.append(b)
        numbers += [rank, b.shape[1], column, b.shape[2]]
    missing = most - len(tensors)
    arguments = [planes, *tensors, *[y] * missing, *numbers, *[0] * (4 * missing), ranks, planes[0].numel()]
    return arguments, len(tensors), splits
