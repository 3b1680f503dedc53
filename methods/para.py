"""PARA: Prompt Aware Representation Adjustment.

Q' = l_q * Q, V' = l_v * V, U' = l_u * U with [l_q, l_v, l_u] = GELU(h W_down) W_up + b (eq. 6), made once from the
layer's input hidden state at the last prompt token and re-used for every generated token. The GELU is the exact
one. Parameters: `layers.<i>.w_down` [hidden, R], `.w_up` [R, D], `.bias` [D], D the sum of the three D_out.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from perfbench.methods import para_files
from perfbench.methods.parameters import Parameters
from perfbench.methods.plan import AdapterPlan, Generator, LayerPlan
from perfbench.methods.registry import ParaOptions
from perfbench.methods.shape import BackboneShape

PARA_MODULES = ("q", "v", "up")


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
    """Values for which the prompt's part and the bias's part of the vectors both show."""
    if name.endswith(".w_down"):
        # The residual stream of a random backbone is small (embeddings of std 0.02), a trained one's is not.
        tensor.normal_(0, 1 / math.sqrt(tensor.shape[0]), generator=generator)
    elif name.endswith(".w_up"):
        tensor.normal_(0, 0.5, generator=generator)
    else:
        tensor.normal_(1, 0.4, generator=generator)


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
    para_files.save(parameters, options, folder, backbone)


def load(folder: Path, shape: BackboneShape, options: ParaOptions) -> AdapterPlan:
    """The plan of such a folder; its rank and its pooling are its own. Raises AdapterError."""
    parameters, options = para_files.load(folder, shape)
    return plan(parameters, shape, options)
