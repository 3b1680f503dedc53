"""One rank of several that serve a backbone together: its part, as a backbone of its own that runtime static serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from perfbench.errors import BackboneError
from perfbench.methods.bank import Bank
from perfbench.methods.plan import AdapterPlan
from perfbench.methods.shape import MODULE_PATHS, ROW_PARALLEL
from perfbench.methods.share import Share
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.static.arm import StaticArm


class Rank:
    """`share` of the `whole` backbone. reduce: makes of a tensor, in place, the sum over all ranks. BackboneError where
    the ranks do not divide the backbone."""

    def __init__(self, whole: Backbone, share: Share, reduce: Callable[[torch.Tensor], None]):
        self.whole, self.share = whole, share
        self.part = _part_of(whole, share, reduce)

    def of_plan(self, plan: AdapterPlan) -> AdapterPlan:
        """This rank's part of an adapter. AdapterError where it can't be dealt out."""
        return self.share.of_plan(plan, self.whole.shape, self.whole.linear)

    def of_sizes(self, plan: AdapterPlan) -> AdapterPlan:
        """The same of one that has no numbers."""
        return self.share.of_plan(plan, self.whole.shape)

    def arm(self, bank: Bank | None, kernels: str) -> StaticArm:
        """An arm over this rank's part; the other ranks' have to generate whenever it does."""
        return StaticArm(self.part, bank, kernels)


def _part_of(whole: Backbone, share: Share, reduce: Callable[[torch.Tensor], None]) -> Backbone:
    """Copies of its heads and columns; the embedding, the norms and the head are the same tensors."""
    try:
        shape = whole.shape.of_rank(share.ranks)
    except ValueError as error:
        raise BackboneError(f"{whole.name}: {error}") from None
    model = whole.skeleton()
    for layer in model.model.layers:
        for module, path in MODULE_PATHS.items():
            layer.set_submodule(path, _part_of_linear(layer.get_submodule(path), module, share))
    return Backbone(whole.name, shape, model, whole.dtype, whole.device, reduce=reduce)


def _part_of_linear(linear: Any, module: str, share: Share) -> torch.nn.Linear:
    rows = module in ROW_PARALLEL
    weight = share.of(linear.weight.detach(), dim=1 if rows else 0).clone()
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = torch.nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        # The bias of a sum is added once, by the first rank.
        bias = linear.bias.detach() if rows else share.of(linear.bias.detach())
        bias = torch.zeros_like(bias) if rows and share.rank else bias.clone()
        made.bias = torch.nn.Parameter(bias, requires_grad=False)
    return made
