"""A method from outside, as small as one can be: low-rank pairs on Q and V, which PEFT's LoRA trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from perfbench.methods import lora
from perfbench.methods.lora import LoraOptions, initialise, load, randomise, save  # noqa: F401
from perfbench.methods.options import MethodOptions
from perfbench.methods.registry import LOW_RANK, Method


@dataclass(frozen=True)
class Options(MethodOptions):
    """`rank` of the pairs; `where`: which of the two modules have one."""

    rank: int = field(default=2, metadata={"minimum": 1, "description": "rank of the pairs"})
    where: Literal["both", "q", "v"] = "both"
    alpha: float | None = None


def setting_of(shape, options):
    """The modules of each layer."""
    return (("q", "v") if options.where == "both" else (options.where,),) * shape.layers


def shapes(shape, options):
    """Trainable parameters: name -> size."""
    return lora.shapes_of(setting_of(shape, options), options.rank, shape)


def plan(parameters, shape, options):
    """As LoRA's."""
    return lora.plan(parameters, shape, LoraOptions(rank=options.rank))


METHODS = {"qv-pairs": Method(__name__, "low-rank pairs on Q and V", trained_by=LOW_RANK)}
