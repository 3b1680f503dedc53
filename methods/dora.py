"""DoRA (Liu et al., 2024): LoRA whose result is given a length of its own, row by row.

y = m (x W + x A B) / |W + A B|, where |.| is the length of each row of the weight as it is stored, [D_out, D_in], and m
[D_out] is trained. The lengths hang on the adapter alone, so that for serving one scale of each output stands for m and
for them (`LayerPlan.magnitude`): LoRA's pair and (IA)3's scale, on every adapted linear. A backbone's bias stays as it
is, which a scale of the output would not leave it: linears with a bias are refused. Parameters: LoRA's, and
`layers.<i>.<module>.magnitude` [D_out].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from perfbench.methods import lora
from perfbench.methods.lora import LoraOptions
from perfbench.methods.parameters import Parameters
from perfbench.methods.plan import LinearOf, row_lengths
from perfbench.methods.shape import BackboneShape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DoraOptions(LoraOptions):
    """As LoRA's: `rank` R; `alpha` (default: the rank); the adapted `modules`; ValueError on `lora_bias`."""

    def __post_init__(self) -> None:
        if self.lora_bias:
            raise ValueError("lora_bias: PEFT has none with DoRA, which scales each row of a weight: leave it out")


Options = DoraOptions
setting_of = lora.setting_of


def shapes(shape: BackboneShape, options: DoraOptions) -> dict[str, tuple[int, ...]]:
    """Trainable parameters: name -> size."""
    sizes = lora.shapes(shape, options)
    lengths = {f"{name[:-2]}.magnitude": size[:1] for name, size in sizes.items() if name.endswith(".b")}
    return sizes | lengths


def initialise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """As LoRA's; magnitudes of 1, which `measure_by` takes for the lengths that the backbone's rows have."""
    if name.endswith(".magnitude"):
        tensor.fill_(1)
    else:
        lora.initialise(name, tensor, generator)


def randomise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """As LoRA's; magnitudes ~ N(1, 0.1), as for `initialise`."""
    if name.endswith(".magnitude"):
        tensor.normal_(1, 0.1, generator=generator)
    else:
        lora.randomise(name, tensor, generator)


def measure_by(parameters: Parameters, linear_of: LinearOf) -> None:
    """Turns magnitudes that count in the lengths of the backbone's rows into ones as they are trained."""
    for name, magnitude in parameters.items():
        if name.endswith(".magnitude"):
            _, layer, module, _ = name.split(".")
            magnitude *= row_lengths(linear_of(int(layer), module), module, None).to(magnitude)


# PEFT has DoRA as a switch of LoRA: with the magnitudes the same functions plan, write and read it.
plan = lora.plan
save = lora.save
load = lora.load
