"""What every Triton launcher needs: its inputs checked, its tiles rounded."""

from __future__ import annotations

import torch
import triton

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
