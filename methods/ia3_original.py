"""(IA)3 as Liu et al. (2022) have it, and as PEFT does: a vector for each of the chosen linears, on its output or,
for those of PEFT's `feedforward_modules`, on its input; by default on K, V and the input of down.

Down's input is act(gate) * up, so a scale on it is a scale on up's output, and that is how it is served. O's input is
the attention's output: where there are as many K and V heads as Q heads, a scale on it is one on V. The others stay
scales of inputs. Parameters: `layers.<i>.<module>.l`, [D_out], or [D_in] of those on the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from perfbench.methods.checkpoints import ia3 as ia3_checkpoint
from perfbench.methods.options import MODULES_OF_A_LAYER, MethodOptions
from perfbench.methods.parameters import Parameters
from perfbench.methods.plan import AdapterPlan, LayerPlan
from perfbench.methods.shape import MODULES, BackboneShape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ia3OriginalOptions(MethodOptions):
    """(IA)3 as Liu et al. (2022) have it: one vector for each of `modules`, on the input of those in `inputs`."""

    modules: tuple[str, ...] = field(
        default=("k", "v", "down"),
        metadata={**MODULES_OF_A_LAYER, "description": "the linear modules that get a vector in every layer"},
    )
    inputs: tuple[str, ...] = field(
        default=("down",),
        metadata={
            **MODULES_OF_A_LAYER,
            "minItems": 0,
            "description": "those of them whose input is scaled and not their output, PEFT's feedforward_modules",
        },
    )

    @property
    def scaled_inputs(self) -> tuple[str, ...]:
        """Those of `modules` that are scaled on their input."""
        return tuple(module for module in self.modules if module in self.inputs)


Options = Ia3OriginalOptions


def shapes(shape: BackboneShape, options: Ia3OriginalOptions) -> dict[str, tuple[int, ...]]:
    """Trainable parameters: name -> size."""
    return {
        f"layers.{index}.{module}.l": (shape.features(module)[0 if module in options.inputs else 1],)
        for index in range(shape.layers)
        for module in MODULES
        if module in options.modules
    }


def initialise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Ones."""
    tensor.fill_(1)


def randomise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """N(1, 0.25): activations keep their size."""
    tensor.normal_(1, 0.25, generator=generator)


def plan(parameters: Parameters, shape: BackboneShape, options: Ia3OriginalOptions) -> AdapterPlan:
    """Scales of outputs, and of inputs where there is no output to scale instead; an adapter may lack some."""
    return tuple(_layer(index, parameters, shape, options.inputs) for index in range(shape.layers))


def _layer(index: int, parameters: Parameters, shape: BackboneShape, inputs: Sequence[str]) -> LayerPlan:
    outputs: dict[str, torch.Tensor] = {}
    scaled_inputs: dict[str, torch.Tensor] = {}
    for module in MODULES:
        scale = parameters.get(f"layers.{index}.{module}.l")
        if scale is None:
            continue
        place = output_instead(module, shape) if module in inputs else module
        if place is None:
            scaled_inputs[module] = scale - 1
        else:
            outputs[place] = outputs[place] * scale if place in outputs else scale
    return LayerPlan(
        scale_minus_one={module: scale - 1 for module, scale in outputs.items()}, input_scale_minus_one=scaled_inputs
    )


def output_instead(module: str, shape: BackboneShape) -> str | None:
    """The module whose output is what `module` reads, channel by channel; None where there is none."""
    return {"down": "up", "o": "v" if shape.kv_heads == shape.heads else None}.get(module)


def save(
    parameters: Parameters, shape: BackboneShape, options: Ia3OriginalOptions, folder: Path, backbone: str
) -> None:
    """Writes a PEFT (IA)3 checkpoint folder."""
    scales = {}
    for name, scale in parameters.items():
        _, index, module, _ = name.split(".")
        scales[int(index), module] = scale
    ia3_checkpoint.save(scales, folder, backbone, options.inputs)


def load(folder: Path, shape: BackboneShape, options: Ia3OriginalOptions) -> AdapterPlan:
    """The plan of a PEFT (IA)3 checkpoint folder, whose modules, and on which side of each the vector acts, are its
    own, whatever `options` say. Raises AdapterError."""
    scales, inputs = ia3_checkpoint.load_both(folder, shape, MODULES)
    layers = []
    for index in range(shape.layers):
        own = {f"layers.{i}.{module}.l": scale for (i, module), scale in scales.items() if i == index}
        on_inputs = [module for i, module in inputs if i == index]
        layers.append(_layer(index, own, shape, on_inputs))
    return tuple(layers)
