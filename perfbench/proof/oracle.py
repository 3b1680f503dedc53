"""What a request should get: the forward pass of a Llama-family backbone with one adapter plan, in any precision.

Written without runtimes, banks and kernels, so that it can judge them: no cache, no padding, no fused product, each
adapter applied as its definition says. Weights stream: one linear at a time is brought to the wanted precision, so
that a backbone needs no room beside itself for a wider copy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import gelu
from transformers.activations import ACT2FN

from perfbench.methods.plan import AdapterPlan, LayerPlan, LowRank
from perfbench.methods.shape import MODULE_PATHS, BackboneShape
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.int8_linear import Int8Linear

# What 16 bits round off shows in 32, what 32 round off in 64.
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}

# Of the attention, at a time, unless one group of heads has more: with what is made of them 256 MiB in fp32.
LARGEST_SCORES = 2**24


@dataclass(frozen=True)
class Served:
    """One request as it went: its prompt's tokens [S], the tokens chosen after it [N], and its adapter, None for the
    bare backbone, as it is before it is rounded to the dtype in which it is served; `slot`: where that one lies, -1
    for the bare backbone; `shared_tokens`: so many first ones of the prompt are before the invocation of an activated
    adapter."""

    prompt: torch.Tensor
    chosen: torch.Tensor
    plan: AdapterPlan | None
    slot: int = -1
    shared_tokens: int = 0


def logits(backbone: Backbone, sequences: Sequence[Served], dtype: torch.dtype) -> list[torch.Tensor]:
    """For each sequence [N, V] in `dtype`: the logits from which each of its N tokens was to be chosen.

    dtype fp64 or fp32: the reference; the backbone's own: the same sums with the rounding that this dtype brings.
    """
    model, shape = backbone.model, backbone.shape
    with torch.inference_mode():
        embed = model.get_input_embeddings().weight
        tokens = [torch.cat([one.prompt, one.chosen[:-1]]) for one in sequences]
        streams = [embed[ids].to(dtype) for ids in tokens]
        if model.config.model_type == "gemma":
            streams = [stream * torch.tensor(shape.hidden**0.5, dtype=dtype) for stream in streams]
        late = [_acts_from(one) for one in sequences]
        angles = _angles(model, max(map(len, tokens)), dtype, backbone.device)
        for index, layer in enumerate(model.model.layers):
            plans = [
                LayerPlan() if one.plan is None else _rounded(one.plan[index], backbone, dtype) for one in sequences
            ]
            scales = [
                _scales(plan, stream[len(one.prompt) - 1], layer.input_layernorm, shape, model.config)
                for plan, stream, one in zip(plans, streams, sequences, strict=True)
            ]
            window = _window(model.config, index)
            streams = _layer(layer, streams, plans, scales, late, angles, window, shape, model.config)
        head = model.get_output_embeddings()
        last = [stream[len(one.prompt) - 1 :] for stream, one in zip(streams, sequences, strict=True)]
        return [_times(_norm(stream, model.model.norm, model.config), head) for stream in last]


def beam_search(
    backbone: Backbone,
    prompt: torch.Tensor,
    plan: AdapterPlan | None,
    beams: int,
    new_tokens: int,
    dtype: torch.dtype,
    shared_tokens: int = 0,
) -> torch.Tensor:
    """int64 [new_tokens]: the best of `beams` continuations of a prompt [S] kept alive at each step, by the sum of
    their log-probabilities. Every step reads every continuation again from the start."""
    device = backbone.device
    paths = torch.empty(1, 0, dtype=torch.int64, device=device)  # [continuations, tokens so far]
    scores = torch.zeros(1, dtype=torch.float64, device=device)
    unchosen = torch.zeros(1, dtype=torch.int64, device=device)
    for _ in range(new_tokens):
        asked = [Served(prompt, torch.cat([path, unchosen]), plan, shared_tokens=shared_tokens) for path in paths]
        chances = torch.stack([found[-1] for found in logits(backbone, asked, dtype)]).double().log_softmax(dim=-1)
        scores, best = (scores[:, None] + chances).flatten().topk(beams)
        parent, token = best // chances.shape[1], best % chances.shape[1]
        paths = torch.cat([paths[parent], token[:, None]], dim=1)
    return paths[0]


def _layer(
    layer: Any,
    streams: list[torch.Tensor],
    plans: list[LayerPlan],
    scales: list[dict[str, torch.Tensor]],
    late: list[int],
    angles: tuple[torch.Tensor, torch.Tensor],
    window: int | None,
    shape: BackboneShape,
    config: Any,
) -> list[torch.Tensor]:
    """One decoder layer on streams [L, hidden] of several sequences, each with its own plan, whose pairs act from its
    token `late` on."""

    def linear(module: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """(x s) W^T + bias, plus what is added of x, then scaled and rotated, each sequence by its own plan."""
        own = layer.get_submodule(MODULE_PATHS[module])
        read = [_scaled_input(x, plan, module) for x, plan in zip(inputs, plans, strict=True)]
        outputs = _times(torch.cat(read), own)
        if own.bias is not None:
            outputs = outputs + own.bias.to(outputs.dtype)
        found = list(outputs.split([len(x) for x in inputs]))
        for i, (x, plan, scale) in enumerate(zip(inputs, plans, scales, strict=True)):
            if (pair := plan.low_rank.get(module)) is not None:
                added = (x[late[i] :] @ pair.a.T) @ pair.b
                found[i][late[i] :] += added if module not in plan.bias else added + plan.bias[module]
            if (b := plan.grouped.get(module)) is not None:
                found[i] = found[i] + torch.stack([x[:, j :: len(b)].sum(dim=1) for j in range(len(b))], dim=1) @ b
            if (shared := plan.shared.get(module)) is not None:
                found[i] = found[i] + ((x @ shared.a.T) * shared.of_ranks) @ shared.b * shared.of_columns
            if (length := plan.magnitude.get(module)) is not None:
                found[i] = _of_length(found[i], length, own, plan.low_rank.get(module))
            if module in scale or module in plan.rotation:
                turned = found[i] * scale.get(module, 1.0)
                if (rotation := plan.rotation.get(module)) is not None:
                    turned = turned + found[i][:, _partners(len(rotation.sine), rotation.half)] * rotation.sine
                found[i] = turned.to(x.dtype)
        return found

    inputs = [_norm(stream, layer.input_layernorm, config) for stream in streams]
    q, k, v = (linear(module, inputs) for module in "qkv")
    q, k = (_of_heads(found, layer.self_attn, name, config) for found, name in ((q, "q_norm"), (k, "k_norm")))
    mixed = [_attention(*three, angles, window, shape) for three in zip(q, k, v, strict=True)]
    streams = [stream + out for stream, out in zip(streams, linear("o", mixed), strict=True)]
    inputs = [_norm(stream, layer.post_attention_layernorm, config) for stream in streams]
    activation = ACT2FN[config.hidden_act]
    gated = [activation(g) * u for g, u in zip(linear("gate", inputs), linear("up", inputs), strict=True)]
    return [stream + out for stream, out in zip(streams, linear("down", gated), strict=True)]


def _times(x: torch.Tensor, linear: Any) -> torch.Tensor:
    """x W^T; of 8-bit weights W = q s by q and s themselves, which are exact in every dtype."""
    if isinstance(linear, Int8Linear):
        return (x @ linear.q.to(x.dtype).T) * linear.scale.to(x.dtype)
    return x @ linear.weight.to(x.dtype).T


def _of_heads(outputs: list[torch.Tensor], attention: Any, name: str, config: Any) -> list[torch.Tensor]:
    """Outputs [L, heads x D] with each head normalised, where the attention has that norm, as Qwen3's has."""
    norm = getattr(attention, name, None)
    if norm is None:
        return outputs
    return [_norm(y.view(len(y), -1, len(norm.weight)), norm, config).flatten(1) for y in outputs]


def _of_length(y: torch.Tensor, length: torch.Tensor, linear: Any, pair: LowRank | None) -> torch.Tensor:
    """y [L, D_out], what a linear and a pair made, as if each row of their sum had this length; the bias stays."""
    rows = _at_least_fp32(linear.weight).to(length.dtype)
    if pair is not None:
        rows = rows + (pair.b.T @ pair.a).to(length.dtype)
    bias = 0.0 if linear.bias is None else linear.bias.to(y.dtype)
    return (y - bias) * (length / rows.norm(dim=1)).to(y.dtype) + bias


def _acts_from(one: Served) -> int:
    """The first token of a sequence on which its pairs act: what comes before their invocation is the backbone's."""
    invocation = None if one.plan is None else next((layer.invocation for layer in one.plan if layer.invocation), None)
    if invocation is None:
        activated = one.plan is not None and any(layer.invocation is not None for layer in one.plan)
        return one.shared_tokens if activated else 0
    prompt, size = one.prompt.tolist(), len(invocation)
    starts = [place for place in range(len(prompt)) if tuple(prompt[place : place + size]) == invocation]
    return max(starts, default=len(prompt) + len(one.chosen))


def _scaled_input(x: torch.Tensor, plan: LayerPlan, module: str) -> torch.Tensor:
    minus_one = plan.input_scale_minus_one.get(module)
    return x if minus_one is None else (x * (1 + _at_least_fp32(minus_one))).to(x.dtype)


def _partners(columns: int, half: int) -> list[int]:
    """For each output of a module the one that it is rotated with."""
    return [column + half if column // half % 2 == 0 else column - half for column in range(columns)]


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    window: int | None,
    shape: BackboneShape,
) -> torch.Tensor:
    """[L, H D] of q [L, H D], k, v [L, H_kv D] of one sequence: every token sees itself and those before it."""
    length, dim = len(q), shape.head_dim
    cos, sin = (part[:length, None] for part in angles)
    q, k, v = (part.view(length, -1, dim) for part in (q, k, v))
    q, k = (part * cos + torch.cat([-part[..., dim // 2 :], part[..., : dim // 2]], dim=-1) * sin for part in (q, k))
    place = torch.arange(length, device=q.device)
    hidden = place[None, :] > place[:, None]
    if window is not None:
        hidden |= place[None, :] <= place[:, None] - window
    group = shape.heads // shape.kv_heads
    q = q.view(length, shape.kv_heads, group, dim)
    out = torch.empty_like(q)
    # As many heads at once as leave room: the scores of all heads of a long prompt would not fit.
    some = max(1, LARGEST_SCORES // (group * length * length))
    for first in range(0, shape.kv_heads, some):
        own = slice(first, first + some)
        scores = torch.einsum("ikgd,jkd->kgij", q[:, own], k[:, own]) / math.sqrt(dim)
        weights = _at_least_fp32(scores).masked_fill(hidden, float("-inf")).softmax(dim=-1).to(q.dtype)
        out[:, own] = torch.einsum("kgij,jkd->ikgd", weights, v[:, own])
    return out.flatten(1)


def _scales(
    plan: LayerPlan, last: torch.Tensor, norm: Any, shape: BackboneShape, config: Any
) -> dict[str, torch.Tensor]:
    """Module -> l [D_out], in fp32 at least. `last` [hidden]: the layer's input at the last prompt token."""
    scales = {module: 1 + _at_least_fp32(minus_one) for module, minus_one in plan.scale_minus_one.items()}
    if (generator := plan.generator) is not None:
        read = _norm(last, norm, config) if generator.normalised else last
        vectors = _at_least_fp32(gelu(read @ generator.w_down) @ generator.w_up) + generator.bias_minus_one
        sizes = [shape.features(module)[1] for module in generator.modules]
        for module, minus_one in zip(generator.modules, vectors.split(sizes), strict=True):
            scales[module] = scales.get(module, 1.0) * (1 + minus_one)
    return scales


def _norm(stream: torch.Tensor, module: Any, config: Any) -> torch.Tensor:
    """RMSNorm, its mean square in fp32 at least; Gemma multiplies by 1 + weight."""
    wide = _at_least_fp32(stream)
    normal = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + config.rms_norm_eps)
    if config.model_type == "gemma":
        return (normal * (1.0 + module.weight.to(wide.dtype))).to(stream.dtype)
    return normal.to(stream.dtype) * module.weight.to(stream.dtype)


def _angles(model: Any, length: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin [length, D] of RoPE, as the configuration has it. A copy, since some kinds note the longest length."""
    rotary = copy.deepcopy(model.model.rotary_emb)
    cos, sin = rotary(torch.empty(0, dtype=torch.float32, device=device), torch.arange(length, device=device)[None])
    return cos[0].to(dtype), sin[0].to(dtype)


def _window(config: Any, layer: int) -> int | None:
    """How many tokens, itself the last, a token of this layer sees; None: all before it."""
    kinds = getattr(config, "layer_types", None)
    slides = config.model_type == "mistral" if kinds is None else kinds[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) if slides else None


def _rounded(plan: LayerPlan, backbone: Backbone, dtype: torch.dtype) -> LayerPlan:
    """One layer of an adapter, rounded to the dtype in which it is served, in `dtype` on the backbone's device."""

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(backbone.device, backbone.dtype).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)  # a magnitude is not served, but what is made of it
    magnitude = {module: length.to(backbone.device, wide) for module, length in plan.magnitude.items()}
    return replace(plan.map(rounded, rounded), magnitude=magnitude)


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
