"""The adapters of the batch in flight: each request's own, taken out of the bank and joined as the weights are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from perfbench.kernels.low_rank import Expansion
from perfbench.methods.bank import Bank
from perfbench.methods.plan import Generator, LayerPlan
from perfbench.methods.shape import BackboneShape
from perfbench.runtimes.static.weights import FUSED


@dataclass
class Bound:
    """What one fused projection gets, for G groups of rows that share an adapter.

    a: [G, R of all its modules, D_in] and the other halves, or None; scale_minus_one: [G, D] on the columns from
    `scale_from` on, or None.
    """

    a: torch.Tensor | None = None
    expansion: Expansion | None = None
    scale_minus_one: torch.Tensor | None = None
    scale_from: int = 0


@dataclass
class BoundGenerator:
    """The generator of one layer: stacked weights, and the bank row of each group."""

    stacked: Generator
    rows: torch.Tensor


@dataclass
class BoundLayer:
    """Fused projection -> what it gets, and the layer's generator."""

    projections: dict[str, Bound]
    generator: BoundGenerator | None


BARE = {name: Bound() for name in FUSED}


def bind(bank: Bank | None, shape: BackboneShape, slots: Sequence[int], *, stack: bool) -> list[BoundLayer]:
    """What every layer gets for requests in these bank slots, -1 being the bare backbone.

    stack: whether modules that are alike are laid out for one product, which plain torch profits from.
    """
    if bank is None:
        return [BoundLayer(BARE, None)] * shape.layers
    # Where all requests have one adapter, one group of rows reads it once.
    own = slots[:1] if len(set(slots)) == 1 else slots
    rows = bank.rows(own)
    return [_bind_layer(stacked, shape, rows, stack) for stacked in bank.layers]


def _bind_layer(stacked: LayerPlan, shape: BackboneShape, rows: torch.Tensor, stack: bool) -> BoundLayer:
    projections = {}
    for name, modules in FUSED.items():
        bound = projections[name] = Bound()
        columns = first_columns(shape, modules)
        paired = [module for module in modules if module in stacked.low_rank]
        if paired:
            shrinks = [stacked.low_rank[module].a[rows] for module in paired]
            bound.a = shrinks[0] if len(shrinks) == 1 else torch.cat(shrinks, dim=1)
            weights = {module: stacked.low_rank[module].b[rows] for module in paired}
            bound.expansion = _expansion(weights, columns, stack=stack and len(paired) == len(modules))
        scales = stacked.scale_minus_one
        scaled = {module: scales[module][rows] for module in modules if module in scales}
        if scaled:
            bound.scale_from, bound.scale_minus_one = join_scales(shape, modules, scaled)
    generator = None if stacked.generator is None else BoundGenerator(stacked.generator, rows)
    return BoundLayer(projections, generator)


def _expansion(weights: dict[str, torch.Tensor], columns: dict[str, int], *, stack: bool) -> Expansion:
    """The expansion of these modules' b [G, R, D_out], stacked where they are alike."""
    alike = None
    if stack and len(weights) > 1 and len({weight.shape for weight in weights.values()}) == 1:
        alike = torch.stack(list(weights.values()), dim=1)
        weights = dict(zip(weights, alike.unbind(1), strict=True))
    parts, rank = [], 0
    for module, weight in weights.items():
        parts.append((rank, columns[module], weight))
        rank += weight.shape[1]
    return Expansion(tuple(parts), alike)


def first_columns(shape: BackboneShape, modules: Sequence[str]) -> dict[str, int]:
    """Module -> where its outputs begin in the fused projection of `modules`."""
    found, column = {}, 0
    for module in modules:
        found[module] = column
        column += shape.features(module)[1]
    return found


def join_scales(
    shape: BackboneShape, modules: Sequence[str], scaled: dict[str, torch.Tensor]
) -> tuple[int, torch.Tensor]:
    """(first column, [G, D]): one stretch from the first scaled module to the last, zeros (no scale) in between."""
    columns = first_columns(shape, modules)
    present = [module for module in modules if module in scaled]
    between = modules[modules.index(present[0]) : modules.index(present[-1]) + 1]
    some = scaled[present[0]]
    parts = [
        scaled[module] if module in scaled else some.new_zeros(some.shape[0], shape.features(module)[1])
        for module in between
    ]
    return columns[present[0]], parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)
