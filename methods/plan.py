"""The layer plan: the only form in which a method reaches a runtime.

A plan says, for each layer, which modules get a low-rank pair, which get a scale, and whether the scales are made
by a generator from the prompt. No runtime and no kernel names a method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# The modules whose output may be scaled. A scale on down's *input* is a scale on up's output.
SCALED_MODULES = ("q", "k", "v", "up")


@dataclass(frozen=True)
class LowRank:
    """y += (x a^T) b, with a: [R, D_in] and b: [R, D_out]; alpha / rank is folded into b."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class Generator:
    """PARA's vector generator (eq. 6): l - 1 = GELU(h w_down) w_up + (bias - 1), split over `modules`.

    w_down: [hidden, R], w_up: [R, D], bias_minus_one: [D], where D is the sum of D_out over `modules`;
    h: the layer's input at the last prompt token, after the layer's input norm if `normalised`.
    """

    w_down: torch.Tensor
    w_up: torch.Tensor
    bias_minus_one: torch.Tensor
    modules: tuple[str, ...]
    normalised: bool = False

    def map(self, make: Callable[[torch.Tensor], torch.Tensor]) -> Generator:
        """The same with `make` of each tensor."""
        return Generator(make(self.w_down), make(self.w_up), make(self.bias_minus_one), self.modules, self.normalised)


@dataclass(frozen=True)
class LayerPlan:
    """What one layer gets. `scale_minus_one`: module -> [D_out]; l - 1 is kept because bf16's step just above 1
    is 2^-7, while near 0 it keeps 8 bits of any difference."""

    low_rank: dict[str, LowRank] = field(default_factory=dict)
    scale_minus_one: dict[str, torch.Tensor] = field(default_factory=dict)
    generator: Generator | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the plan."""
        found = [t for pair in self.low_rank.values() for t in (pair.a, pair.b)]
        found += self.scale_minus_one.values()
        if self.generator is not None:
            found += [self.generator.w_down, self.generator.w_up, self.generator.bias_minus_one]
        return found

    def map(self, make: Callable[[torch.Tensor], torch.Tensor]) -> LayerPlan:
        """The same with `make` of each tensor, called in the order of `tensors`."""
        return LayerPlan(
            {module: LowRank(make(pair.a), make(pair.b)) for module, pair in self.low_rank.items()},
            {module: make(scale) for module, scale in self.scale_minus_one.items()},
            None if self.generator is None else self.generator.map(make),
        )


# One LayerPlan for each layer of the backbone.
AdapterPlan = tuple[LayerPlan, ...]


def plan_bytes(plan: AdapterPlan, dtype: torch.dtype) -> int:
    """Bytes that one adapter of this plan takes when it is served in `dtype`."""
    return sum(t.numel() for layer in plan for t in layer.tensors()) * dtype.itemsize
