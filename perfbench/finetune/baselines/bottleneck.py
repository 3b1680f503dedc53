"""The residual bottleneck that the adapter baselines share, and how a baseline is put on a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, linear

Activation = Callable[[torch.Tensor], torch.Tensor]


class Bottleneck(nn.Module):
    """x -> act(x down^T) up^T, without biases; `up` starts at zero, so that the model starts as the backbone."""

    def __init__(self, size: int, bottleneck: int, activation: Activation = gelu):
        super().__init__()
        self.down = nn.Parameter(torch.empty(bottleneck, size).uniform_(-1 / math.sqrt(size), 1 / math.sqrt(size)))
        self.up = nn.Parameter(torch.zeros(size, bottleneck))
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., size], computed in the type of the parameters."""
        inner = self.activation(linear(x.to(self.down.dtype), self.down))
        return linear(inner, self.up).to(x.dtype)


def first(output: Any) -> torch.Tensor:
    """The hidden states of what a sublayer gives, which may be a tuple that begins with them."""
    return output[0] if isinstance(output, tuple) else output


def plus(output: Any, delta: torch.Tensor) -> Any:
    """The same with `delta` added to the hidden states."""
    return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter lies."""
    return next(module.parameters()).device
