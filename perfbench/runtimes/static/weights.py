"""The weights as the static runtime reads them: Q, K and V as one matrix, gate and up as another, held once.

On a CPU a matrix is packed where oneDNN can. Any other has a tail: rows below it in the same buffer, for the first
halves of the low-rank pairs of the batch in flight, so that one product gives the base output and every adapter's
ranks. Concatenated, never merged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch

from perfbench.errors import BackboneError
from perfbench.methods.shape import MODULE_PATHS, SHARED_INPUT, BackboneShape
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.int8_linear import Int8Linear, Int8Weight, join
from perfbench.runtimes.packed_linear import pack
from perfbench.runtimes.static.cache import CacheSize, KVCache
from perfbench.spec.runtime_support import unsupported

# Fused projection -> rows of its tail.
Rooms = dict[str, int]


class Projection:
    """One fused product, of the linear modules of `model` at `paths`. weight [D_out, D_in], which may be packed
    or of 8 bits; bias [D_out] or None; tail [room, D_in], which a packed weight lacks; a tail's bias is 0."""

    def __init__(self, model: torch.nn.Module, paths: Sequence[str]):
        packed = _packed(model, paths)
        self._linears: list[Any] = [model.get_submodule(path) for path in paths]
        self.columns = sum(linear.out_features for linear in self._linears)
        self.packed = packed is not None
        if packed is None:
            self._lay_out(0)
        else:
            self.weight: torch.Tensor | Int8Weight = packed
            self.bias = self._join_biases(0)

    def _lay_out(self, room: int) -> None:
        """Puts the weights into a buffer with a tail of `room` rows; the linear modules become views of it."""
        self._weight = _join([linear.weight for linear in self._linears], room)
        self._bias = self._join_biases(room)
        self.weight, self.tail = self._weight[: self.columns], self._weight[self.columns :]
        self.bias = None if self._bias is None else self._bias[: self.columns]

    def _join_biases(self, room: int) -> torch.Tensor | None:
        biases = [linear.bias for linear in self._linears]
        return None if biases[0] is None else _join(biases, room)

    def fit(self, room: int) -> bool:
        """Makes the tail, where there is one, `room` rows long; whether it had to move."""
        if self.packed or room == len(self.tail):
            return False
        self._lay_out(room)
        return True

    def with_tail(self, rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias with the first `rows` of the tail."""
        end = self.columns + rows
        return self._weight[:end], None if self._bias is None else self._bias[:end]


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer: fused projection by name; the norms [hidden], in fp32 where the family multiplies by
    1 + weight (Gemma)."""

    projections: dict[str, Projection]
    input_norm: torch.Tensor
    post_norm: torch.Tensor


@dataclass
class Weights:
    """A whole backbone. cos, sin: [context, head_dim / 2 twice] with sin negated in the first half, so that RoPE is
    x cos + swap(x) sin, swap exchanging the halves of a head. `version` counts how often a tail has moved. `reduce`: as
    `Backbone` has it."""

    shape: BackboneShape
    dtype: torch.dtype
    device: torch.device
    embed: torch.nn.Module
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: torch.Tensor | Int8Weight  # packed where it may be, and is not the embedding too
    eps: float
    activation: str
    cos: torch.Tensor
    sin: torch.Tensor
    reduce: Callable[[torch.Tensor], None] | None = None
    version: int = 0
    _held: dict[int, list[Rooms]] = field(default_factory=dict)
    _caches: WeakValueDictionary[CacheSize, KVCache] = field(default_factory=WeakValueDictionary)
    _users: WeakSet[Any] = field(default_factory=WeakSet)

    def hold(self, holder: object, rooms: list[Rooms]) -> None:
        """Keeps tails of at least this many rows in each layer until `holder` lets them go."""
        self._held[id(holder)] = rooms
        self._fit()

    def let_go(self, holder: object) -> None:
        """The tails shrink to what the others hold; `holder` no longer uses the weights."""
        self._users.discard(holder)
        if self._held.pop(id(holder), None) is not None:
            self._fit()

    def use(self, user: object) -> None:
        """Counts `user` among those who read the weights as they are here."""
        self._users.add(user)

    @property
    def used(self) -> bool:
        """Whether anybody who said so still reads them."""
        return bool(self._users)

    def cache(self, size: CacheSize) -> KVCache:
        """The one cache for batches of this size, for all who ask while one of them still holds it: arms take turns,
        and at 64 requests of a 7B backbone each cache takes 10 GB. It goes with the last who holds it."""
        found = self._caches.get(size)
        if found is None:
            found = self._caches[size] = KVCache(size, self.shape, self.dtype, self.device)
        return found

    def _fit(self) -> None:
        moved = False
        for i, layer in enumerate(self.layers):
            for name, projection in layer.projections.items():
                room = max((rooms[i].get(name, 0) for rooms in self._held.values()), default=0)
                moved |= projection.fit(room)
        self.version += moved


def fuse(backbone: Backbone, user: object | None = None) -> Weights:
    """The weights of `backbone`, whose linear modules become views of the fused ones, or are replaced by packed ones:
    nothing is held twice. Until `user` is gone, or lets them go, packed ones stay packed.

    A second call finds what the first one made. BackboneError for what the runtime does not have.
    """
    if not isinstance(backbone.fused, Weights):
        backbone.fused = _fused(backbone)
    found: Weights = backbone.fused
    if user is not None:
        found.use(user)
    return found


def _fused(backbone: Backbone) -> Weights:
    model = backbone.model
    if (problem := unsupported("static", model.config.to_dict())) is not None:
        raise BackboneError(f"{backbone.name}: {problem}")
    rotary = model.model.rotary_emb
    positions = torch.arange(backbone.shape.context, device=backbone.device).unsqueeze(0)
    cos, sin = rotary(torch.empty(0, dtype=torch.float32, device=backbone.device), positions)
    half = backbone.shape.head_dim // 2
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    packed = None
    if isinstance(head, Int8Linear) or head.weight is not embed.weight:
        packed = _packed(model, [next(path for path, module in model.named_modules() if module is head)])
    sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    return Weights(
        shape=backbone.shape,
        dtype=backbone.dtype,
        device=backbone.device,
        embed=embed,
        layers=tuple(_layer(layer, model.config.model_type) for layer in model.model.layers),
        norm=_norm(model.model.norm, model.config.model_type),
        head=head.weight if packed is None else packed,
        eps=model.config.rms_norm_eps,
        activation=model.config.hidden_act,
        cos=cos[0].to(backbone.dtype),
        sin=sin[0].to(backbone.dtype),
        reduce=backbone.reduce,
    )


def _layer(layer: Any, family: str) -> LayerWeights:
    projections = {
        name: Projection(layer, [MODULE_PATHS[module] for module in modules]) for name, modules in SHARED_INPUT.items()
    }
    return LayerWeights(
        projections, _norm(layer.input_layernorm, family), _norm(layer.post_attention_layernorm, family)
    )


def _packed(model: torch.nn.Module, paths: Sequence[str]) -> torch.Tensor | Int8Weight | None:
    """The weights at `paths`, one below the other; None where they stay as they are."""
    linears: list[Any] = [model.get_submodule(path) for path in paths]
    return join(linears) if isinstance(linears[0], Int8Linear) else pack(model, paths)


def _norm(module: Any, family: str) -> torch.Tensor:
    weight: torch.Tensor = module.weight.data
    return 1.0 + weight.float() if family == "gemma" else weight


def _join(parts: Sequence[torch.Tensor], room: int) -> torch.Tensor:
    """One tensor of which `parts`, joined along the first dimension, are views from now on, and `room` zeros below."""
    first = parts[0].data
    rows = [part.shape[0] for part in parts]
    fused = first.new_empty(sum(rows) + room, *first.shape[1:])
    for part, view in zip(parts, fused[: sum(rows)].split(rows), strict=True):
        view.copy_(part.data)
        part.data = view
    fused[sum(rows) :].zero_()
    return fused
