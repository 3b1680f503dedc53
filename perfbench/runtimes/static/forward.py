"""The layers' arithmetic over the fused weights: how prompts are read and how a decode step is taken, with the adapters
of the rows. Where keys and values lie, and what a step sees of them, the caller says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from perfbench.kernels import (
    decode_attention,
    grouped_sum,
    low_rank,
    qkv_epilogue,
    residual_rmsnorm,
    row_scale,
    swiglu_epilogue,
    vector_generator,
)
from perfbench.runtimes.int8_linear import Int8Weight
from perfbench.runtimes.static.adapters import BARE, Bound, BoundGenerator, BoundLayer
from perfbench.runtimes.static.product import OF_FEW_ROWS, product, takes_tail
from perfbench.runtimes.static.weights import Projection, Weights

# A prefill of so few rows takes the ranks out of the base product, as a decode step does: on an H200 the launches of a
# shrink and an expand for each module, from the host, were 20 of the 34 ms of 274 tokens.
MOST_ROWS_WITH_TAIL = 512


class View(NamedTuple):
    """What one decode step sees of the cache. cos, sin [rows or 1, D]; the rest, for every layer, as
    `qkv_epilogue` (entries, at) and `decode_attention` (prompt, generated, where, mask, filled) take it."""

    cos: torch.Tensor
    sin: torch.Tensor
    entries: Sequence[torch.Tensor] | Sequence[qkv_epilogue.Places]
    at: torch.Tensor | None
    prompt: list[torch.Tensor] | tuple[torch.Tensor, ...]
    generated: tuple[torch.Tensor, ...]
    where: torch.Tensor | None
    mask: torch.Tensor | None
    filled: torch.Tensor | None


class Forward:
    """Weights and the adapters of some rows, by one kernel set. layers: what each layer gets from the adapters, None
    without any; own: int64 [requests], which of them each request has, as `Adapters` has it."""

    def __init__(self, weights: Weights, layers: list[BoundLayer] | None, own: torch.Tensor | None, kernels: str):
        self.weights = weights
        self.layers = layers or [BARE] * weights.shape.layers
        self._own = own
        self._few_rows = OF_FEW_ROWS[kernels]
        self._shrink = low_rank.SHRINKS[kernels]
        self._expand = low_rank.EXPANDS[kernels]
        self._from_product = low_rank.FROM_PRODUCT[kernels]
        self._grouped_sum = grouped_sum.FORMS[kernels]
        self._joined = low_rank.JOINED[kernels]
        self._as_ranks = low_rank.AS_RANKS[kernels]
        self._qkv = qkv_epilogue.FORMS[kernels]
        self._swiglu = swiglu_epilogue.FORMS[kernels]
        self._norm = residual_rmsnorm.FORMS[kernels]
        self._attention = decode_attention.FORMS[kernels]
        self._vectors = vector_generator.FORMS[kernels]
        self._scaled = row_scale.SCALED_ROWS[kernels]

    def read(
        self,
        ids: torch.Tensor,
        past: int,
        attention_mask: torch.Tensor,
        cache: Sequence[torch.Tensor],
        allowed: torch.Tensor | None,
        acts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Reads ids int64 [Q, C] after `past` tokens; logits [Q, V] of what follows them.

        attention_mask [Q, past + C], for all tokens; cache: [Q, 2, H_kv, >= past + C, D] of each layer, which takes
        their keys and values; allowed: bool [Q or 1, 1, C, past + C], or None for the plain causal mask; acts: bool
        [Q, C], the tokens on which the low-rank pairs act, the last ones among them, or None for all.
        """
        weights = self.weights
        requests, length = ids.shape
        acts = None if acts is None else acts.flatten().unsqueeze(1)
        end = past + length
        cos, sin = self._rotation(attention_mask, past)
        residual = weights.embed(ids).view(requests * length, -1)
        normed = residual_rmsnorm.norm(residual, weights.layers[0].input_norm, weights.eps)
        last = (attention_mask[:, past:] * torch.arange(length, device=residual.device)).argmax(dim=1)
        every = torch.arange(requests, device=residual.device)
        group = weights.shape.heads // weights.shape.kv_heads
        for i, bound in enumerate(self.layers):
            if bound.generator is not None:
                stream = normed if bound.generator.stacked.normalised else residual
                self._generate_scales(bound.generator, stream.view(requests, length, -1)[every, last])
            seen = cache[i][:, :, :, :end]
            qkv, h = self._product(normed, i, "qkv", prefill=True, acts=acts)
            q = self._finish_qkv(i, qkv, h, cos, sin, seen[:, :, :, past:].permute(0, 3, 1, 2, 4), None)
            keys, values = seen.unbind(1)
            if group > 1:
                keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
            q = q.unflatten(0, (requests, length)).transpose(1, 2)
            attended = scaled_dot_product_attention(q, keys, values, allowed, is_causal=allowed is None)
            attended = attended.transpose(1, 2).reshape(requests * length, -1)
            if i == len(self.layers) - 1:  # nothing but the last token of each prompt is needed from here on
                residual = residual.view(requests, length, -1)[:, -1].contiguous()
                attended, acts = attended.view(requests, length, -1)[:, -1].contiguous(), None
            normed = self._finish_layer(i, residual, attended, prefill=True, acts=acts)
        return product(normed, weights.head)

    def run(self, tokens: torch.Tensor, view: View) -> torch.Tensor:
        """One more token of each row, int64 [rows]; logits [rows, V] of what follows."""
        weights = self.weights
        residual = weights.embed(tokens)
        normed = residual_rmsnorm.norm(residual, weights.layers[0].input_norm, weights.eps)
        for i in range(len(self.layers)):
            qkv, h = self._product(normed, i, "qkv")
            q = self._finish_qkv(i, qkv, h, view.cos, view.sin, view.entries[i], view.at)
            generated = view.generated[i] if view.generated else None
            attended = self._attention(q, view.prompt[i], generated, view.where, view.mask, view.filled)
            normed = self._finish_layer(i, residual, attended)
        return product(normed, weights.head)

    def _product(
        self, x: torch.Tensor, i: int, name: str, *, prefill: bool = False, acts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The fused product `name` of layer i, and h as the fused operations take it, None without a low-rank pair.
        acts: bool [rows, 1] of a prefill, as `read` has it."""
        projection, bound = self.weights.layers[i].projections[name], self.layers[i].projections[name]
        of_rows = product if prefill else self._few_rows
        if bound.inputs:
            return self._of_scaled_inputs(x, projection, bound, of_rows, prefill=prefill)
        if bound.expansion is None:
            return of_rows(x, projection.weight, projection.bias), None
        apart = acts is not None or (prefill and len(x) > MOST_ROWS_WITH_TAIL)
        if bound.weight is None or not takes_tail(x) or apart:
            seen = x if acts is None else x * acts
            y = of_rows(x, projection.weight, projection.bias)
            return self._beside(y, seen, bound, prefill=prefill, acts=acts)
        own, adapters = 0 if bound.a is None else bound.a.shape[0] * bound.a.shape[1], bound.expansion.adapters
        shared = bound.expansion.shared
        both = of_rows(x, bound.weight, bound.bias)
        y, ranks = both[:, : projection.columns], both[:, projection.columns :]
        return y, self._from_product(ranks[:, : own + shared], adapters, shared)

    def _beside(
        self, y: torch.Tensor, x: torch.Tensor, bound: Bound, *, prefill: bool, acts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y, and h by a product of its own."""
        if bound.expansion is None:
            return y, None
        own, h = self._own, None
        if bound.a is not None:
            h = self._shrink(x, bound.a, own)
        if bound.summed:
            h = self._joined(h, self._grouped_sum(x, bound.summed, bound.expansion.adapters))
        if bound.shared_a is not None:
            of_shared = (product if prefill else self._few_rows)(x, bound.shared_a)
            h = self._joined(h, self._as_ranks(of_shared, bound.expansion.adapters))
        if not prefill or h is None:
            return y, h
        # With many rows of a request its adapter is worth a product of tiles: the epilogues take it row by row.
        self._expand(y, h, bound.expansion, acts)
        return y, None

    def _of_scaled_inputs(
        self,
        x: torch.Tensor,
        projection: Projection,
        bound: Bound,
        of_rows: Callable[..., torch.Tensor],
        *,
        prefill: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `_product`, module by module, since each reads x by a scale of its own. No weight is read twice: of one
        that can't be read in parts, all of it is multiplied with the inputs of all modules at once, and of each
        module's its columns are taken. The many rows of a prefill are multiplied module by module."""
        weight, bias = projection.weight, projection.bias

        def read(minus_one: torch.Tensor | None) -> torch.Tensor:
            return x if minus_one is None else self._scaled(x, minus_one, self._own)

        if len(bound.inputs) == 1:
            return self._beside(of_rows(read(bound.inputs[0][1]), weight, bias), x, bound, prefill=prefill)
        y = x.new_empty(len(x), projection.columns)
        if projection.packed or isinstance(weight, Int8Weight):
            for some in [(one,) for one in bound.inputs] if prefill else [bound.inputs]:
                every = of_rows(torch.cat([read(minus_one) for _, minus_one in some]), weight, bias)
                for (columns, _), own in zip(some, every.view(len(some), len(x), -1), strict=True):
                    y[:, columns] = own[:, columns]
        else:
            for columns, minus_one in bound.inputs:
                y[:, columns] = of_rows(read(minus_one), weight[columns], None if bias is None else bias[columns])
        return self._beside(y, x, bound, prefill=prefill)

    def _finish_qkv(
        self, i: int, qkv: torch.Tensor, h: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor,
        entry: Any, at: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        bound = self.layers[i].projections["qkv"]
        return self._qkv(qkv, h, bound.expansion, bound.scale, cos, sin, entry, at, bound.rotation)

    def _finish_layer(
        self,
        i: int,
        residual: torch.Tensor,
        attended: torch.Tensor,
        *,
        prefill: bool = False,
        acts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """From the attention's output to the normed input of the next layer (or of the head); residual in place."""
        weights, bound = self.weights, self.layers[i].projections
        o, both, down = bound["o"], bound["gate_up"], bound["down"]
        y, h = self._product(attended, i, "o", prefill=prefill, acts=acts)
        normed = self._onto(residual, y, h, o, weights.layers[i].post_norm)
        gate_up, h = self._product(normed, i, "gate_up", prefill=prefill, acts=acts)
        inner = self._swiglu(gate_up, h, both.expansion, both.scale, weights.activation, both.rotation)
        y, h = self._product(inner, i, "down", prefill=prefill, acts=acts)
        following = weights.layers[i + 1].input_norm if i + 1 < len(weights.layers) else weights.norm
        return self._onto(residual, y, h, down, following)

    def _onto(
        self, residual: torch.Tensor, y: torch.Tensor, h: torch.Tensor | None, bound: Bound, norm: torch.Tensor
    ) -> torch.Tensor:
        """The normed residual, once what its adapters make of the product y is added to it. All that adapters do to an
        output is linear: done to each rank's part of y, the one sum that the base needs carries it."""
        eps = self.weights.eps
        if self.weights.reduce is None:
            return self._norm(residual, y, h, bound.expansion, norm, eps, bound.scale, bound.rotation)
        residual_rmsnorm.adapt(y, h, bound.expansion, bound.scale, bound.rotation)
        y = y.contiguous()
        self.weights.reduce(y)
        return self._norm(residual, y, None, None, norm, eps)

    def _generate_scales(self, generator: BoundGenerator, pooled: torch.Tensor) -> None:
        """The scales of the layer's projections: PARA's vectors, from its input at the last prompt tokens [Q, hidden],
        and what other tenants of the batch have stored."""
        stacked, own = generator.stacked, self._own
        vectors = self._vectors(pooled, stacked.w_down, stacked.w_up, stacked.bias_minus_one, own)
        for place in generator.places:
            if place.columns is not None:
                place.to.copy_(vectors[:, place.columns])
            if place.stored is not None:
                stored = low_rank.each_request_s(place.stored, own)
                place.to.copy_(stored if place.columns is None else row_scale.one_after_the_other(stored, place.to))

    def _rotation(self, attention_mask: torch.Tensor, past: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [Q x C, D] of the tokens after `past`; padding takes the place of the first token."""
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, past:].flatten()
        return self.weights.cos[positions], self.weights.sin[positions]
