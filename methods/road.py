"""RoAd (Liao et al., 2024): the outputs of a linear are rotated in pairs, and stretched.

y_i := x_i alpha_i cos theta_i -+ x_j alpha_j' sin theta_j', where j is the output that i is paired with: in each group
of `group_size` outputs those that lie half a group apart. Variant 1 has one angle and one alpha for each pair, 2 one
for each output, 4 one for each of the four numbers of a pair's matrix. For serving cosine and sine are computed once,
so that a tenant of any variant takes two numbers for each output. Parameters: `layers.<i>.<module>.theta` and
`.alpha`, of D_out / 2, D_out or 2 D_out numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from perfbench.methods.checkpoints import road as road_checkpoint
from perfbench.methods.checkpoints.road import ANGLES
from perfbench.methods.options import MODULES_OF_A_LAYER, MethodOptions
from perfbench.methods.parameters import Parameters
from perfbench.methods.plan import AdapterPlan, LayerPlan, Rotation
from perfbench.methods.shape import MODULES, BackboneShape

if TYPE_CHECKING:
    import torch

# PEFT's own size of a group, which not every backbone's outputs are divisible by.
LARGEST_GROUP = 64


@dataclass(frozen=True)
class RoadOptions(MethodOptions):
    """`variant`, by PEFT's name; `group_size`, None for the largest that fits; the rotated `modules`. ValueError where
    a group is no pairs."""

    variant: Literal["road_1", "road_2", "road_4"] = field(
        default="road_1",
        metadata={"description": "how many angles a pair of outputs has: 1, 2 or 4"},
    )
    group_size: int | None = field(
        default=None,
        metadata={
            "minimum": 2,
            "description": "in groups of so many outputs those half a group apart are a pair; null or absent: "
            f"{LARGEST_GROUP} as PEFT has it, or the largest power of two below that all outputs are divisible by",
        },
    )
    modules: tuple[str, ...] = field(
        default=MODULES,
        metadata={
            **MODULES_OF_A_LAYER,
            "description": "the linear modules whose outputs are rotated in every layer; default: all seven",
        },
    )

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size % 2:
            raise ValueError(f"group_size: expected an even number, got {self.group_size}")


Options = RoadOptions


def group_size(shape: BackboneShape, options: RoadOptions) -> int:
    """The size of a group. ValueError where some module's outputs are not divisible by it."""
    outputs = {module: shape.features(module)[1] for module in options.modules}
    if options.group_size is None:
        return math.gcd(LARGEST_GROUP, *outputs.values())
    for module, columns in outputs.items():
        if columns % options.group_size:
            raise ValueError(f"group_size {options.group_size}: {module} has {columns} outputs, no multiple of it")
    return options.group_size


def shapes(shape: BackboneShape, options: RoadOptions) -> dict[str, tuple[int, ...]]:
    """Trainable parameters: name -> size."""
    group_size(shape, options)
    return {
        f"layers.{index}.{module}.{kind}": (shape.features(module)[1] * ANGLES[options.variant] // 2,)
        for index in range(shape.layers)
        for module in MODULES
        if module in options.modules
        for kind in ("theta", "alpha")
    }


def initialise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """No angle, and alpha 1."""
    tensor.fill_(1 if name.endswith(".alpha") else 0)


def randomise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """theta ~ N(0, 0.25), alpha ~ N(1, 0.25): activations keep their size."""
    tensor.normal_(1 if name.endswith(".alpha") else 0, 0.25, generator=generator)


def plan(parameters: Parameters, shape: BackboneShape, options: RoadOptions) -> AdapterPlan:
    """The cosines as scales, the sines as rotations; an adapter may lack some modules."""
    size = group_size(shape, options)
    layers = []
    for index in range(shape.layers):
        scales, rotations = {}, {}
        for module in MODULES:
            name = f"layers.{index}.{module}"
            if f"{name}.theta" in parameters:
                theta, alpha = parameters[f"{name}.theta"], parameters[f"{name}.alpha"]
                cosine, sine = own_and_partner(theta, alpha, options.variant, size)
                scales[module], rotations[module] = cosine - 1, Rotation(sine, size // 2)
        layers.append(LayerPlan(scale_minus_one=scales, rotation=rotations))
    return tuple(layers)


def own_and_partner(
    theta: torch.Tensor, alpha: torch.Tensor, variant: str, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what an output is multiplied by, what its partner is multiplied by), both [D_out]."""
    # In variant 1 both outputs of a pair have its angle; in 4 the cosines of a group come before its sines.
    per_group = {"road_1": (1, size // 2), "road_2": (1, size), "road_4": (2, size)}[variant]
    angles, stretches = (numbers.reshape(-1, *per_group) for numbers in (theta, alpha))
    if variant == "road_1":
        angles, stretches = (numbers.repeat(1, 1, 2) for numbers in (angles, stretches))
    cosine, sine = stretches[:, 0] * angles[:, 0].cos(), stretches[:, -1] * angles[:, -1].sin()
    # The first of a pair takes its partner's part off, the second adds it.
    sign = sine.new_ones(size)
    sign[: size // 2] = -1
    return cosine.flatten(), (sine * sign).flatten()


def save(parameters: Parameters, shape: BackboneShape, options: RoadOptions, folder: Path, backbone: str) -> None:
    """Writes a PEFT RoAd checkpoint folder."""
    road_checkpoint.save(parameters, options.variant, group_size(shape, options), folder, backbone)


def load(folder: Path, shape: BackboneShape, options: RoadOptions) -> AdapterPlan:
    """The plan of a PEFT RoAd checkpoint folder, whose variant, groups and modules are its own, whatever `options`
    say. Raises AdapterError."""
    parameters, variant, size = road_checkpoint.load(folder, shape)
    modules = tuple(module for module in MODULES if any(f".{module}." in name for name in parameters))
    return plan(parameters, shape, RoadOptions(variant=variant, group_size=size, modules=modules))
