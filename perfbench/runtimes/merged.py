"""Adapters multiplied into the weights: no work is left for a decode step, and one tenant is served at a time.

The upper bound of speed that an unmerged adapter is held against. Each arm has a copy of the linears of its own, and
makes it anew from the backbone's when another tenant's turn comes: what is added is never taken off again, which would
leave its rounding behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from perfbench.errors import AdapterError
from perfbench.kernels import grouped_sum
from perfbench.kernels.rotation import partners
from perfbench.methods.plan import AdapterPlan, LayerPlan
from perfbench.methods.shape import MODULE_PATHS, SHARED_INPUT
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.generation import Batch, Generation
from perfbench.runtimes.packed_linear import overwrite
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.transformers_plan import PlanArm


def merged(
    weight: torch.Tensor, bias: torch.Tensor | None, plan: LayerPlan, module: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """fp32 weight [D_out, D_in] and bias [D_out] of a linear that gives what `plan` makes of its output, of its own
    weight and bias in fp32. AdapterError where scales hang on the prompt, and on a bias for a linear without one."""
    if plan.generator is not None:
        raise AdapterError("scales that are made from the prompt can't be merged into weights")
    found = weight
    if (scale := plan.input_scale_minus_one.get(module)) is not None:
        found = found + found * scale
    if (pair := plan.low_rank.get(module)) is not None:
        found = found + pair.b.T @ pair.a
    if (b := plan.grouped.get(module)) is not None:
        found = found + b.T @ grouped_sum.matrix(len(b), weight)
    if (shared := plan.shared.get(module)) is not None:
        found = found + (shared.of_columns[:, None] * shared.b.T) @ (shared.of_ranks[:, None] * shared.a)
    if (length := plan.magnitude.get(module)) is not None:
        found = found * (length / found.norm(dim=1))[:, None]
    if (added := plan.bias.get(module)) is not None:
        if bias is None:
            raise AdapterError(f"{module}: a bias can't be merged into a linear that has none")
        bias = bias + added
    rows = found if bias is None else torch.cat([found, bias[:, None]], dim=1)
    turned = rows
    if (scale := plan.scale_minus_one.get(module)) is not None:
        turned = rows + rows * scale[:, None]
    if (rotation := plan.rotation.get(module)) is not None:
        turned = turned + partners(rows.T, rotation.half).T * rotation.sine[:, None]
    return (turned, None) if bias is None else (turned[:, :-1], turned[:, -1])


class Merging:
    """What makes an arm without adapters one of a single merged tenant at a time; `adapters`: of the slots, in order.

    To be mixed into an arm of a runtime. ValueError where the requests of a batch are not all of one tenant.
    """

    def __init__(self, backbone: Backbone, adapters: Sequence[AdapterPlan], kernels: str):
        self._base = backbone
        self._plans = [
            tuple(layer.map(self._kept, lambda t: t.to(backbone.device)) for layer in plan) for plan in adapters
        ]
        self._own = _with_own_linears(backbone)
        self._slot = -1
        super().__init__(self._own, None, kernels)  # type: ignore[call-arg]

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._base.device, self._base.dtype)

    def generate(self, batch: Batch, **observers: Any) -> Generation:
        """As the runtime's own arm, after a switch where the batch is of another tenant than the last one."""
        if len(slots := set(batch.slots)) != 1:
            raise ValueError(f"merged weights serve one tenant at a time, got slots {sorted(slots)}")
        if (slot := batch.slots[0]) != self._slot:
            self.switch(slot)
        bare = replace(batch, slots=(-1,) * len(batch.slots))
        generation: Generation = super().generate(bare, **observers)  # type: ignore[misc]
        return generation

    def switch(self, slot: int) -> None:
        """Makes the weights those of the tenant in `slot`, -1 of none."""
        with torch.no_grad():
            for index, layer in enumerate(self._own.model.model.layers):
                plan = LayerPlan() if slot == -1 else self._plans[slot][index].map(torch.Tensor.float, _wide)
                for modules in SHARED_INPUT.values():
                    linears, weights = [], []
                    for module in modules:
                        base = self._base.model.model.layers[index].get_submodule(MODULE_PATHS[module])
                        bias = None if base.bias is None else base.bias.float()
                        weight, bias = merged(base.weight.float(), bias, plan, module)
                        linears.append(own := layer.get_submodule(MODULE_PATHS[module]))
                        weights.append(weight)
                        if bias is not None:
                            own.bias.copy_(bias)
                    overwrite(linears, weights)
        self._slot = slot

    def adapter_tensors(self) -> list[torch.Tensor]:
        """The residents' adapters, unmerged: what a switch reads."""
        return [tensor for plan in self._plans for layer in plan for tensor in layer.tensors()]

    def tensors(self) -> list[torch.Tensor]:
        """The adapters, and the backbone's own linears beside the merged ones."""
        layers = self._base.model.model.layers
        linears = [layer.get_submodule(path) for layer in layers for path in MODULE_PATHS.values()]
        held: list[torch.Tensor] = super().tensors()  # type: ignore[misc]
        own = {id(p): p for linear in linears for p in linear.parameters()}  # modules may share a packed one
        return [*held, *self.adapter_tensors(), *own.values()]

    def close(self) -> None:
        """Drops the merged weights and the adapters."""
        super().close()  # type: ignore[misc]
        self._plans = []
        self._base = self._own = None  # type: ignore[assignment]


class MergedPlanArm(Merging, PlanArm):
    """On the Hugging Face model."""


class MergedStaticArm(Merging, StaticArm):
    """On runtime static."""


# Runtime -> what serves merged adapters on it.
MERGED_ARMS: dict[str, type[MergedPlanArm] | type[MergedStaticArm]] = {
    "transformers": MergedPlanArm,
    "static": MergedStaticArm,
}


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float()


def _with_own_linears(backbone: Backbone) -> Backbone:
    """The same backbone with a copy of every linear of its layers; embedding, head and norms stay shared."""
    model = backbone.skeleton()
    for layer in model.model.layers:
        for path in MODULE_PATHS.values():
            base = layer.get_submodule(path)
            own = torch.nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
            for name, parameter in base.named_parameters():
                setattr(own, name, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))
            layer.set_submodule(path, own)
    return Backbone(backbone.name, backbone.shape, model, backbone.dtype, backbone.device)
