"""Tensor parallel, as data: what one of several ranks has of an adapter.

Of q, k, v, gate and up a rank has some of the outputs, and all inputs: its first halves of pairs are whole, its second
halves, scales and rotations those of its columns. Of o and down (ROW_PARALLEL) it has some of the inputs, and makes a
part of every output: its first halves are those of its inputs, its second halves, scales and rotations whole. What they
do to a part of a sum adds up to what they do to the sum, so that no method needs a reduction of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from perfbench.errors import AdapterError
from perfbench.methods.plan import AdapterPlan, Generator, LayerPlan, LinearOf, LowRank, SharedPair
from perfbench.methods.shape import ROW_PARALLEL, BackboneShape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Share:
    """One rank's, of so many."""

    rank: int
    ranks: int

    def of(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Its stretch of a dimension that the ranks divide, a view."""
        size = tensor.shape[dim] // self.ranks
        return tensor.narrow(dim, self.rank * size, size)

    def of_inputs(self, module: str, tensor: torch.Tensor) -> torch.Tensor:
        """Its part of `tensor` [..., D_in of module]."""
        return self.of(tensor) if module in ROW_PARALLEL else tensor

    def of_outputs(self, module: str, tensor: torch.Tensor) -> torch.Tensor:
        """Its part of `tensor` [..., D_out of module]."""
        return tensor if module in ROW_PARALLEL else self.of(tensor)

    def of_plan(self, plan: AdapterPlan, shape: BackboneShape, linear_of: LinearOf | None = None) -> AdapterPlan:
        """Its part of an adapter for a backbone of the (whole) `shape`; with a scale in the place of each magnitude, by
        the whole backbone's linears as `LayerPlan.with_scales` takes them. AdapterError where a rotation turns outputs
        of two ranks into each other."""
        parts = []
        for index, layer in enumerate(plan):
            linear = None if linear_of is None else partial(linear_of, index)
            try:
                parts.append(self._of_layer(layer.with_scales(linear), shape))
            except AdapterError as error:
                raise AdapterError(f"layer {index}: {error}") from None
        return tuple(parts)

    def _of_layer(self, layer: LayerPlan, shape: BackboneShape) -> LayerPlan:
        own_shape = shape.of_rank(self.ranks)
        for module, turned in layer.rotation.items():
            columns, group = own_shape.features(module)[1], 2 * turned.half
            if module not in ROW_PARALLEL and columns % group:
                raise AdapterError(
                    f"{module}: expected groups of rotated outputs that divide the {columns} of each of {self.ranks} "
                    f"ranks, got groups of {group}; choose a smaller group_size, or fewer ranks"
                )
        return replace(
            layer,
            low_rank={
                module: LowRank(self.of_inputs(module, pair.a), self.of_outputs(module, pair.b))
                for module, pair in layer.low_rank.items()
            },
            scale_minus_one=self._each_output(layer.scale_minus_one),
            generator=None if layer.generator is None else self._of_generator(layer.generator, shape),
            rotation={
                module: replace(turned, sine=self.of_outputs(module, turned.sine))
                for module, turned in layer.rotation.items()
            },
            input_scale_minus_one={
                module: self.of_inputs(module, scale) for module, scale in layer.input_scale_minus_one.items()
            },
            grouped={module: self._of_grouped(module, b, own_shape) for module, b in layer.grouped.items()},
            bias={module: self._of_bias(module, added) for module, added in layer.bias.items()},
            shared={module: self._of_shared(module, pair) for module, pair in layer.shared.items()},
        )

    def _each_output(self, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {module: self.of_outputs(module, tensor) for module, tensor in own.items()}

    def _of_bias(self, module: str, added: torch.Tensor) -> torch.Tensor:
        """The bias of a sum is added once, by the first rank."""
        return added * 0 if module in ROW_PARALLEL and self.rank else self.of_outputs(module, added)

    def _of_generator(self, generator: Generator, shape: BackboneShape) -> Generator:
        """Every rank has the hidden state; of the vectors each makes its own modules' columns."""
        import torch

        sizes = [shape.features(module)[1] for module in generator.modules]

        def own(tensor: torch.Tensor) -> torch.Tensor:
            parts = zip(generator.modules, tensor.split(sizes, dim=-1), strict=True)
            return torch.cat([self.of_outputs(module, part) for module, part in parts], dim=-1)

        return replace(generator, w_up=own(generator.w_up), bias_minus_one=own(generator.bias_minus_one))

    def _of_grouped(self, module: str, b: torch.Tensor, own_shape: BackboneShape) -> torch.Tensor:
        """A rank counts its inputs from 0: its group j is the one of the whole into which its first inputs fall."""
        if module not in ROW_PARALLEL:
            return self.of(b)
        return b.roll(-(self.rank * own_shape.features(module)[0] % len(b)), dims=0)

    def _of_shared(self, module: str, pair: SharedPair) -> SharedPair:
        return SharedPair(
            self.of_inputs(module, pair.a),
            self.of_outputs(module, pair.b),
            pair.of_ranks,
            self.of_outputs(module, pair.of_columns),
            cut="a" if module in ROW_PARALLEL else "b",
        )
