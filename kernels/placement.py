"""Whether a tensor lies on a GPU, or on a CPU and stands in for one that does while kernels are only compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_standing_in = False


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is to be treated as one on a GPU."""
    return tensor.is_cuda or _standing_in


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
