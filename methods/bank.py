"""The bank: the adapters of up to `capacity` resident tenants of one method, each in one stretch of memory.

Storage is allocated once, as two matrices with a row for each slot: `shrinks` holds the first halves of the low-rank
pairs, `rest` everything else, so that one copy of rows takes whole adapters out. The modules that read the same input
lie side by side. Slot `capacity` is the empty slot: it holds zeros for ever, and a zero low-rank pair and a zero l - 1
are the bare backbone, so a request without an adapter (slot -1) reads it by ordinary indexing. Adapters of lower rank,
or without a module, leave zeros in the rest of their place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from perfbench.errors import AdapterError
from perfbench.methods.plan import AdapterPlan, LayerPlan, LowRank
from perfbench.methods.shape import MODULES


class Bank:
    """Adapters of resident tenants, admitted to and evicted from slots without allocating."""

    def __init__(self, layout: AdapterPlan, capacity: int, dtype: torch.dtype, device: torch.device | str):
        """`layout`: a plan whose tensors (on any device, meta too) have the largest sizes to be admitted.

        `layers` holds one LayerPlan for each layer, each tensor with a leading dimension of capacity + 1 slots.
        """
        self.capacity = capacity
        self.free = list(range(capacity))[::-1]
        self.layout: AdapterPlan = tuple(_in_order(layer).map(lambda t: t.to("meta")) for layer in layout)
        shrinks = [pair.a.numel() for layer in self.layout for pair in layer.low_rank.values()]
        rest = [t.numel() for layer in self.layout for t in _without_shrinks(layer)]
        self._sizes = (shrinks, rest)
        self.shrinks, self.rest = (torch.zeros(capacity + 1, sum(n), dtype=dtype, device=device) for n in self._sizes)
        self.layers: AdapterPlan = self.views(self.shrinks, self.rest)

    def views(self, shrinks: torch.Tensor, rest: torch.Tensor) -> AdapterPlan:
        """The adapters in rows of `shrinks` and `rest` [G, ...] as a plan, each tensor with a leading dimension G."""
        first, second = iter(shrinks.split(self._sizes[0], dim=1)), iter(rest.split(self._sizes[1], dim=1))
        count = len(rest)

        def of_layer(layer: LayerPlan) -> LayerPlan:
            pairs = {}
            for module, pair in layer.low_rank.items():
                a, b = next(first), next(second)
                pairs[module] = LowRank(a.view(count, *pair.a.shape), b.view(count, *pair.b.shape))
            others = LayerPlan({}, layer.scale_minus_one, layer.generator)
            others = others.map(lambda t: next(second).view(count, *t.shape))
            return LayerPlan(pairs, others.scale_minus_one, others.generator)

        return tuple(map(of_layer, self.layout))

    def take(self, slots: Sequence[int]) -> AdapterPlan:
        """Copies of the adapters in `slots`, one after the other. ValueError on a slot out of range."""
        rows = self.rows(slots)
        return self.views(self.shrinks.index_select(0, rows), self.rest.index_select(0, rows))

    def tensors(self) -> list[torch.Tensor]:
        """All that the bank holds."""
        return [self.shrinks, self.rest]

    @property
    def bytes_per_slot(self) -> int:
        """Device bytes that one tenant takes."""
        return (self.shrinks.shape[1] + self.rest.shape[1]) * self.rest.dtype.itemsize

    def admit(self, plan: AdapterPlan) -> int:
        """Copies an adapter into a free slot and returns the slot.

        AdapterError where the bank is full or the plan does not fit its layout; then nothing has changed.
        """
        if not self.free:
            raise AdapterError(f"the bank is full: all {self.capacity} slots are taken; evict one or raise `resident`")
        if len(plan) != len(self.layers):
            raise AdapterError(f"expected an adapter of {len(self.layers)} layers, got {len(plan)}")
        pairs = [pair for i, layer in enumerate(plan) for pair in _pairs(i, self.layers[i], layer)]
        slot = self.free.pop()
        for stack, tensor in pairs:
            _write(stack[slot], tensor)
        return slot

    def evict(self, slot: int) -> None:
        """Frees a slot; its weights become zeros, so that a stale slot number serves the bare backbone."""
        if not 0 <= slot < self.capacity or slot in self.free:
            raise ValueError(f"slot {slot} holds no adapter")
        self.shrinks[slot].zero_()
        self.rest[slot].zero_()
        self.free.append(slot)

    def rows(self, slots: Sequence[int]) -> torch.Tensor:
        """int64 [Q] on the bank's device: where each request's adapter lies. ValueError on a slot out of range."""
        for slot in slots:
            if not -1 <= slot < self.capacity:
                raise ValueError(f"slot {slot}: expected -1 (no adapter) to {self.capacity - 1}")
        return torch.tensor([self.capacity if slot == -1 else slot for slot in slots], device=self.rest.device)


def union_layout(plans: Sequence[AdapterPlan]) -> AdapterPlan:
    """The smallest layout, on the meta device, that holds each of `plans`: every module of any, at the largest rank."""
    return tuple(_union([plan[i] for plan in plans]) for i in range(len(plans[0])))


def _union(layers: Sequence[LayerPlan]) -> LayerPlan:
    low_rank: dict[str, LowRank] = {}
    scales: dict[str, torch.Tensor] = {}
    generators = [layer.generator for layer in layers if layer.generator is not None]
    for layer in layers:
        for module, pair in layer.low_rank.items():
            rank = max(pair.a.shape[0], low_rank[module].a.shape[0] if module in low_rank else 0)
            low_rank[module] = LowRank(*(torch.empty(rank, t.shape[1], device="meta") for t in (pair.a, pair.b)))
        for module, scale in layer.scale_minus_one.items():
            scales[module] = scale.to("meta")
    if not generators:
        return LayerPlan(low_rank, scales)
    if len({(g.modules, g.normalised) for g in generators}) > 1:
        raise AdapterError("adapters of one bank must share their generator's modules and pooling")
    largest = max(generators, key=lambda g: g.w_down.shape[1])
    return LayerPlan(low_rank, scales, largest.map(lambda t: t.to("meta")))


def _in_order(layer: LayerPlan) -> LayerPlan:
    """The layer with its modules in the order in which they run: those that read the same input are neighbours."""
    return LayerPlan(
        {module: layer.low_rank[module] for module in MODULES if module in layer.low_rank},
        {module: layer.scale_minus_one[module] for module in MODULES if module in layer.scale_minus_one},
        layer.generator,
    )


def _without_shrinks(layer: LayerPlan) -> list[torch.Tensor]:
    """What `rest` holds of a layer, in order."""
    others = LayerPlan({}, layer.scale_minus_one, layer.generator)
    return [*(pair.b for pair in layer.low_rank.values()), *others.tensors()]


def _pairs(index: int, stacked: LayerPlan, layer: LayerPlan) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(stack, tensor) for every tensor of one layer of an adapter. AdapterError where a stack has no place for it."""
    pairs = []
    for module, pair in layer.low_rank.items():
        if module not in stacked.low_rank:
            raise AdapterError(f"layer {index}: the bank was laid out without a low-rank pair on {module}")
        pairs += [(stacked.low_rank[module].a, pair.a), (stacked.low_rank[module].b, pair.b)]
    for module, scale in layer.scale_minus_one.items():
        if module not in stacked.scale_minus_one:
            raise AdapterError(f"layer {index}: the bank was laid out without a scale on {module}")
        pairs.append((stacked.scale_minus_one[module], scale))
    if layer.generator is not None:
        own, place = layer.generator, stacked.generator
        if place is None or (place.modules, place.normalised) != (own.modules, own.normalised):
            raise AdapterError(f"layer {index}: the bank was laid out for another generator")
        pairs += [(place.w_down, own.w_down), (place.w_up, own.w_up), (place.bias_minus_one, own.bias_minus_one)]
    for stack, tensor in pairs:
        if stack[0].dim() != tensor.dim() or any(s < t for s, t in zip(stack.shape[1:], tensor.shape, strict=True)):
            raise AdapterError(f"layer {index}: expected at most {list(stack.shape[1:])}, got {list(tensor.shape)}")
    return pairs


def _write(place: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copies a tensor into the upper left corner of its place and zeros the rest."""
    if place.shape != tensor.shape:
        place.zero_()
        place = place[tuple(slice(size) for size in tensor.shape)]
    place.copy_(tensor)
