"""BitFit: only biases are trained. A Llama has none, so every linear of its layers gets one that starts at zero.

A linear that has a bias keeps it frozen, and what is trained is the difference, which comes to the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from perfbench.finetune.baselines.bottleneck import device_of
from perfbench.methods.shape import MODULE_PATHS, BackboneShape


@dataclass(frozen=True)
class BitFitOptions:
    """None."""


def attach(model: Any, shape: BackboneShape, options: BitFitOptions) -> Any:
    """Adds a bias to the seven linears of each layer of a frozen model."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        for module, path in MODULE_PATHS.items():
            linear = layer.get_submodule(path)
            bias = torch.zeros(shape.features(module)[1], dtype=torch.float32, device=device_of(layer))
            linear.register_parameter("bitfit_bias", nn.Parameter(bias))
            linear.register_forward_hook(_add)
    return model


def _add(linear: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + linear.bitfit_bias.to(output.dtype)
