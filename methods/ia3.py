"""(IA)3 as the two papers have it: y = (x W) * l on Q, K and Up, with l = 1 + z P.

z of dimension 16 and P [16, D_out] are learned (our reading of the papers' 9.8M parameters; the 1 is a constant).
For serving, z P is computed once: a tenant costs one vector for each module. Parameters: `layers.<i>.<module>.z`
[dim] and `.p` [dim, D_out].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from perfbench.methods.checkpoints import adapter_folder
from perfbench.methods.checkpoints import ia3 as ia3_checkpoint
from perfbench.methods.checkpoints import projected_ia3 as projected_ia3_checkpoint
from perfbench.methods.options import RANK, MethodOptions
from perfbench.methods.parameters import Parameters
from perfbench.methods.plan import AdapterPlan, LayerPlan
from perfbench.methods.shape import BackboneShape

if TYPE_CHECKING:
    import torch

IA3_MODULES = ("q", "k", "up")


@dataclass(frozen=True)
class Ia3Options(MethodOptions):
    """The papers' variant: l = 1 + z P with z of dimension `dim`."""

    dim: int = field(default=16, metadata={**RANK, "description": "the length of the short vector z in l = 1 + z P"})


Options = Ia3Options


def shapes(shape: BackboneShape, options: Ia3Options) -> dict[str, tuple[int, ...]]:
    """Trainable parameters: name -> size."""
    sizes: dict[str, tuple[int, ...]] = {}
    for index in range(shape.layers):
        for module in IA3_MODULES:
            sizes[f"layers.{index}.{module}.z"] = (options.dim,)
            sizes[f"layers.{index}.{module}.p"] = (options.dim, shape.features(module)[1])
    return sizes


def initialise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """z ~ N(0, 1), P zero: l starts at 1."""
    if name.endswith(".z"):
        tensor.normal_(0, 1, generator=generator)
    else:
        tensor.zero_()


def randomise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """z ~ N(0, 1) and P so that l - 1 has a standard deviation near a quarter: activations keep their size."""
    if name.endswith(".z"):
        tensor.normal_(0, 1, generator=generator)
    else:
        tensor.normal_(0, 0.25 / math.sqrt(tensor.shape[0]), generator=generator)


def scale_minus_one(z: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """l - 1 = z P, [D_out]."""
    return z @ p


def plan(parameters: Parameters, shape: BackboneShape, options: Ia3Options) -> AdapterPlan:
    """Stored scales: l - 1 = z P."""
    return tuple(
        LayerPlan(
            scale_minus_one={
                m: scale_minus_one(parameters[f"layers.{i}.{m}.z"], parameters[f"layers.{i}.{m}.p"])
                for m in IA3_MODULES
            }
        )
        for i in range(shape.layers)
    )


def save(parameters: Parameters, shape: BackboneShape, options: Ia3Options, folder: Path, backbone: str) -> None:
    """Writes a PEFT (IA)3 checkpoint folder with l itself, which PEFT can serve; z and P are not kept apart."""
    scales = {
        (index, module): 1 + scale
        for index, layer in enumerate(plan(parameters, shape, options))
        for module, scale in layer.scale_minus_one.items()
    }
    ia3_checkpoint.save(scales, folder, backbone)


def load(folder: Path, shape: BackboneShape, options: Ia3Options) -> AdapterPlan:
    """The plan of a folder with z and P, as training writes it, or with l on Q, K and Up. Raises AdapterError."""
    if adapter_folder.peft_type(folder) == projected_ia3_checkpoint.PEFT_TYPE:
        return plan(projected_ia3_checkpoint.load(folder, shape, IA3_MODULES), shape, options)
    scales = ia3_checkpoint.load(folder, shape, IA3_MODULES)
    return tuple(
        LayerPlan(scale_minus_one={m: scales[i, m] - 1 for m in IA3_MODULES if (i, m) in scales})
        for i in range(shape.layers)
    )
