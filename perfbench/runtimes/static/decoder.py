"""The forward pass of one batch: the prompts at once, then a token for each row at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.static.adapters import BARE, Adapters, Bound, BoundGenerator, each_request_s
from perfbench.runtimes.static.cache import KVCache
from perfbench.runtimes.static.capture import Step, weak
from perfbench.runtimes.static.product import OF_FEW_ROWS, product, takes_tail
from perfbench.runtimes.static.weights import Projection, Weights

# A prefill of so few rows takes the ranks out of the base product, as a decode step does: on an H200 the launches of a
# shrink and an expand for each module, from the host, were 20 of the 34 ms of 274 tokens.
MOST_ROWS_WITH_TAIL = 512


class View(NamedTuple):
    """What one decode step sees of the cache. cos, sin [rows or 1, D]; the rest, for every layer, as
    `qkv_epilogue` (entries, at) and `decode_attention` (prompt, where, mask, filled) take it."""

    cos: torch.Tensor
    sin: torch.Tensor
    entries: list[torch.Tensor] | tuple[torch.Tensor, ...]
    at: torch.Tensor | None
    prompt: list[torch.Tensor] | tuple[torch.Tensor, ...]
    where: torch.Tensor | None
    mask: torch.Tensor | None
    filled: torch.Tensor | None


class Decoder:
    """Weights, adapters and cache for batches of one size. `start` one, `prefill` it, then `step` by step; never waits
    for the device in between.

    capture None: every step sees as much of the cache as is there, cut by the host. Else the step has one size for
    all, its length is on the device, and `capture` makes it a thing to replay. Other decoders may use the cache too,
    but not between `start` and the last step.
    """

    def __init__(
        self,
        weights: Weights,
        adapters: Adapters | None,
        cache: KVCache,
        kernels: str,
        capture: Callable[[Step], Step] | None,
        *,
        padded: bool,
    ):
        self.weights, self.adapters, self.cache = weights, adapters, cache
        self.layers = adapters.layers if adapters else [BARE] * weights.shape.layers
        self.steps = 0
        size, device = cache.size, weights.device
        rows = size.requests * size.beams
        self._rows = torch.arange(rows, device=device)
        self._lengths = torch.empty(rows, dtype=torch.int64, device=device)
        self._padding: torch.Tensor | None = None
        if padded:
            capacity = size.prompt_tokens + size.places
            self._padding = torch.ones(size.requests, 1, 1, capacity, dtype=torch.bool, device=device)
        self._capture = capture
        self._replay: Step | None = None
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._logits = torch.empty(0, device=device)
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
        self._mask = decode_attention.MASKS[kernels]
        self._vectors = vector_generator.FORMS[kernels]
        self._scaled = row_scale.SCALED_ROWS[kernels]

    def start(self, batch: Batch) -> None:
        """Takes a batch of this decoder's size: its adapters and its padding, copied to where the steps find them."""
        self.batch = batch
        self._turn = self.cache.begin(clear=self._capture is not None)
        self._begin(0)
        torch.sum(batch.attention_mask.repeat_interleave(batch.beams, dim=0), dim=1, out=self._lengths)
        if self._padding is not None:
            self._padding[:, 0, 0, : batch.attention_mask.shape[1]] = batch.attention_mask
        if self.adapters is not None:
            self.adapters.take(batch.slots)

    def _begin(self, place: int) -> None:
        """The next step is the first of a turn, and puts its keys and values at `place` after the prompt."""
        self.steps, self._first_place = 0, place
        self._at.fill_(place)

    def prefill(self) -> torch.Tensor:
        """Reads the prompts; logits [Q, V] of what follows them."""
        return self._read(self.batch.input_ids, 0, self.batch.attention_mask)

    def prefill_follow_up(self, generated: torch.Tensor) -> torch.Tensor:
        """Reads the second turn, after `generated` int64 [Q, N] of the first; logits [Q, V] of what follows it.

        Goes on from the first turn's cache, unless scales are generated from the last prompt token: they are others
        now, and with them all keys and values, so that the whole conversation is read.
        """
        batch, size = self.batch, self.cache.size
        assert batch.follow_up is not None
        if self.cache.interrupted(self._turn):
            raise RuntimeError("another arm has used the cache since the first turn: generate that again, then this")
        whole = batch.conversation(generated)
        past = size.prompt_tokens + size.new_tokens - 1
        if any(layer.generator is not None for layer in self.layers):
            past = 0
        self._begin(size.new_tokens + batch.follow_up.shape[1])
        return self._read(whole.input_ids[:, past:], past, whole.attention_mask)

    def _read(self, ids: torch.Tensor, past: int, attention_mask: torch.Tensor) -> torch.Tensor:
        """Reads ids [Q, C] after `past` tokens in the cache, attention_mask [Q, past + C] being for all of them."""
        weights = self.weights
        requests, length = ids.shape
        end = past + length
        cos, sin = self._rotation(attention_mask, past)
        allowed = self._allowed(past, end)
        residual = weights.embed(ids).view(requests * length, -1)
        normed = residual_rmsnorm.norm(residual, weights.layers[0].input_norm, weights.eps)
        last = (attention_mask[:, past:] * torch.arange(length, device=residual.device)).argmax(dim=1)
        every = torch.arange(requests, device=residual.device)
        group = weights.shape.heads // weights.shape.kv_heads
        for i, bound in enumerate(self.layers):
            if bound.generator is not None:
                stream = normed if bound.generator.stacked.normalised else residual
                self._generate_scales(bound.generator, stream.view(requests, length, -1)[every, last])
            seen = self.cache.prompt[i][:, :, :, :end]
            qkv, h = self._product(normed, i, "qkv", prefill=True)
            q = self._finish_qkv(i, qkv, h, cos, sin, seen[:, :, :, past:].permute(0, 3, 1, 2, 4), None)
            keys, values = seen.unbind(1)
            if group > 1:
                keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
            q = q.unflatten(0, (requests, length)).transpose(1, 2)
            attended = scaled_dot_product_attention(q, keys, values, allowed, is_causal=allowed is None)
            attended = attended.transpose(1, 2).reshape(requests * length, -1)
            if i == len(self.layers) - 1:  # nothing but the last token of each prompt is needed from here on
                residual = residual.view(requests, length, -1)[:, -1].contiguous()
                attended = attended.view(requests, length, -1)[:, -1].contiguous()
            normed = self._finish_layer(i, residual, attended, prefill=True)
        return product(normed, weights.head)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Takes one more token of each row, int64 [rows]; logits [rows, V] of what follows, until the next step."""
        if self._capture is None:
            logits = self._run(tokens, self._growing_view())
        else:
            self._tokens.copy_(tokens)
            if self._replay is None:
                self._replay = self._capture(weak(self._fixed_step))
            self._replay()
            self._at.add_(1)
            logits = self._logits
        self.steps += 1
        return logits

    def follow(self, sources: torch.Tensor) -> None:
        """Makes row r the continuation of row sources[r], int64 [rows]; only indices move."""
        ancestors = self.cache.ancestors if self._capture else self.cache.ancestors[:, : self.steps]
        ancestors.copy_(ancestors[sources])

    def _fixed_step(self) -> None:
        """The step on what lies in fixed tensors; run twice it does the same."""
        self._logits = self._run(self._tokens, self._fixed_view())

    def _growing_view(self) -> View:
        """The cache up to this step, as far as the host knows it."""
        weights, cache, n = self.weights, self.cache, self._first_place + self.steps
        prompt_tokens, one_beam = cache.size.prompt_tokens, cache.size.beams == 1
        if self._padding is None:
            cos, sin = (t[prompt_tokens + n : prompt_tokens + n + 1] for t in (weights.cos, weights.sin))
        else:
            cos, sin = weights.cos[self._lengths + n], weights.sin[self._lengths + n]
        end = prompt_tokens + n + 1 if one_beam else prompt_tokens
        where = None
        if not one_beam:
            cache.ancestors[:, n] = self._rows
            steps = torch.arange(n + 1, device=self._rows.device)
            where = cache.ancestors[:, : n + 1] + steps * len(self._rows)
        return View(
            cos, sin, entries=[entry[n] for entry in cache.entries], at=None,
            prompt=[entry[:, :, :, :end] for entry in cache.prompt], where=where,
            mask=None if self._padding is None else self._padding[..., :end], filled=None,
        )  # fmt: skip

    def _fixed_view(self) -> View:
        """The whole cache, and on the device how much of it is there."""
        weights, cache, at = self.weights, self.cache, self._at
        positions, filled, where = self._lengths + at, at + 1, None
        length, places = cache.size.prompt_tokens, cache.size.places
        mask = self._mask(self._padding, filled, length, places)
        if cache.size.beams > 1:
            cache.ancestors.index_copy_(1, at, self._rows.unsqueeze(1))
            steps = torch.arange(places, device=at.device)
            where = cache.ancestors + steps * len(self._rows)
        else:
            filled = filled + length
        return View(
            weights.cos[positions], weights.sin[positions], entries=cache.entries, at=at,
            prompt=cache.prompt, where=where, mask=mask, filled=filled,
        )  # fmt: skip

    def _run(self, tokens: torch.Tensor, view: View) -> torch.Tensor:
        weights, cache = self.weights, self.cache
        residual = weights.embed(tokens)
        normed = residual_rmsnorm.norm(residual, weights.layers[0].input_norm, weights.eps)
        for i in range(len(self.layers)):
            qkv, h = self._product(normed, i, "qkv")
            q = self._finish_qkv(i, qkv, h, view.cos, view.sin, view.entries[i], view.at)
            generated = cache.generated[i] if cache.generated else None
            attended = self._attention(q, view.prompt[i], generated, view.where, view.mask, view.filled)
            normed = self._finish_layer(i, residual, attended)
        return product(normed, weights.head)

    def _product(
        self, x: torch.Tensor, i: int, name: str, *, prefill: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The fused product `name` of layer i, and h as the fused operations take it, None without a low-rank pair."""
        projection, bound = self.weights.layers[i].projections[name], self.layers[i].projections[name]
        of_rows = product if prefill else self._few_rows
        if bound.inputs:
            return self._of_scaled_inputs(x, projection, bound, of_rows, prefill=prefill)
        if bound.weight is None or bound.expansion is None:
            return of_rows(x, projection.weight, projection.bias), None
        if not takes_tail(x) or (prefill and len(x) > MOST_ROWS_WITH_TAIL):
            return self._beside(of_rows(x, projection.weight, projection.bias), x, bound, prefill=prefill)
        own, adapters = 0 if bound.a is None else bound.a.shape[0] * bound.a.shape[1], bound.expansion.adapters
        shared = bound.expansion.shared
        both = of_rows(x, bound.weight, bound.bias)
        y, ranks = both[:, : projection.columns], both[:, projection.columns :]
        return y, self._from_product(ranks[:, : own + shared], adapters, shared)

    def _beside(
        self, y: torch.Tensor, x: torch.Tensor, bound: Bound, *, prefill: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y, and h by a product of its own."""
        if bound.expansion is None:
            return y, None
        own, h = self.adapters.own if self.adapters else None, None
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
        self._expand(y, h, bound.expansion)
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
        """As `_product`, module by module, since each reads x by a scale of its own: no weight is read twice."""
        own, y = self.adapters.own if self.adapters else None, x.new_empty(len(x), projection.columns)
        for columns, minus_one in bound.inputs:
            read = x if minus_one is None else self._scaled(x, minus_one, own)
            bias = None if projection.bias is None else projection.bias[columns]
            y[:, columns] = of_rows(read, projection.weight[columns], bias)
        return self._beside(y, x, bound, prefill=prefill)

    def _finish_qkv(
        self, i: int, qkv: torch.Tensor, h: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor,
        entry: torch.Tensor, at: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        bound = self.layers[i].projections["qkv"]
        return self._qkv(qkv, h, bound.expansion, bound.scale, cos, sin, entry, at, bound.rotation)

    def _finish_layer(
        self, i: int, residual: torch.Tensor, attended: torch.Tensor, *, prefill: bool = False
    ) -> torch.Tensor:
        """From the attention's output to the normed input of the next layer (or of the head); residual in place."""
        weights, bound = self.weights, self.layers[i].projections
        o, both, down = bound["o"], bound["gate_up"], bound["down"]
        y, h = self._product(attended, i, "o", prefill=prefill)
        post_norm = weights.layers[i].post_norm
        normed = self._norm(residual, y, h, o.expansion, post_norm, weights.eps, o.scale, o.rotation)
        gate_up, h = self._product(normed, i, "gate_up", prefill=prefill)
        inner = self._swiglu(gate_up, h, both.expansion, both.scale, weights.activation, both.rotation)
        y, h = self._product(inner, i, "down", prefill=prefill)
        following = weights.layers[i + 1].input_norm if i + 1 < len(weights.layers) else weights.norm
        return self._norm(residual, y, h, down.expansion, following, weights.eps, down.scale, down.rotation)

    def _generate_scales(self, generator: BoundGenerator, pooled: torch.Tensor) -> None:
        """The scales of the layer's projections: PARA's vectors, from its input at the last prompt tokens [Q, hidden],
        and what other tenants of the batch have stored."""
        stacked, own = generator.stacked, self.adapters.own if self.adapters else None
        vectors = self._vectors(pooled, stacked.w_down, stacked.w_up, stacked.bias_minus_one, own)
        for place in generator.places:
            if place.columns is not None:
                place.to.copy_(vectors[:, place.columns])
            if place.stored is not None:
                stored = place.stored if own is None else each_request_s(place.stored, own)
                place.to.copy_(stored if place.columns is None else row_scale.one_after_the_other(stored, place.to))

    def _rotation(self, attention_mask: torch.Tensor, past: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [Q x C, D] of the tokens after `past`; padding takes the place of the first token."""
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, past:].flatten()
        return self.weights.cos[positions], self.weights.sin[positions]

    def _allowed(self, past: int, end: int) -> torch.Tensor | None:
        """bool [Q or 1, 1, C, end] of C = end - past tokens, or None for the plain causal mask.

        Padding sees itself, so that no row is empty: its values would be NaN, which no weight of 0 makes harmless.
        """
        if self._padding is None and not past:
            return None
        places = torch.arange(end, device=self._at.device)
        causal, itself = places[past:, None] >= places, places[past:, None] == places
        return causal[None, None] if self._padding is None else (causal & self._padding[..., :end]) | itself
