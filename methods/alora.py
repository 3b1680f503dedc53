"""Activated LoRA (Greenewald et al., 2025): LoRA that acts from an invocation on.

The tokens before it are read by the backbone alone, so that their keys and values are the same for every tenant, and
one cache of a shared context serves the turns of all of them. PEFT's checkpoints name the tokens that invoke them: the
adapter acts from the first token of their last occurrence in the prompt on, and nowhere where they do not occur.
Prompts that are drawn get them where the request's own tokens begin. Without such tokens the invocation is where the
tokens end that all requests of a batch have in common (`own_tokens` of a workload), and the whole prompt where there
are none in common. The arithmetic is LoRA's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from perfbench.errors import AdapterError
from perfbench.methods import lora
from perfbench.methods.checkpoints import lora as lora_checkpoint
from perfbench.methods.checkpoints.adapter_folder import CONFIG
from perfbench.methods.lora import LoraOptions
from perfbench.methods.parameters import Parameters
from perfbench.methods.plan import AdapterPlan
from perfbench.methods.shape import BackboneShape


@dataclass(frozen=True)
class AloraOptions(LoraOptions):
    """As LoRA's; `invocation`: the tokens from which on the adapter acts, of random adapters and of trained ones."""

    invocation: tuple[int, ...] = field(
        default=(),
        metadata={
            "items": {"type": "integer", "minimum": 0},
            "description": "the tokens that invoke the adapter, PEFT's alora_invocation_tokens; absent: it acts on "
            "a request's own tokens",
        },
    )


Options = AloraOptions
setting_of = lora.setting_of
initialise = lora.initialise
randomise = lora.randomise


def shapes(shape: BackboneShape, options: AloraOptions) -> dict[str, tuple[int, ...]]:
    """Trainable parameters: name -> size. ValueError on tokens that the backbone lacks."""
    if options.invocation and (largest := max(options.invocation)) >= shape.vocab:
        raise ValueError(f"invocation: expected tokens below {shape.vocab}, got {largest}")
    return lora.shapes(shape, options)


def plan(parameters: Parameters, shape: BackboneShape, options: AloraOptions) -> AdapterPlan:
    """LoRA's, activated."""
    return _invoked(lora.plan(parameters, shape, options), options.invocation)


def save(parameters: Parameters, shape: BackboneShape, options: AloraOptions, folder: Path, backbone: str) -> None:
    """Writes a PEFT LoRA checkpoint folder, with the tokens that invoke it where there are some."""
    lora_checkpoint.save(parameters, options.alpha, folder, backbone, options.invocation)


def load(folder: Path, shape: BackboneShape, options: AloraOptions) -> AdapterPlan:
    """The plan of a PEFT LoRA checkpoint folder that tokens invoke, the checkpoint's own. Raises AdapterError."""
    tokens = lora_checkpoint.invocation(folder, shape)
    if not tokens and options.adapters is not None:
        raise AdapterError(
            f"{folder / CONFIG}: alora_invocation_tokens: expected the tokens that invoke the adapter, got none; "
            f"method lora serves it"
        )
    return _invoked(lora.plan(lora_checkpoint.load(folder, shape, activated=True), shape, LoraOptions()), tokens)


def _invoked(plan: AdapterPlan, tokens: tuple[int, ...]) -> AdapterPlan:
    return tuple(replace(layer, invocation=tokens) for layer in plan)
