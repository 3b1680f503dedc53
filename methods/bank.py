"""The bank: the adapters of up to `capacity` resident tenants of one method, each in one stretch of memory.

Storage is allocated once, as two matrices with a row for each slot: `shrinks` holds the first halves of the low-rank
pairs, `rest` everything else, so that one copy of rows takes whole adapters out. The modules that read the same input
lie side by side. Slot `capacity` is the empty slot: it holds zeros for ever, and a zero low-rank pair and a zero l - 1
are the bare backbone, so a request without an adapter (slot -1) reads it by ordinary indexing. Adapters of lower rank,
or without a module, leave zeros in the rest of their place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from perfbench.errors import AdapterError
from perfbench.methods.plan import AdapterPlan, LayerPlan, LinearOf, LowRank

# What a module can get -> the field of LayerPlan that says so.
OPERATIONS = {
    "a low-rank pair": "low_rank",
    "a scale": "scale_minus_one",
    "a rotation": "rotation",
    "a scale of the input": "input_scale_minus_one",
    "a grouped sum": "grouped",
    "a shared pair": "shared",
    "a bias": "bias",
}


# Stands for whoever shares matrices and lies in no slot: it never leaves.
NO_SLOT = -1

# A grouped sum of so many ranks stands for those of every divisor.
MOST_GROUPED_RANKS = 1024


class Bank:
    """Adapters of resident tenants, admitted to and evicted from slots without allocating."""

    def __init__(
        self,
        layout: AdapterPlan,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        linear_of: LinearOf | None = None,
    ):
        """`layout`: a plan whose tensors (on any device, meta too) have the largest sizes to be admitted. `linear_of`:
        the backbone's linear of a layer and a module, without which no magnitudes are admitted.

        `layers` holds one LayerPlan for each layer, each tensor with a leading dimension of capacity + 1 slots.
        """
        self.capacity = capacity
        self.free = list(range(capacity))[::-1]
        self.linear_of = linear_of
        self.layout: AdapterPlan = tuple(layer.with_scales().in_order().map(_size_of, _size_of) for layer in layout)
        if not all(layer.bias.keys() <= layer.low_rank.keys() for layer in layout):
            raise ValueError("a bias is added together with a low-rank pair: expected one on each of its modules")
        shrinks = [pair.a.numel() for layer in self.layout for pair in layer.low_rank.values()]
        rest = [t.numel() for layer in self.layout for t in _without_shrinks(layer)]
        self._sizes = (shrinks, rest)
        self.shrinks, self.rest = (torch.zeros(capacity + 1, sum(n), dtype=dtype, device=device) for n in self._sizes)
        # What all tenants share, once for each size: zeros until the first of them brings it.
        self._sharing: set[int] = set()
        self._invocations: dict[int, tuple[int, ...]] = {}  # by slot
        self._shared = {
            key: torch.zeros(t.shape, dtype=dtype, device=device) for key, t in _matrices(self.layout).items()
        }
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
            others = replace(layer, low_rank={}).map(lambda t: next(second).view(count, *t.shape))
            shared = {
                module: replace(p, a=self._shared[p.keys["a"]], b=self._shared[p.keys["b"]])
                for module, p in others.shared.items()
            }
            return replace(others, low_rank=pairs, shared=shared)

        return tuple(map(of_layer, self.layout))

    def take(self, slots: Sequence[int]) -> AdapterPlan:
        """Copies of the adapters in `slots`, one after the other. ValueError on a slot out of range."""
        rows = self.rows(slots)
        return self.views(self.shrinks.index_select(0, rows), self.rest.index_select(0, rows))

    def tensors(self) -> list[torch.Tensor]:
        """All that the bank holds."""
        return [self.shrinks, self.rest, *self._shared.values()]

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
        plan = tuple(map(self._with_scales, range(len(plan)), plan))
        pairs = [pair for i, layer in enumerate(plan) for pair in _pairs(i, self.layers[i], layer)]
        self._take_shared(_matrices(plan))
        slot = self.free.pop()
        if any(layer.shared for layer in plan):
            self._sharing.add(slot)
        if (invocation := next((o.invocation for o in plan if o.invocation is not None), None)) is not None:
            self._invocations[slot] = invocation
        for stack, tensor in pairs:
            _write(stack[slot], tensor)
        # Two looks at what was written, and not one at each of hundreds of tensors, for which a GPU would be waited.
        if not all(part[slot].isfinite().all() for part in (self.shrinks, self.rest)):
            self.evict(slot)
            own = [(f"layer {i}", tensor) for i, layer in enumerate(plan) for tensor in layer.tensors()]
            _expect_in_range(own, self.rest.dtype)
            raise AdapterError("expected an adapter of finite numbers, got NaN or infinity; train it again")
        return slot

    def _with_scales(self, index: int, layer: LayerPlan) -> LayerPlan:
        if not layer.magnitude:
            return layer
        if self.linear_of is None:
            raise ValueError("a bank that admits magnitudes is made with the backbone's linears")
        try:
            return layer.with_scales(partial(self.linear_of, index))
        except AdapterError as error:
            raise AdapterError(f"layer {index}: {error}") from None

    def share(self, plan: AdapterPlan) -> None:
        """Takes what an adapter shares with all others, for one whose own part is then written into a slot directly.
        AdapterError as `admit`."""
        self._take_shared(_matrices(plan))
        if any(layer.shared for layer in plan):
            self._sharing.add(NO_SLOT)

    def _take_shared(self, matrices: dict[tuple[str | int | bool, ...], torch.Tensor]) -> None:
        """The first tenant's; AdapterError where a later one has others, and nothing has changed."""
        _expect_in_range([("the shared pair", matrix) for matrix in matrices.values()], self.rest.dtype)
        for key, matrix in matrices.items():
            own = self._shared[key]
            if self._sharing and not torch.equal(own, matrix.to(own.device, own.dtype)):
                raise AdapterError(
                    f"expected the shared matrices that the bank's other adapters have, got another {key[0]} of size "
                    f"{list(key[1:-1])}: it was drawn from another key, or for other modules"
                )
        if not self._sharing:
            for key, matrix in matrices.items():
                self._shared[key].copy_(matrix)

    def evict(self, slot: int) -> None:
        """Frees a slot; its weights become zeros, so that a stale slot number serves the bare backbone."""
        if not 0 <= slot < self.capacity or slot in self.free:
            raise ValueError(f"slot {slot} holds no adapter")
        self.shrinks[slot].zero_()
        self.rest[slot].zero_()
        self._sharing.discard(slot)
        self._invocations.pop(slot, None)
        self.free.append(slot)

    def invocation_of(self, slot: int) -> tuple[int, ...] | None:
        """What invokes the adapter in `slot`, as its plan has it; None where it acts on all tokens."""
        return self._invocations.get(slot)

    def rows(self, slots: Sequence[int]) -> torch.Tensor:
        """int64 [Q] on the bank's device: where each request's adapter lies. ValueError on a slot out of range."""
        for slot in slots:
            if not -1 <= slot < self.capacity:
                raise ValueError(f"slot {slot}: expected -1 (no adapter) to {self.capacity - 1}")
        return torch.tensor([self.capacity if slot == -1 else slot for slot in slots], device=self.rest.device)


def union_layout(plans: Sequence[AdapterPlan]) -> AdapterPlan:
    """The smallest layout, on the meta device, that holds each of `plans`: every module of any, at the largest rank;
    grouped sums at the least common multiple of all ranks. AdapterError where that is too large."""
    ranks = {b.shape[0] for plan in plans for layer in plan for b in layer.grouped.values()}
    if (rank := math.lcm(*ranks)) > MOST_GROUPED_RANKS:
        raise AdapterError(
            f"adapters of one bank must have ranks with a common multiple of at most {MOST_GROUPED_RANKS} of their "
            f"grouped sums, got {', '.join(map(str, sorted(ranks)))}"
        )
    return tuple(_union([plan[i] for plan in plans], rank) for i in range(len(plans[0])))


def _union(layers: Sequence[LayerPlan], grouped_rank: int) -> LayerPlan:
    layers = [layer.with_scales() for layer in layers]
    low_rank: dict[str, LowRank] = {}
    for layer in layers:
        for module, pair in layer.low_rank.items():
            rank = max(pair.a.shape[0], low_rank[module].a.shape[0] if module in low_rank else 0)
            low_rank[module] = LowRank(*(torch.empty(rank, t.shape[1], device="meta") for t in (pair.a, pair.b)))
    generators = [layer.generator for layer in layers if layer.generator is not None]
    if len({(g.modules, g.normalised) for g in generators}) > 1:
        raise AdapterError("adapters of one bank must share their generator's modules and pooling")
    if len(shared_ranks := {len(pair.a) for layer in layers for pair in layer.shared.values()}) > 1:
        ranks = ", ".join(map(str, sorted(shared_ranks)))
        raise AdapterError(f"adapters of one bank must share one pair of matrices, got ranks {ranks}")
    if len(halves := {own.half for layer in layers for own in layer.rotation.values()}) > 1:
        sizes = ", ".join(str(2 * half) for half in sorted(halves))
        raise AdapterError(f"adapters of one bank must share the size of the groups that they rotate, got {sizes}")
    largest = max(generators, key=lambda g: g.w_down.shape[1], default=None)
    return LayerPlan(
        low_rank,
        _any_of([layer.scale_minus_one for layer in layers]),
        largest,
        _any_of([layer.rotation for layer in layers]),
        _any_of([layer.input_scale_minus_one for layer in layers]),
        {
            module: torch.empty(grouped_rank, b.shape[1], device="meta")
            for layer in layers
            for module, b in layer.grouped.items()
        },
        _any_of([layer.shared for layer in layers]),
        bias=_any_of([layer.bias for layer in layers]),
    ).map(_size_of, _size_of)


def sizes_of(plan: AdapterPlan) -> AdapterPlan:
    """`plan` on the meta device: its sizes alone."""
    return tuple(layer.map(_size_of, _size_of) for layer in plan)


def _size_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


def _matrices(plan: AdapterPlan) -> dict[tuple[str | int | bool, ...], torch.Tensor]:
    """`SharedPair.keys` -> what all tenants share."""
    pairs = [pair for layer in plan for pair in layer.shared.values()]
    return {key: getattr(pair, half) for pair in pairs for half, key in pair.keys.items()}


def _any_of(of_layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every module of any, where all that a module can have are of one size."""
    return {module: own for one in of_layers for module, own in one.items()}


def _without_shrinks(layer: LayerPlan) -> list[torch.Tensor]:
    """What `rest` holds of a layer, in order."""
    return [*(pair.b for pair in layer.low_rank.values()), *replace(layer, low_rank={}).tensors()]


def _pairs(index: int, stacked: LayerPlan, layer: LayerPlan) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(stack, tensor) for every tensor of one layer of an adapter. AdapterError where a stack has no place for it."""
    for what, field in OPERATIONS.items():
        for module in getattr(layer, field):
            if module not in getattr(stacked, field):
                raise AdapterError(f"layer {index}: the bank was laid out without {what} on {module}")
    if layer.generator is not None:
        own, place = layer.generator, stacked.generator
        if place is None or (place.modules, place.normalised) != (own.modules, own.normalised):
            raise AdapterError(f"layer {index}: the bank was laid out for another generator")
    for module, pair in layer.shared.items():
        if pair.a.shape != stacked.shared[module].a.shape:
            ranks = len(stacked.shared[module].a)
            raise AdapterError(f"layer {index}: the bank shares a pair of rank {ranks} on {module}, not {len(pair.a)}")
    for module, turned in layer.rotation.items():
        if turned.half != stacked.rotation[module].half:
            size = 2 * stacked.rotation[module].half
            raise AdapterError(f"layer {index}: the bank rotates {module} in groups of {size}, not {2 * turned.half}")
    layer = replace(
        layer, grouped={module: _repeated(index, stacked.grouped[module], b) for module, b in layer.grouped.items()}
    )
    only: dict[str, Any] = {
        field: {m: getattr(stacked, field)[m] for m in getattr(layer, field)} for field in OPERATIONS.values()
    }
    places = replace(stacked, **only, generator=stacked.generator if layer.generator is not None else None)
    pairs = list(zip(places.tensors(), layer.tensors(), strict=True))
    for stack, tensor in pairs:
        if stack[0].dim() != tensor.dim() or any(s < t for s, t in zip(stack.shape[1:], tensor.shape, strict=True)):
            raise AdapterError(f"layer {index}: expected at most {list(stack.shape[1:])}, got {list(tensor.shape)}")
    return pairs


def _expect_in_range(tensors: Sequence[tuple[str, torch.Tensor]], dtype: torch.dtype) -> None:
    """AdapterError where a number of (where, tensor), finite as it is, is infinite in `dtype`: fp16 ends at 65,504."""
    largest = torch.finfo(dtype).max
    for where, tensor in tensors:
        if torch.finfo(tensor.dtype).max > largest and not tensor.to(dtype).isfinite().all():
            raise AdapterError(
                f"{where}: a number of the adapter is {tensor.abs().max().item():.3g}, more than "
                f"{str(dtype).removeprefix('torch.')} holds ({largest:.3g}); choose bf16 or fp32"
            )


def _repeated(index: int, stack: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """b [r, D_out] of sums over every r-th input for sums over every R-th, of which several make one of those."""
    ranks = stack.shape[1]
    if ranks % b.shape[0]:
        raise AdapterError(f"layer {index}: the bank was laid out for ranks that divide {ranks}, got {b.shape[0]}")
    return b.repeat(ranks // b.shape[0], 1)


def _write(place: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copies a tensor into the upper left corner of its place and zeros the rest."""
    if place.shape != tensor.shape:
        place.zero_()
        place = place[tuple(slice(size) for size in tensor.shape)]
    place.copy_(tensor)
