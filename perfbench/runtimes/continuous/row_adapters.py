"""The adapters of rows that change one at a time: a request that enters a row brings its tenant's along."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch

from perfbench.kernels.low_rank import JointVectors, VectorPart
from perfbench.methods.bank import Bank
from perfbench.runtimes.static.adapters import Adapters, Bound, BoundGenerator, BoundLayer
from perfbench.runtimes.static.weights import Weights

Vectors = TypeVar("Vectors", VectorPart, JointVectors)


class OfRows(NamedTuple):
    """What neighbouring rows get, as views of what all rows have: of each layer, and which adapter each row has."""

    layers: list[BoundLayer]
    own: torch.Tensor | None


class RowAdapters(Adapters):
    """Room for an adapter in each of `rows` rows. The scales that a prompt's last token makes belong to its row too."""

    def __init__(self, bank: Bank, weights: Weights, rows: int, kernels: str):
        # Rows that are read alone and rows that take a step together see the same buffers, which a tail, whose length
        # is that of one product, could not give them.
        super().__init__(bank, weights, rows, rows, kernels, tails=False)
        if self.own is not None:
            torch.arange(rows, out=self.own)

    def put(self, row: int, slot: int) -> None:
        """Copies the adapter in the bank's `slot`, -1 being none, to `row`. ValueError on a slot out of range."""
        if not -1 <= slot < self.bank.capacity:
            raise ValueError(f"slot {slot}: expected -1 (no adapter) to {self.bank.capacity - 1}")
        source = self.bank.capacity if slot == -1 else slot  # the empty slot is the last
        self._rest[row].copy_(self.bank.rest[source])
        for to, resident in self._shrinks:
            to[row].copy_(resident[source])
        for to, mine in self._copies:
            to[row].copy_(mine[row])

    def move(self, source: int, to: int) -> None:
        """Copies all that row `source` has to row `to`."""
        places = [self._rest, *self._generated, *(place for place, _ in (*self._shrinks, *self._copies))]
        for place in places:
            place[to].copy_(place[source])

    def of_rows(self, first: int, end: int) -> OfRows:
        """Of rows `first` to `end` - 1."""
        rows = slice(first, end)
        own = None if self.own is None else self.own[: end - first]
        return OfRows([_of_layer(layer, rows, own) for layer in self.layers], own)


def _of_layer(layer: BoundLayer, rows: slice, own: torch.Tensor | None) -> BoundLayer:
    generator = layer.generator
    if generator is not None:
        places = tuple(
            place._replace(to=place.to[rows], stored=None if place.stored is None else place.stored[rows])
            for place in generator.places
        )
        generator = BoundGenerator(generator.stacked.map(lambda stacked: stacked[rows]), places)
    return BoundLayer({name: _of_bound(bound, rows, own) for name, bound in layer.projections.items()}, generator)


def _of_bound(bound: Bound, rows: slice, own: torch.Tensor | None) -> Bound:
    """Of what belongs to each adapter the rows, of what all share all of it."""

    def some(stacked: torch.Tensor | None) -> torch.Tensor | None:
        return None if stacked is None else stacked[rows]

    def vectors_of(part: Vectors) -> Vectors:
        return part._replace(of_ranks=part.of_ranks[rows], of_columns=part.of_columns[rows])

    expansion, scale, rotation = bound.expansion, bound.scale, bound.rotation
    if expansion is not None:
        expansion = expansion._replace(
            parts=tuple((rank, column, b[rows]) for rank, column, b in expansion.parts),
            alike=some(expansion.alike),
            own=own,
            bias=None if expansion.bias is None else (expansion.bias[0], expansion.bias[1][rows]),
            vectors=tuple(map(vectors_of, expansion.vectors)),
            joint=None if expansion.joint is None else vectors_of(expansion.joint),
        )
    if scale is not None:
        scale = scale._replace(minus_one=scale.minus_one[rows], own=own if scale.own is not None else None)
    if rotation is not None:
        rotation = rotation._replace(sine=rotation.sine[rows], own=own)
    inputs = tuple((columns, some(minus_one)) for columns, minus_one in bound.inputs)
    return replace(bound, a=some(bound.a), expansion=expansion, scale=scale, rotation=rotation, inputs=inputs)
