"""MiSS (Kang and Yin, 2024, once Bone): y = x W + s B, s_j being the sum of all x_k with k % R = j.

The first half of the low-rank pair is no matrix but a grouped sum of the input, so that an adapter has B alone.
Parameters: `layers.<i>.<module>.block` [R, D_out].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from perfbench.methods.checkpoints import miss as miss_checkpoint
from perfbench.methods.options import MODULES_OF_A_LAYER, RANK, MethodOptions
from perfbench.methods.parameters import Parameters
from perfbench.methods.plan import AdapterPlan, LayerPlan
from perfbench.methods.shape import MODULES, BackboneShape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MissOptions(MethodOptions):
    """`rank` R, by default as many parameters as LoRA of rank 4 has, about; the adapted `modules`."""

    rank: int = field(default=8, metadata=RANK)
    modules: tuple[str, ...] = field(
        default=MODULES,
        metadata={
            **MODULES_OF_A_LAYER,
            "description": "the linear modules that are adapted in every layer; default: all seven",
        },
    )


Options = MissOptions


def shapes(shape: BackboneShape, options: MissOptions) -> dict[str, tuple[int, ...]]:
    """Trainable parameters: name -> size. ValueError where a module has fewer inputs than ranks."""
    sizes: dict[str, tuple[int, ...]] = {}
    for index in range(shape.layers):
        for module in MODULES:
            if module in options.modules:
                d_in, d_out = shape.features(module)
                if options.rank > d_in:
                    raise ValueError(f"rank {options.rank}: {module} has {d_in} inputs, expected at least as many")
                sizes[f"layers.{index}.{module}.block"] = (options.rank, d_out)
    return sizes


def initialise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Zeros."""
    tensor.zero_()


def randomise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Values for which what is added has about the size of x W for weights of standard deviation 0.02: R sums add up
    as many inputs as there are, each with one number of a column."""
    tensor.normal_(0, 0.01 * math.sqrt(2), generator=generator)


def plan(parameters: Parameters, shape: BackboneShape, options: MissOptions) -> AdapterPlan:
    """Grouped sums; an adapter may lack some modules."""
    return tuple(
        LayerPlan(
            grouped={
                module: parameters[name]
                for module in MODULES
                if (name := f"layers.{index}.{module}.block") in parameters
            }
        )
        for index in range(shape.layers)
    )


def save(parameters: Parameters, shape: BackboneShape, options: MissOptions, folder: Path, backbone: str) -> None:
    """Writes a PEFT MiSS checkpoint folder."""
    miss_checkpoint.save(parameters, folder, backbone)


def load(folder: Path, shape: BackboneShape, options: MissOptions) -> AdapterPlan:
    """The plan of a PEFT MiSS checkpoint folder, whose rank and modules are its own. Raises AdapterError."""
    return plan(miss_checkpoint.load(folder, shape), shape, options)
