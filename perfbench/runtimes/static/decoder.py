"""The forward pass of one batch: the prompts at once, then a token for each row at a time."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from perfbench.kernels import (
    decode_attention,
    low_rank,
    qkv_epilogue,
    residual_rmsnorm,
    swiglu_epilogue,
    vector_generator,
)
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.static.adapters import Bound, BoundGenerator, BoundLayer, join_scales
from perfbench.runtimes.static.cache import KVCache
from perfbench.runtimes.static.product import product
from perfbench.runtimes.static.weights import FUSED, Weights


class Decoder:
    """One batch in flight: weights, what its requests get on them, and its cache. Never waits for the device once
    it is made."""

    def __init__(self, weights: Weights, layers: list[BoundLayer], cache: KVCache, batch: Batch, kernels: str):
        self.weights, self.layers, self.cache, self.batch = weights, layers, cache, batch
        self.steps = 0
        mask = batch.attention_mask.bool()
        self._lengths = batch.attention_mask.sum(dim=1).repeat_interleave(batch.beams)
        self._padding: torch.Tensor | None = None
        if not bool(mask.all()):
            seen = torch.ones(len(mask), cache.prompt[0].shape[3], dtype=torch.bool, device=mask.device)
            seen[:, : mask.shape[1]] = mask
            self._padding = seen[:, None, None, :]
        self._shrink = low_rank.SHRINKS[kernels]
        self._qkv = qkv_epilogue.FORMS[kernels]
        self._swiglu = swiglu_epilogue.FORMS[kernels]
        self._norm = residual_rmsnorm.FORMS[kernels]
        self._attention = decode_attention.FORMS[kernels]
        self._vectors = vector_generator.FORMS[kernels]

    def prefill(self) -> torch.Tensor:
        """Reads the prompts; logits [Q, V] of what follows them."""
        weights, batch = self.weights, self.batch
        requests, length = batch.input_ids.shape
        cos, sin = self._rotation(batch.attention_mask)
        allowed = self._allowed()
        residual = weights.embed(batch.input_ids).view(requests * length, -1)
        normed = residual_rmsnorm.norm(residual, weights.layers[0].input_norm, weights.eps)
        last = (batch.attention_mask * torch.arange(length, device=residual.device)).argmax(dim=1)
        every = torch.arange(requests, device=residual.device)
        for i, bound in enumerate(self.layers):
            if bound.generator is not None:
                stream = normed if bound.generator.stacked.normalised else residual
                self._generate_scales(bound, stream.view(requests, length, -1)[every, last])
            entry = self.cache.prompt[i][:, :, :, :length]
            q = self._project_qkv(i, normed, cos, sin, entry.permute(0, 3, 1, 2, 4))
            group = weights.shape.heads // weights.shape.kv_heads
            keys, values = entry.unbind(1)
            if group > 1:
                keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
            q = q.unflatten(0, (requests, length)).transpose(1, 2)
            attended = scaled_dot_product_attention(q, keys, values, allowed, is_causal=allowed is None)
            attended = attended.transpose(1, 2).reshape(requests * length, -1)
            if i == len(self.layers) - 1:  # nothing but the last token of each prompt is needed from here on
                residual = residual.view(requests, length, -1)[:, -1].contiguous()
                attended = attended.view(requests, length, -1)[:, -1].contiguous()
            normed = self._finish_layer(i, residual, attended)
        return product(normed, weights.head)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Takes one more token of each row, int64 [rows]; logits [rows, V] of what follows."""
        weights, beams, cache, n = self.weights, self.batch.beams, self.cache, self.steps
        prompt_tokens = self.batch.input_ids.shape[1]
        if self._padding is None:
            cos, sin = (t[prompt_tokens + n : prompt_tokens + n + 1] for t in (weights.cos, weights.sin))
        else:
            cos, sin = weights.cos[self._lengths + n], weights.sin[self._lengths + n]
        rows = len(tokens)
        end = prompt_tokens + n + 1 if beams == 1 else prompt_tokens
        mask = None if self._padding is None else self._padding[..., :end]
        where = None
        if beams > 1:
            cache.ancestors[:, n] = torch.arange(rows, device=tokens.device)
            steps = torch.arange(n + 1, device=tokens.device)
            where = cache.ancestors[:, : n + 1] + steps * rows
        residual = weights.embed(tokens)
        normed = residual_rmsnorm.norm(residual, weights.layers[0].input_norm, weights.eps)
        for i in range(len(self.layers)):
            entry = cache.prompt[i][:, :, :, end - 1] if where is None else cache.generated[i][n]
            q = self._project_qkv(i, normed, cos, sin, entry)
            generated = None if where is None else cache.generated[i]
            attended = self._attention(q, cache.prompt[i][:, :, :, :end], generated, where, mask)
            normed = self._finish_layer(i, residual, attended)
        self.steps = n + 1
        return product(normed, weights.head)

    def follow(self, sources: torch.Tensor) -> None:
        """Makes row r the continuation of row sources[r], int64 [rows]; only indices move."""
        self.cache.ancestors[:, : self.steps] = self.cache.ancestors[sources, : self.steps]

    def _project_qkv(
        self, i: int, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, entry: torch.Tensor
    ) -> torch.Tensor:
        layer, bound = self.weights.layers[i], self.layers[i].projections["qkv"]
        qkv = product(normed, layer.weights["qkv"], layer.biases["qkv"])
        h = self._low_rank(normed, bound)
        return self._qkv(qkv, h, bound.expansion, bound.scale_minus_one, bound.scale_from, cos, sin, entry)

    def _finish_layer(self, i: int, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """From the attention's output to the normed input of the next layer (or of the head); residual in place."""
        weights, layer, bound = self.weights, self.weights.layers[i], self.layers[i].projections
        self._add(residual, attended, layer.weights["o"], layer.biases["o"])
        h = self._low_rank(attended, bound["o"])
        normed = self._norm(residual, h, bound["o"].expansion, layer.post_norm, weights.eps)
        gate_up = product(normed, layer.weights["gate_up"], layer.biases["gate_up"])
        h, up = self._low_rank(normed, bound["gate_up"]), bound["gate_up"]
        inner = self._swiglu(gate_up, h, up.expansion, up.scale_minus_one, up.scale_from, weights.activation)
        self._add(residual, inner, layer.weights["down"], layer.biases["down"])
        h = self._low_rank(inner, bound["down"])
        following = weights.layers[i + 1].input_norm if i + 1 < len(weights.layers) else weights.norm
        return self._norm(residual, h, bound["down"].expansion, following, weights.eps)

    def _low_rank(self, x: torch.Tensor, bound: Bound) -> torch.Tensor | None:
        return None if bound.a is None else self._shrink(x, bound.a)

    @staticmethod
    def _add(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        residual.add_(product(x, weight, bias))

    def _generate_scales(self, bound: BoundLayer, pooled: torch.Tensor) -> None:
        """PARA's vectors for the layer's projections, from its input at the last prompt tokens [Q, hidden]."""
        generator = bound.generator
        assert isinstance(generator, BoundGenerator)
        stacked, rows, shape = generator.stacked, generator.rows, self.weights.shape
        vectors = self._vectors(pooled, stacked.w_down[rows], stacked.w_up[rows], stacked.bias_minus_one[rows])
        sizes = [shape.features(module)[1] for module in stacked.modules]
        made = dict(zip(stacked.modules, vectors.split(sizes, dim=1), strict=True))
        for name, modules in FUSED.items():
            scaled = {module: made[module] for module in modules if module in made}
            if scaled:
                projection = bound.projections[name]
                projection.scale_from, projection.scale_minus_one = join_scales(shape, modules, scaled)

    def _rotation(self, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [Q x S, D] of the prompts' tokens; padding takes the place of the first token."""
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0).flatten()
        return self.weights.cos[positions], self.weights.sin[positions]

    def _allowed(self) -> torch.Tensor | None:
        """bool [Q, 1, S, S] where padding needs it, else None for the plain causal mask.

        Padding sees itself, so that no row is empty: its values would be NaN, which no weight of 0 makes harmless.
        """
        if self._padding is None:
            return None
        length = self.batch.input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self._padding.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=self._padding.device)
        return (causal & self._padding[..., :length]) | itself
