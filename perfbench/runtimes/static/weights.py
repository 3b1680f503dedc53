"""The weights as the static runtime reads them: Q, K and V as one matrix, gate and up as another, held once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from perfbench.backbone import Backbone
from perfbench.errors import BackboneError
from perfbench.methods.shape import MODULE_PATHS, BackboneShape
from perfbench.runtime_support import unsupported

# The modules that share an input, as one product: their outputs lie side by side in this order.
FUSED = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. `weights` and `biases`: fused projection -> [D_out, D_in], [D_out] or None; the norms
    [hidden], in fp32 where the family multiplies by 1 + weight (Gemma)."""

    weights: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor | None]
    input_norm: torch.Tensor
    post_norm: torch.Tensor


@dataclass(frozen=True)
class Weights:
    """A whole backbone. cos, sin: [context, head_dim / 2 twice] with sin negated in the first half, so that RoPE is
    x cos + swap(x) sin, swap exchanging the halves of a head."""

    shape: BackboneShape
    dtype: torch.dtype
    device: torch.device
    embed: torch.nn.Module
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: torch.Tensor
    eps: float
    activation: str
    cos: torch.Tensor
    sin: torch.Tensor


def fuse(backbone: Backbone) -> Weights:
    """The weights of `backbone`, whose linear modules become views of the fused ones: nothing is held twice.

    A second call finds what the first one made. BackboneError for what the runtime does not have.
    """
    model = backbone.model
    if (problem := unsupported("static", model.config.to_dict())) is not None:
        raise BackboneError(f"{backbone.name}: {problem}")
    rotary = model.model.rotary_emb
    positions = torch.arange(backbone.shape.context, device=backbone.device).unsqueeze(0)
    cos, sin = rotary(torch.empty(0, dtype=torch.float32, device=backbone.device), positions)
    half = backbone.shape.head_dim // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    return Weights(
        shape=backbone.shape,
        dtype=backbone.dtype,
        device=backbone.device,
        embed=model.get_input_embeddings(),
        layers=tuple(_layer(layer, model.config.model_type) for layer in model.model.layers),
        norm=_norm(model.model.norm, model.config.model_type),
        head=model.get_output_embeddings().weight,
        eps=model.config.rms_norm_eps,
        activation=model.config.hidden_act,
        cos=cos[0].to(backbone.dtype),
        sin=sin[0].to(backbone.dtype),
    )


def _layer(layer: Any, family: str) -> LayerWeights:
    weights, biases = {}, {}
    for name, modules in FUSED.items():
        linears = [layer.get_submodule(MODULE_PATHS[module]) for module in modules]
        weights[name] = _join([linear.weight for linear in linears])
        biases[name] = None if linears[0].bias is None else _join([linear.bias for linear in linears])
    return LayerWeights(
        weights, biases, _norm(layer.input_layernorm, family), _norm(layer.post_attention_layernorm, family)
    )


def _norm(module: Any, family: str) -> torch.Tensor:
    weight: torch.Tensor = module.weight.data
    return 1.0 + weight.float() if family == "gemma" else weight


def _join(parts: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """One tensor of which `parts`, joined along the first dimension, are views from now on."""
    first = parts[0].data
    size = (sum(part.shape[0] for part in parts), *first.shape[1:])
    end = first.data_ptr()
    for part in parts:
        if part.data_ptr() != end:
            break
        end += part.numel() * part.element_size()
    else:
        if first.untyped_storage().nbytes() >= first.storage_offset() * first.element_size() + end - first.data_ptr():
            return first.as_strided(size, first.stride())
    fused = torch.cat([part.data for part in parts])
    for part, view in zip(parts, fused.split([part.shape[0] for part in parts]), strict=True):
        part.data = view
    return fused
