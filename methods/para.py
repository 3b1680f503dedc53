"""PARA: Prompt Aware Representation Adjustment.

Q' = l_q * Q, V' = l_v * V, U' = l_u * U with [l_q, l_v, l_u] = GELU(h W_down) W_up + b (eq. 6), made once from the
layer's input hidden state at the last prompt token and re-used for every generated token. The GELU is the exact
one. Parameters: `layers.<i>.w_down` [hidden, R], `.w_up` [R, D], `.bias` [D], D the sum of the three D_out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from perfbench.methods.checkpoints import para as para_checkpoint
from perfbench.methods.checkpoints.para import POOLS
from perfbench.methods.options import RANK, MethodOptions
from perfbench.methods.parameters import Parameters
from perfbench.methods.plan import AdapterPlan, Generator, LayerPlan
from perfbench.methods.shape import BackboneShape

if TYPE_CHECKING:
    import torch

PARA_MODULES = ("q", "v", "up")


@dataclass(frozen=True)
class ParaOptions(MethodOptions):
    """`rank` of the generator's bottleneck; `pool`: the residual stream (paper) or the normalised input."""

    rank: int = field(default=12, metadata=RANK)
    pool: str = field(
        default="residual",
        metadata={
            "enum": list(POOLS),
            "description": "what the generator reads: the residual stream that enters the layer, as in the "
            "paper, or its norm",
        },
    )


Options = ParaOptions


def shapes(shape: BackboneShape, options: ParaOptions) -> dict[str, tuple[int, ...]]:
    """Trainable parameters: name -> size."""
    d = sum(shape.features(module)[1] for module in PARA_MODULES)
    sizes: dict[str, tuple[int, ...]] = {}
    for index in range(shape.layers):
        sizes[f"layers.{index}.w_down"] = (shape.hidden, options.rank)
        sizes[f"layers.{index}.w_up"] = (options.rank, d)
        sizes[f"layers.{index}.bias"] = (d,)
    return sizes


def initialise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """W_down ~ N(0, 0.02), W_up = 0, b = 1: the vectors start at 1 (paper, section 4.3)."""
    if name.endswith(".w_down"):
        tensor.normal_(0, 0.02, generator=generator)
    else:
        tensor.fill_(1 if name.endswith(".bias") else 0)


def randomise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Values for which the prompt's part and the bias's part of l - 1 both are near 0.18, and l - 1 near
    a quarter as a whole, for an input of rms 1."""
    if name.endswith(".w_down"):
        tensor.normal_(0, 1 / math.sqrt(tensor.shape[0]), generator=generator)
    elif name.endswith(".w_up"):
        # GELU of a normal value has a root mean square of 0.65.
        tensor.normal_(0, 0.18 / (0.65 * math.sqrt(tensor.shape[0])), generator=generator)
    else:
        tensor.normal_(1, 0.18, generator=generator)


def fit(parameters: Parameters, options: ParaOptions, input_rms: Sequence[float]) -> None:
    """Makes random parameters ones for layers whose input has these root mean squares: else the vectors, and with
    them the activations, would grow with the residual stream from layer to layer."""
    if options.pool == "residual":
        for index, rms in enumerate(input_rms):
            parameters[f"layers.{index}.w_down"] /= rms


def plan(parameters: Parameters, shape: BackboneShape, options: ParaOptions) -> AdapterPlan:
    """A generator for each layer."""
    return tuple(
        LayerPlan(
            generator=Generator(
                w_down=parameters[f"layers.{index}.w_down"],
                w_up=parameters[f"layers.{index}.w_up"],
                bias_minus_one=parameters[f"layers.{index}.bias"] - 1,
                modules=PARA_MODULES,
                normalised=options.pool == "normalised",
            )
        )
        for index in range(shape.layers)
    )


def save(parameters: Parameters, shape: BackboneShape, options: ParaOptions, folder: Path, backbone: str) -> None:
    """Writes an adapter folder in PEFT's format with `peft_type` PARA."""
    para_checkpoint.save(parameters, options.rank, options.pool, folder, backbone)


def load(folder: Path, shape: BackboneShape, options: ParaOptions) -> AdapterPlan:
    """The plan of such a folder; its rank and its pooling are its own. Raises AdapterError."""
    parameters, rank, pool = para_checkpoint.load(folder, shape)
    return plan(parameters, shape, ParaOptions(rank=rank, pool=pool))
