"""Activated LoRA (Greenewald et al., 2025): LoRA that acts from a request's own tokens on.

The tokens before the invocation are read by the backbone alone, so that their keys and values are the same for every
tenant, and one cache of a shared context serves the turns of all of them. Here the invocation is where the tokens end
that all requests of a batch have in common (`own_tokens` of a workload). Without such, the adapter acts on the whole
prompt, as LoRA's does. A file of PEFT's names the tokens that invoke its adapter, and random prompts do not hold them,
so that only random adapters are measured. The arithmetic is LoRA's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from perfbench.methods import lora
from perfbench.methods.lora import LoraOptions
from perfbench.methods.parameters import Parameters
from perfbench.methods.plan import AdapterPlan
from perfbench.methods.shape import BackboneShape


@dataclass(frozen=True)
class AloraOptions(LoraOptions):
    """As LoRA's, but for `adapters`, with which it raises ValueError."""

    def __post_init__(self) -> None:
        if self.adapters is not None:
            raise ValueError("adapters: activated LoRA is measured with random ones alone: leave them out")


Options = AloraOptions
setting_of = lora.setting_of
shapes = lora.shapes
initialise = lora.initialise
randomise = lora.randomise
save = lora.save


def plan(parameters: Parameters, shape: BackboneShape, options: AloraOptions) -> AdapterPlan:
    """LoRA's, activated."""
    return tuple(replace(layer, activated=True) for layer in lora.plan(parameters, shape, options))


def load(folder: Path, shape: BackboneShape, options: AloraOptions) -> AdapterPlan:
    """The plan of a PEFT LoRA checkpoint folder that `save` wrote. Raises AdapterError."""
    return tuple(replace(layer, activated=True) for layer in lora.load(folder, shape, LoraOptions()))
