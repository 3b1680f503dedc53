"""The Houlsby adapter: a bottleneck on the output of attention and on that of the FFN, before the residual sum.

Without biases, which gives the papers' count on LLaMA-2 7B: 9,437,184.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from perfbench.finetune.baselines.bottleneck import Bottleneck, device_of, first, plus
from perfbench.methods.options import SIZE
from perfbench.methods.shape import BackboneShape


@dataclass(frozen=True)
class HoulsbyOptions:
    """`bottleneck`: its width."""

    bottleneck: int = field(default=18, metadata=SIZE)


def attach(model: Any, shape: BackboneShape, options: HoulsbyOptions) -> Any:
    """Adds two bottlenecks to each layer of a frozen model."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        for sublayer in (layer.self_attn, layer.mlp):
            sublayer.houlsby = Bottleneck(shape.hidden, options.bottleneck).to(device_of(layer))
            sublayer.register_forward_hook(_add)
    return model


def _add(sublayer: Any, args: Any, output: Any) -> Any:
    return plus(output, sublayer.houlsby(first(output)))
