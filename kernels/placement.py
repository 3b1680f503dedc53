"""Whether a tensor lies on a GPU, or on a CPU and stands in for one that does while kernels are only compiled; and
whether oneDNN can multiply it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_standing_in = False
# Asked once: torch.compile, which follows the code that asks, can't follow torch's own answers.
_ONEDNN = torch.backends.mkldnn.is_available()
_ONEDNN_BF16: bool = _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is to be treated as one on a GPU."""
    return tensor.is_cuda or _standing_in


def onednn_has(tensor: torch.Tensor) -> bool:
    """Whether oneDNN multiplies tensors of this dtype where this one lies: on a CPU in fp32, and in bf16 on a processor
    with the instructions for it."""
    if on_gpu(tensor) or tensor.device.type != "cpu":
        return False
    return _ONEDNN_BF16 if tensor.dtype == torch.bfloat16 else _ONEDNN and tensor.dtype == torch.float32


@contextmanager
def standing_in() -> Iterator[None]:
    """Within it, every tensor counts as one on a GPU: whoever asks takes the path that a GPU takes. Nothing runs
    there, so that it is of use only where launches are recorded (`ahead_of_time`)."""
    global _standing_in
    before, _standing_in = _standing_in, True
    try:
        yield
    finally:
        _standing_in = before
