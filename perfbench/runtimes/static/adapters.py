"""The adapters of the batch in flight, in buffers that stay: other tenants are copied in, nothing moves.

So a captured decode step goes on with other tenants. The first halves of low-rank pairs are copied into the tails of
the weights, everything else into one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from perfbench.kernels import grouped_sum
from perfbench.kernels.low_rank import Expansion, JointVectors, VectorPart
from perfbench.kernels.rotation import Rotation
from perfbench.kernels.row_scale import Scale
from perfbench.methods.bank import Bank
from perfbench.methods.plan import Generator, LayerPlan
from perfbench.methods.shape import SHARED_INPUT, BackboneShape
from perfbench.runtimes.static.product import takes_tail
from perfbench.runtimes.static.weights import LayerWeights, Projection, Rooms, Weights

# A row of the fused product is as long as the weight's columns and the tail together. Triton loads 16 bytes at once
# only where the length of a row, in values of any type, is divisible by 16; real backbones' columns are.
ALIGNED_ROWS = 16


@dataclass
class Bound:
    """What one fused projection gets from T adapters: a [T, R of all its modules, D_in] or None, the ranks of the
    grouped sum of its input or 0, a [R, D_in] that all adapters share or None, and the other halves of the three; the
    weight (and bias) that ends with the first halves, None where they stand apart; its scale and its rotation or None;
    and where inputs are scaled, for each module its columns of the product and its scale minus one [T, D_in], or None.
    """

    a: torch.Tensor | None = None
    summed: int = 0
    shared_a: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    expansion: Expansion | None = None
    scale: Scale | None = None
    rotation: Rotation | None = None
    inputs: tuple[tuple[slice, torch.Tensor | None], ...] = ()


class Place(NamedTuple):
    """Where the scale of one module stands once a prompt was read: `to` [requests, D_out]. It is made of the generated
    vectors' `columns`, of the `stored` scales [T, D_out], or of both where tenants of both kinds share a bank."""

    to: torch.Tensor
    columns: slice | None
    stored: torch.Tensor | None


@dataclass(frozen=True)
class BoundGenerator:
    """The generator of one layer for T adapters, and what its vectors, and scales stored beside it, become."""

    stacked: Generator
    places: tuple[Place, ...]


@dataclass(frozen=True)
class BoundLayer:
    """Fused projection -> what it gets, and the layer's generator."""

    projections: dict[str, Bound]
    generator: BoundGenerator | None = None


BARE = BoundLayer({name: Bound() for name in SHARED_INPUT})


def stacked_slots(slots: Sequence[int], kernels: str) -> tuple[list[int], list[int] | None]:
    """(the bank slots whose adapters are stacked for a batch of these, which of them each request has).

    Plain torch takes one adapter for each request in order, or one for all (None). Compiled, it always takes one for
    each, since it would have to be compiled twice. Triton's kernels take each distinct adapter once, -1 for none; their
    number is rounded up to a power of two, so that few sizes are ever captured.
    """
    if kernels == "compiled":
        return list(slots), None
    if kernels == "eager":
        return list(slots[:1] if len(set(slots)) == 1 else slots), None
    distinct = sorted(set(slots) - {-1})
    own = [distinct.index(slot) if slot != -1 else -1 for slot in slots]
    return distinct + [-1] * ((1 << max(0, len(distinct) - 1).bit_length()) - len(distinct)), own


def tail_rows(adapters: int, ranks: int, shared: int = 0) -> int:
    """Rows of a tail for so many adapters of so many ranks each, and ranks that they share, rounded up so that rows of
    the product are aligned."""
    return -(-(adapters * ranks + shared) // ALIGNED_ROWS) * ALIGNED_ROWS


def rooms(bank: Bank, adapters: int) -> list[Rooms]:
    """The tails that this many of the bank's adapters take, for each layer."""

    def rows(layer: LayerPlan, modules: Sequence[str]) -> int:
        own = sum(layer.low_rank[module].a.shape[0] for module in modules if module in layer.low_rank)
        in_tail = summed_ranks(layer, modules) + shared_ranks(layer, modules) if takes_tail(bank.rest) else 0
        return tail_rows(adapters, own, in_tail)

    every = [{name: rows(layer, modules) for name, modules in SHARED_INPUT.items()} for layer in bank.layout]
    return [{name: count for name, count in own.items() if count} for own in every]


def summed_ranks(layer: LayerPlan, modules: Sequence[str]) -> int:
    """Of the grouped sum of the input that `modules` share, 0 without one."""
    return next((layer.grouped[module].shape[-2] for module in modules if module in layer.grouped), 0)


def shared_ranks(layer: LayerPlan, modules: Sequence[str]) -> int:
    """Of the pair that all adapters share on `modules`, which read the same input; 0 without one."""
    return next((len(layer.shared[module].a) for module in modules if module in layer.shared), 0)


class Adapters:
    """Room for the adapters of one size of batch: `layers` says what every layer gets, `take` fills it.

    tails: whether the first halves of the low-rank pairs lie in the tails of the weights, where room was reserved for
    them, or in a buffer of their own, as they do anyway beside weights that are packed.
    """

    def __init__(self, bank: Bank, weights: Weights, requests: int, adapters: int, kernels: str, *, tails: bool = True):
        self.bank = bank
        self._kernels = kernels
        self._tails = tails
        self._rest = bank.rest.new_empty(adapters, bank.rest.shape[1])
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # (to, from), from self._rest
        self._shrinks: list[tuple[torch.Tensor, torch.Tensor]] = []  # (to [T, n], from [slots, n])
        self._constants: list[tuple[torch.Tensor, torch.Tensor]] = []  # (to, from): arms overwrite each other's tails
        self._generated: list[torch.Tensor] = []
        self.own: torch.Tensor | None = None
        if kernels == "triton":
            self.own = torch.empty(requests, dtype=torch.int64, device=weights.device)
        mine = bank.views(bank.shrinks.new_empty(adapters, bank.shrinks.shape[1], device="meta"), self._rest)
        self.layers = [
            self._bind(stacked, source, layer, weights.shape, requests)
            for stacked, source, layer in zip(mine, bank.layers, weights.layers, strict=True)
        ]

    def take(self, slots: Sequence[int]) -> None:
        """Copies the adapters of a batch of requests in these bank slots out of the bank, -1 being none."""
        stacked, own = stacked_slots(slots, self._kernels)
        rows = self.bank.rows(stacked)
        torch.index_select(self.bank.rest, 0, rows, out=self._rest)
        for to, source in self._shrinks:
            torch.index_select(source, 0, rows, out=to)
        for to, source in (*self._copies, *self._constants):
            to.copy_(source)
        if self.own is not None and own is not None:
            self.own.copy_(torch.tensor(own))

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds, the tails of the weights among it."""
        held = [self._rest, *self._generated, *(to for to, _ in (*self._shrinks, *self._copies, *self._constants))]
        return held if self.own is None else [*held, self.own]

    def _bind(
        self, mine: LayerPlan, source: LayerPlan, layer: LayerWeights, shape: BackboneShape, requests: int
    ) -> BoundLayer:
        bound = {name: Bound() for name in SHARED_INPUT}
        for name, modules in SHARED_INPUT.items():
            columns = first_columns(shape, modules)
            adding = {*mine.low_rank, *mine.grouped, *mine.shared}
            if not adding.isdisjoint(modules):
                self._bind_ranks(bound[name], mine, source, layer.projections[name], modules, shape)
            scaled = {module: mine.scale_minus_one[module] for module in modules if module in mine.scale_minus_one}
            if scaled and mine.generator is None:
                bound[name].scale = Scale(
                    self._side_by_side(shape, modules, scaled), columns[next(iter(scaled))], self.own
                )
            turned = {module: mine.rotation[module].sine for module in modules if module in mine.rotation}
            if turned:
                first, sines = next(iter(turned)), self._side_by_side(shape, modules, turned)
                bound[name].rotation = Rotation(sines, mine.rotation[first].half, columns[first], self.own)
            if any(module in mine.input_scale_minus_one for module in modules):
                bound[name].inputs = tuple(
                    (slice(first, first + shape.features(module)[1]), mine.input_scale_minus_one.get(module))
                    for module, first in columns.items()
                )
        return BoundLayer(bound, self._bind_generator(mine, bound, shape, requests))

    def _bind_ranks(
        self,
        bound: Bound,
        mine: LayerPlan,
        source: LayerPlan,
        projection: Projection,
        modules: Sequence[str],
        shape: BackboneShape,
    ) -> None:
        """The pairs of the modules; behind them those whose first half is the grouped sum of the input, and behind
        those the pair that all adapters share."""
        adapters, columns = len(self._rest), first_columns(shape, modules)
        paired = [module for module in modules if module in mine.low_rank]
        pairs = [source.low_rank[module].a for module in paired]
        ranks, bound.summed = sum(a.shape[1] for a in pairs), summed_ranks(mine, modules)
        of_shared = shared_ranks(mine, modules)
        has_tail = self._tails and not projection.packed
        in_tail = bound.summed + of_shared if has_tail and takes_tail(self._rest) else 0
        if has_tail:
            used = tail_rows(adapters, ranks, in_tail)
            bound.weight, bound.bias = projection.with_tail(used)
            tail = bound.weight[len(bound.weight) - used :]
        else:
            tail = self.bank.shrinks.new_empty(adapters * ranks, projection.weight.shape[1])
        parts, alike = self._pairs(mine, paired, columns)
        if paired:
            own = tail[: adapters * ranks]
            bound.a = own.view(adapters, ranks, -1)
            self._shrinks.append((own.view(adapters, -1), neighbours(pairs).flatten(1)))  # from [slots, R, D_in]
        if of_shared:
            bound.shared_a = next(mine.shared[module].a for module in modules if module in mine.shared)
        if in_tail:
            sums, projection_rows = tail[adapters * ranks :][:in_tail].split([bound.summed, of_shared])
            if bound.summed:
                self._constants.append((sums, grouped_sum.matrix(bound.summed, sums)))
            if bound.shared_a is not None:
                self._constants.append((projection_rows, bound.shared_a))
        if bound.summed:
            grouped = {module: mine.grouped[module] for module in modules if module in mine.grouped}
            parts.append((ranks, columns[next(iter(grouped))], self._side_by_side(shape, modules, grouped)))
            alike = None
        vectors = tuple(
            VectorPart(ranks + bound.summed, columns[module], pair.b, pair.of_ranks, pair.of_columns)
            for module in modules
            if (pair := mine.shared.get(module)) is not None
        )
        alike = None if vectors else alike
        biases = {module: mine.bias[module] for module in modules if module in mine.bias}
        bias = (columns[next(iter(biases))], self._side_by_side(shape, modules, biases)) if biases else None
        joint = self._joint(vectors, modules)
        bound.expansion = Expansion(tuple(parts), alike, self.own, bound.summed + of_shared, vectors, bias, joint)

    def _joint(self, vectors: Sequence[VectorPart], modules: Sequence[str]) -> JointVectors | None:
        """Plain torch takes the vectors of all modules at once: 5 calls for a product in place of 8 for each module."""
        if self._kernels != "eager" or not vectors or len(vectors) != len(modules):
            return None
        if any(part.b is not vectors[0].b for part in vectors):
            return None
        halves = [part.of_ranks for part in vectors], [part.of_columns for part in vectors]
        of_ranks, of_columns = (torch.stack(own, dim=1) for own in halves)
        for together, own in zip((of_ranks, of_columns), halves, strict=True):
            self._copies += zip(together.unbind(1), own, strict=True)
        return JointVectors(vectors[0].rank, vectors[0].b, of_ranks, of_columns.flatten(1))

    def _pairs(
        self, mine: LayerPlan, paired: list[str], columns: dict[str, int]
    ) -> tuple[list[tuple[int, int, torch.Tensor]], torch.Tensor | None]:
        """`parts` and `alike` of the expansion of these modules' low-rank pairs."""
        weights = [mine.low_rank[module].b for module in paired]
        alike = None
        if self._kernels == "eager" and len(paired) == len(columns) > 1 and len({w.shape for w in weights}) == 1:
            # Plain torch makes one product of them, which wants the adapters without gaps.
            together = neighbours(weights)
            alike = torch.empty_like(together, memory_format=torch.contiguous_format)
            self._copies.append((alike, together))
            alike = alike.unflatten(1, (len(paired), -1))
            weights = list(alike.unbind(1))
        parts, rank = [], 0
        for module, weight in zip(paired, weights, strict=True):
            parts.append((rank, columns[module], weight))
            rank += weight.shape[1]
        return parts, alike

    def _bind_generator(
        self, mine: LayerPlan, bound: dict[str, Bound], shape: BackboneShape, requests: int
    ) -> BoundGenerator | None:
        """The vectors are each request's own, whoever shares its adapter, and so are then the scales of the layer."""
        generator, stored = mine.generator, mine.scale_minus_one
        if generator is None:
            return None
        columns = first_columns(shape, generator.modules)
        found: list[Place] = []
        for name, modules in SHARED_INPUT.items():
            scaled = [module for module in modules if module in generator.modules or module in stored]
            if scaled:
                minus_one, places = self._stretch(shape, modules, scaled, (requests,))
                self._generated.append(minus_one)
                bound[name].scale = Scale(minus_one, first_columns(shape, modules)[scaled[0]])
                for module, to in zip(scaled, places, strict=True):
                    start = columns.get(module)
                    own = None if start is None else slice(start, start + to.shape[1])
                    found.append(Place(to, own, stored.get(module)))
        return BoundGenerator(generator, tuple(found))

    def _side_by_side(self, shape: BackboneShape, modules: Sequence[str], own: dict[str, torch.Tensor]) -> torch.Tensor:
        """[T, any, columns] of those of each module [T, any, D_out], from the first to the last, zeros at those in
        between that have nothing."""
        first = next(iter(own.values()))
        if len(own) == 1:
            return first
        if first.dim() == 2 and adjacent(list(own), modules):
            return neighbours(list(own.values()))
        stretch, places = self._stretch(shape, modules, list(own), first.shape[:-1])
        self._copies += zip(places, own.values(), strict=True)
        return stretch

    def _stretch(
        self, shape: BackboneShape, modules: Sequence[str], scaled: list[str], rows: Sequence[int]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Zeros (no scale) [*rows, columns] from the first of `scaled` to the last, and each one's columns of it."""
        between = modules[modules.index(scaled[0]) : modules.index(scaled[-1]) + 1]
        columns = first_columns(shape, between)
        sizes = {module: shape.features(module)[1] for module in between}
        stretch = self._rest.new_zeros(*rows, sum(sizes.values()))
        return stretch, [stretch[..., columns[module] : columns[module] + sizes[module]] for module in scaled]


def first_columns(shape: BackboneShape, modules: Sequence[str]) -> dict[str, int]:
    """Module -> where its outputs begin in the fused projection of `modules`."""
    found, column = {}, 0
    for module in modules:
        found[module] = column
        column += shape.features(module)[1]
    return found


def adjacent(some: Sequence[str], modules: Sequence[str]) -> bool:
    """Whether `some` follow each other in `modules` without a gap."""
    return modules.index(some[-1]) - modules.index(some[0]) == len(some) - 1


def neighbours(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One view of tensors [T, n_i, ...] that lie side by side in each of T rows: [T, sum of n_i, ...]."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        # The first stride says nothing where there is one row.
        assert (part.storage_offset(), part.stride()[1:]) == (end, first.stride()[1:]), "they lie side by side"
        end += part[0].numel()
    size = (first.shape[0], sum(part.shape[1] for part in parts), *first.shape[2:])
    return first.as_strided(size, first.stride())
