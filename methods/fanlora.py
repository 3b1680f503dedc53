"""FanLoRA (EMNLP 2024 Industry): LoRA on at most K_max = 2 linears of each layer, chosen by a search.

A FanLoRA adapter is a PEFT LoRA checkpoint with explicit target modules, so everything but the setting is LoRA's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from perfbench.methods import lora
from perfbench.methods.checkpoints import lora as lora_checkpoint
from perfbench.methods.lora import LoraOptions
from perfbench.methods.options import ALPHA, LAYERS, RANK, MethodOptions
from perfbench.methods.parameters import Parameters
from perfbench.methods.plan import AdapterPlan
from perfbench.methods.shape import BackboneShape, Setting


@dataclass(frozen=True)
class FanLoraOptions(MethodOptions):
    """`rank` R; `setting`: the modules kept in each layer (a list for each layer, or the path of a JSON file with
    the key `layers`); without one, FanLoRA's default (see `default_setting`)."""

    rank: int = field(default=12, metadata=RANK)
    alpha: float | None = field(default=None, metadata=ALPHA)
    setting: Setting | str | None = field(
        default=None,
        metadata={
            "anyOf": [LAYERS, {"type": "string", "minLength": 1}, {"type": "null"}],
            "description": "the modules that are kept: a list for each layer, or a JSON file with the key `layers`, "
            "as a search writes it; null or absent: FanLoRA's default",
        },
    )


Options = FanLoraOptions

initialise = lora.initialise
randomise = lora.randomise


def default_setting(layers: int) -> Setting:
    """Where no search was run: the first 9/16 of the layers keep v and o, the others up and down (Figure 1)."""
    lower = round(layers * 9 / 16)
    return (("v", "o"),) * lower + (("up", "down"),) * (layers - lower)


def setting_of(shape: BackboneShape, options: FanLoraOptions) -> Setting:
    """The kept modules of each layer; a layer may be empty. ValueError where the setting has another depth."""
    if options.setting is None:
        return default_setting(shape.layers)
    if isinstance(options.setting, str):
        raise ValueError(f"setting {options.setting!r} is a path: read it first")
    if len(options.setting) != shape.layers:
        raise ValueError(f"the setting has {len(options.setting)} layers, the backbone {shape.layers}")
    return options.setting


def shapes(shape: BackboneShape, options: FanLoraOptions) -> dict[str, tuple[int, ...]]:
    """Trainable parameters: name -> size."""
    return lora.shapes_of(setting_of(shape, options), options.rank, shape)


def plan(parameters: Parameters, shape: BackboneShape, options: FanLoraOptions) -> AdapterPlan:
    """As LoRA's."""
    return lora.plan(parameters, shape, LoraOptions(rank=options.rank, alpha=options.alpha))


def save(parameters: Parameters, shape: BackboneShape, options: FanLoraOptions, folder: Path, backbone: str) -> None:
    """Writes a PEFT LoRA checkpoint folder whose target modules are spelled out in full."""
    lora_checkpoint.save(parameters, options.alpha, folder, backbone)


def load(folder: Path, shape: BackboneShape, options: FanLoraOptions) -> AdapterPlan:
    """The plan of a PEFT LoRA checkpoint folder, with the modules that it has. Raises AdapterError."""
    return lora.load(folder, shape, LoraOptions())
