"""VeRA (Kopiczko et al., 2023): y = x W + ((x A^T) * d) B^T * b, with A and B random, frozen, and shared by all layers,
modules and tenants; a tenant has the two vectors d [R] and b [D_out] of each module.

A [R, the largest D_in of the modules] and B [the largest D_out, R] are drawn as PEFT draws them, from a key; a module
takes the part that fits it. Parameters: `layers.<i>.<module>.d` and `.b`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from perfbench.methods.checkpoints import vera as vera_checkpoint
from perfbench.methods.options import MODULES_OF_A_LAYER, RANK, MethodOptions
from perfbench.methods.parameters import Parameters
from perfbench.methods.plan import AdapterPlan, LayerPlan, SharedPair
from perfbench.methods.shape import MODULES, BackboneShape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class VeraOptions(MethodOptions):
    """`rank` R, by default PEFT's; the adapted `modules`; the `key` that A and B are drawn from."""

    rank: int = field(default=vera_checkpoint.DEFAULT_RANK, metadata=RANK)
    modules: tuple[str, ...] = field(
        default=MODULES,
        metadata={
            **MODULES_OF_A_LAYER,
            "description": "the linear modules that are adapted in every layer; default: all seven",
        },
    )
    key: int = field(
        default=0,
        metadata={
            "minimum": 0,
            "maximum": 2**63 - 1,
            "description": "what the shared matrices are drawn from, PEFT's projection_prng_key",
        },
    )


Options = VeraOptions


def shapes(shape: BackboneShape, options: VeraOptions) -> dict[str, tuple[int, ...]]:
    """Trainable parameters: name -> size."""
    sizes: dict[str, tuple[int, ...]] = {}
    for index in range(shape.layers):
        for module in MODULES:
            if module in options.modules:
                sizes[f"layers.{index}.{module}.d"] = (options.rank,)
                sizes[f"layers.{index}.{module}.b"] = (shape.features(module)[1],)
    return sizes


def initialise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """d 0.1 as PEFT has it; b zero, so that the adapter starts as the identity."""
    tensor.fill_(0.1 if name.endswith(".d") else 0)


def randomise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """d ~ N(0, 1), and b such that what is added has about the size of x W for weights of standard deviation 0.02."""
    tensor.normal_(0, 1 if name.endswith(".d") else 0.25, generator=generator)


def shared(
    shape: BackboneShape, options: VeraOptions, like: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, largest D_in] and B [largest D_out, R], fp32 on the CPU; sizes alone where `like` has no numbers."""
    d_in, d_out = (max(shape.features(module)[side] for module in options.modules) for side in (0, 1))
    if like is not None and like.is_meta:
        return like.new_empty(options.rank, d_in), like.new_empty(d_out, options.rank)
    return drawn(options.rank, d_in, d_out, options.key)


@functools.lru_cache(maxsize=4)
def drawn(rank: int, d_in: int, d_out: int, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as PEFT draws them: first A, then B, uniform by the size of their inputs."""
    import torch

    generator = torch.Generator("cpu").manual_seed(key)
    found = []
    for size in ((rank, d_in), (d_out, rank)):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(size[1]))
        found.append(torch.empty(size, device="cpu").uniform_(-bound, bound, generator=generator))
    return found[0], found[1]


def plan(parameters: Parameters, shape: BackboneShape, options: VeraOptions) -> AdapterPlan:
    """Shared pairs, whose matrices are drawn from the key; an adapter may lack some modules."""
    return plan_with(parameters, shape, *shared(shape, options, next(iter(parameters.values()))))


def plan_with(parameters: Parameters, shape: BackboneShape, a: torch.Tensor, b: torch.Tensor) -> AdapterPlan:
    """The same with these A and B."""
    b = b.t()
    layers = []
    for index in range(shape.layers):
        pairs = {}
        for module in MODULES:
            name, (d_in, d_out) = f"layers.{index}.{module}", shape.features(module)
            if f"{name}.d" in parameters:
                vectors = parameters[f"{name}.d"], parameters[f"{name}.b"]
                pairs[module] = SharedPair(a[:, :d_in], b[:, :d_out], *vectors)
        layers.append(LayerPlan(shared=pairs))
    return tuple(layers)


def save(parameters: Parameters, shape: BackboneShape, options: VeraOptions, folder: Path, backbone: str) -> None:
    """Writes a PEFT VeRA checkpoint folder, with A and B in it."""
    vera_checkpoint.save(parameters, *shared(shape, options), options.key, folder, backbone)


def load(folder: Path, shape: BackboneShape, options: VeraOptions) -> AdapterPlan:
    """The plan of a PEFT VeRA checkpoint folder, whose rank and modules are its own, and A and B too where they are
    in it. Raises AdapterError."""
    parameters, projections, rank, key = vera_checkpoint.load(folder, shape)
    if projections is None:
        modules = tuple(module for module in MODULES if any(f".{module}." in name for name in parameters))
        projections = shared(shape, VeraOptions(rank=rank, modules=modules, key=key))
    return plan_with(parameters, shape, *projections)
