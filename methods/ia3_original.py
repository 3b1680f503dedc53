"""(IA)3 as Liu et al. (2022) have it, and as PEFT does: vectors on K, on V and on the input of down.

down's input is act(gate) * up, so a scale on it is a scale on up's output, and that is how it is served.
Parameters: `layers.<i>.<module>.l` for k, v [D_out] and for down [D_in].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from perfbench.methods.checkpoints import ia3 as ia3_checkpoint
from perfbench.methods.options import MethodOptions
from perfbench.methods.parameters import Parameters
from perfbench.methods.plan import AdapterPlan, LayerPlan
from perfbench.methods.shape import BackboneShape

if TYPE_CHECKING:
    import torch

IA3_MODULES = ("k", "v", "down")


@dataclass(frozen=True)
class Ia3OriginalOptions(MethodOptions):
    """(IA)3 as Liu et al. (2022) have it: one vector each for K, V and the input of down."""


Options = Ia3OriginalOptions


def shapes(shape: BackboneShape, options: Ia3OriginalOptions) -> dict[str, tuple[int, ...]]:
    """Trainable parameters: name -> size."""
    sizes: dict[str, tuple[int, ...]] = {}
    for index in range(shape.layers):
        for module in IA3_MODULES:
            d_in, d_out = shape.features(module)
            sizes[f"layers.{index}.{module}.l"] = (d_in if module == "down" else d_out,)
    return sizes


def initialise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Ones."""
    tensor.fill_(1)


def randomise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """N(1, 0.25): activations keep their size."""
    tensor.normal_(1, 0.25, generator=generator)


def plan(parameters: Parameters, shape: BackboneShape, options: Ia3OriginalOptions) -> AdapterPlan:
    """Stored scales on k, v and up; an adapter may lack some."""
    layers = []
    for index in range(shape.layers):
        places = {m: parameters.get(f"layers.{index}.{m}.l") for m in IA3_MODULES}
        scales = {"up" if m == "down" else m: scale - 1 for m, scale in places.items() if scale is not None}
        layers.append(LayerPlan(scale_minus_one=scales))
    return tuple(layers)


def save(
    parameters: Parameters, shape: BackboneShape, options: Ia3OriginalOptions, folder: Path, backbone: str
) -> None:
    """Writes a PEFT (IA)3 checkpoint folder with down_proj as its feedforward module."""
    scales = {}
    for name, scale in parameters.items():
        _, index, module, _ = name.split(".")
        scales[int(index), module] = scale
    ia3_checkpoint.save(scales, folder, backbone)


def load(folder: Path, shape: BackboneShape, options: Ia3OriginalOptions) -> AdapterPlan:
    """The plan of a PEFT (IA)3 checkpoint folder. Raises AdapterError."""
    scales = ia3_checkpoint.load(folder, shape, IA3_MODULES)
    return plan({f"layers.{i}.{m}.l": scale for (i, m), scale in scales.items()}, shape, options)
