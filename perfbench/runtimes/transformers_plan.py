"""Runtime `transformers`: the Hugging Face model and its `generate()`, with layer plans put on its linear modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from perfbench.kernels import grouped_sum, low_rank, rotation, row_scale, vector_generator
from perfbench.kernels.row_scale import one_after_the_other
from perfbench.methods.bank import Bank
from perfbench.methods.plan import Generator, Rotation, SharedPair
from perfbench.methods.shape import MODULE_PATHS
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.generation import Batch, Generation, generate
from perfbench.runtimes.shared_context import acting, invoked


class AdaptedLinear(torch.nn.Module):
    """A linear of the backbone, plus what the requests of the batch in flight get on it.

    While a batch is bound, of G groups of rows: pair = (a [G, R, D_in], b [G, R, D_out]), scale_minus_one [G, D_out],
    rotation with sine [G, D_out], input_scale_minus_one [G, D_in], grouped [G, R, D_out], shared with vectors [G, any],
    added_bias [G, D_out]; each None without one. acts: [rows, S, 1] of a prompt, 0 on the tokens on which pair and bias
    do not act.
    """

    def __init__(self, base: torch.nn.Linear, kernels: str):
        super().__init__()
        self.base = base
        self.pair: tuple[torch.Tensor, torch.Tensor] | None = None
        self.scale_minus_one: torch.Tensor | None = None
        self.acts: torch.Tensor | None = None
        self.rotation: Rotation | None = None
        self.input_scale_minus_one: torch.Tensor | None = None
        self.grouped: torch.Tensor | None = None
        self.shared: SharedPair | None = None
        self.added_bias: torch.Tensor | None = None
        self._low_rank: Callable[..., None] = low_rank.FORMS[kernels]
        self._row_scale: Callable[..., None] = row_scale.FORMS[kernels]
        self._rotation: Callable[..., torch.Tensor] = rotation.FORMS[kernels]
        self._grouped_sum: Callable[..., torch.Tensor] = grouped_sum.FORMS[kernels]
        self._as_ranks: Callable[..., torch.Tensor] = low_rank.AS_RANKS[kernels]
        self._expand: Callable[..., None] = low_rank.EXPANDS[kernels]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, S, D_in] -> [rows, S, D_out]; rows of one request lie side by side."""
        y = self.base.forward(self._scaled_input(x))
        if self.pair is not None:
            a, b = self.pair
            groups = a.shape[0]
            # More than one token is a prompt.
            acts = None if x.shape[1] == 1 else self.acts
            seen = x if acts is None else x * acts
            self._low_rank(y.view(groups, -1, y.shape[-1]), seen.reshape(groups, -1, x.shape[-1]), a, b)
            if self.added_bias is not None:
                low_rank.add_bias(y.view(-1, y.shape[-1]), 0, self.added_bias, acts)
        if self.grouped is not None:
            groups, rank, _ = self.grouped.shape
            h = self._grouped_sum(x.reshape(-1, x.shape[-1]), rank, groups)
            self._expand(y.view(-1, y.shape[-1]), h, low_rank.Expansion(((0, 0, self.grouped),)))
        if self.shared is not None:
            own = self.shared
            part = low_rank.VectorPart(0, 0, own.b, own.of_ranks, own.of_columns)
            h = self._as_ranks(linear(x.reshape(-1, x.shape[-1]), own.a), len(own.of_ranks))
            self._expand(y.view(-1, y.shape[-1]), h, low_rank.Expansion((), vectors=(part,)))
        if self.rotation is not None:
            sine, half = self.rotation.sine, self.rotation.half
            turned = self._rotation(y.view(len(sine), -1, y.shape[-1]), self.scale_minus_one, sine, half)
            return turned.view(y.shape)
        if self.scale_minus_one is not None:
            groups = self.scale_minus_one.shape[0]
            self._row_scale(y.view(groups, -1, y.shape[-1]), self.scale_minus_one)
        return y

    def _scaled_input(self, x: torch.Tensor) -> torch.Tensor:
        """Other modules read the same x."""
        if self.input_scale_minus_one is None:
            return x
        copy, groups = x.clone(), len(self.input_scale_minus_one)
        self._row_scale(copy.view(groups, -1, x.shape[-1]), self.input_scale_minus_one)
        return copy

    def release(self) -> None:
        """The linear is the backbone's own again."""
        self.pair = self.scale_minus_one = self.rotation = self.input_scale_minus_one = None
        self.grouped = self.shared = self.added_bias = self.acts = None


class PromptVectors:
    """A layer's generated scales: made when the layer sees the prompt, kept while its tokens are generated."""

    def __init__(self, modules: dict[str, AdaptedLinear], kernels: str):
        self.modules = modules
        self.own: Generator | None = None  # of each group of requests, while a batch is bound
        self.stored: dict[str, torch.Tensor] = {}  # module -> the scale that it has beside, of the same groups
        self.last_prompt_token: torch.Tensor | None = None  # [Q]
        self.beams = 1
        self._generate: Callable[..., torch.Tensor] = vector_generator.FORMS[kernels]

    def before_layer(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook before a decoder layer. An empty cache, not S > 1, is what tells a prompt from a generated token."""
        cache = kwargs.get("past_key_values")
        own = self.own
        if own is None or (cache is not None and cache.get_seq_length(layer.self_attn.layer_idx) > 0):
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        # The beams of one prompt are copies at this point: the first one speaks for all.
        hidden = hidden[:: self.beams]
        pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), self.last_prompt_token]
        if own.normalised:
            pooled = layer.input_layernorm(pooled)
        vectors = self._generate(pooled, own.w_down, own.w_up, own.bias_minus_one)
        sizes = [self.modules[name].base.out_features for name in own.modules]
        for name, vector in zip(own.modules, vectors.split(sizes, dim=1), strict=True):
            stored = self.stored.get(name)
            self.modules[name].scale_minus_one = vector if stored is None else one_after_the_other(stored, vector)


class PlanArm:
    """The adapters of a bank (or none) on a Hugging Face model; a skeleton of its own over the shared weights."""

    def __init__(self, backbone: Backbone, bank: Bank | None, kernels: str):
        self.model = backbone.skeleton()
        self.bank = bank
        self._linears: list[dict[str, AdaptedLinear]] = []
        self._vectors: dict[int, PromptVectors] = {}
        for i, stacked in enumerate(bank.layout if bank else ()):
            layer = self.model.model.layers[i]
            linears = {name: _adapt(layer, name, kernels) for name in stacked.modules}
            self._linears.append(linears)
            if stacked.generator is not None:
                vectors = PromptVectors(linears, kernels)
                layer.register_forward_pre_hook(vectors.before_layer, with_kwargs=True)
                self._vectors[i] = vectors

    def generate(self, batch: Batch, **observers: Any) -> Generation:
        """Binds the batch's adapters, generates, lets them go; copying them is part of the call and of its time."""
        batch = invoked(batch, self.bank)
        self._bind(batch)
        try:
            return generate(self.model, batch, **observers)
        finally:
            self._release()

    def _bind(self, batch: Batch) -> None:
        if self.bank is None:
            return
        # Where all requests have one adapter, one group of rows reads it once.
        slots = batch.slots[:1] if len(set(batch.slots)) == 1 else batch.slots
        taken, acts = self.bank.take(slots), acting(batch)
        if acts is not None:
            acts = acts.repeat_interleave(batch.beams, dim=0).unsqueeze(2).to(self.model.dtype)
        for own, linears in zip(taken, self._linears, strict=True):
            for name, pair in own.low_rank.items():
                linears[name].pair, linears[name].acts = (pair.a, pair.b), acts
            for name, bias in own.bias.items():
                linears[name].added_bias = bias
            for name, scale in own.scale_minus_one.items():
                linears[name].scale_minus_one = scale
            for name, turned in own.rotation.items():
                linears[name].rotation = turned
            for name, scale in own.input_scale_minus_one.items():
                linears[name].input_scale_minus_one = scale
            for name, b in own.grouped.items():
                linears[name].grouped = b
            for name, shared in own.shared.items():
                linears[name].shared = shared
        if self._vectors:
            positions = torch.arange(batch.attention_mask.shape[1], device=batch.attention_mask.device)
            last = (batch.attention_mask * positions).argmax(dim=1)  # right for left and for right padding
            for i, vectors in self._vectors.items():
                vectors.own, vectors.last_prompt_token, vectors.beams = taken[i].generator, last, batch.beams
                vectors.stored = taken[i].scale_minus_one

    def _release(self) -> None:
        for linears in self._linears:
            for module in linears.values():
                module.release()
        for vectors in self._vectors.values():
            vectors.own, vectors.last_prompt_token, vectors.stored = None, None, {}

    def tensors(self) -> list[torch.Tensor]:
        """The bank's stacks."""
        return self.bank.tensors() if self.bank else []

    def close(self) -> None:
        """Drops the skeleton and the bank."""
        self._linears, self._vectors = [], {}
        self.model = self.bank = None


def _adapt(layer: torch.nn.Module, name: str, kernels: str) -> AdaptedLinear:
    path = MODULE_PATHS[name]
    base = layer.get_submodule(path)
    if not isinstance(base, torch.nn.Linear):
        raise TypeError(f"{path}: expected a torch Linear, got {type(base).__name__}")
    adapted = AdaptedLinear(base, kernels)
    layer.set_submodule(path, adapted)
    return adapted
