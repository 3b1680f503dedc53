"""The learned adapter: one bottleneck from the input of a whole layer to its output, with a learned activation.

The activation is rational, P(x) / Q(x) of degrees 5 and 4 with Q > 0, one for each layer, and starts as GeLU to within
0.005 on [-3, 3]. On LLaMA-2 7B 9,437,504 parameters; the paper prints 9.5M (0.7% more) and does not say what else it
trains. Places and activations are given here, where the original searches them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from perfbench.finetune.baselines.bottleneck import Bottleneck, device_of, plus
from perfbench.methods.options import SIZE
from perfbench.methods.shape import BackboneShape

# Fitted to GeLU by least squares on [-3, 3].
NUMERATOR = (-0.00124, 0.50805, 0.41586, 0.13023, 0.02436, 0.0029)
# The last one is 0 in the fit, where |b| would have no slope to learn from.
DENOMINATOR = (-0.06675, 0.17928, 0.03747, 0.00001)


@dataclass(frozen=True)
class LearnedAdapterOptions:
    """`bottleneck`: its width."""

    bottleneck: int = field(default=36, metadata=SIZE)


class Rational(nn.Module):
    """P(x) / (1 + |b1 x| + ... + |b4 x^4|)."""

    def __init__(self) -> None:
        super().__init__()
        self.numerator = nn.Parameter(torch.tensor(NUMERATOR))
        self.denominator = nn.Parameter(torch.tensor(DENOMINATOR))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Element by element, by Horner's rule."""
        over = self.numerator[-1].expand_as(x)
        for coefficient in self.numerator[:-1].flip(0):
            over = over * x + coefficient
        under, size = torch.zeros_like(x), x.abs()
        for coefficient in self.denominator.abs().flip(0):
            under = (under + coefficient) * size
        return over / (1 + under)


def attach(model: Any, shape: BackboneShape, options: LearnedAdapterOptions) -> Any:
    """Adds a bottleneck beside each layer of a frozen model."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.learned_adapter = Bottleneck(shape.hidden, options.bottleneck, Rational()).to(device_of(layer))
        layer.register_forward_hook(_add, with_kwargs=True)
    return model


def _add(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    return plus(output, layer.learned_adapter(args[0] if args else kwargs["hidden_states"]))
