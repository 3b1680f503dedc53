"""One rank's part of a backbone, as a backbone of its own that runtime static serves like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from perfbench.errors import BackboneError
from perfbench.methods.shape import MODULE_PATHS, ROW_PARALLEL
from perfbench.methods.share import Share
from perfbench.runtimes.backbone import Backbone


def part_of(backbone: Backbone, share: Share, reduce: Callable[[torch.Tensor], None]) -> Backbone:
    """What `share` has of a whole backbone: copies of its heads and columns; the embedding, the norms and the head are
    the same tensors. reduce: makes of a tensor, in place, the sum over all ranks. BackboneError where the ranks do not
    divide it."""
    try:
        shape = backbone.shape.of_rank(share.ranks)
    except ValueError as error:
        raise BackboneError(f"{backbone.name}: {error}") from None
    model = backbone.skeleton()
    for layer in model.model.layers:
        for module, path in MODULE_PATHS.items():
            layer.set_submodule(path, _part_of_linear(layer.get_submodule(path), module, share))
    return Backbone(backbone.name, shape, model, backbone.dtype, backbone.device, reduce=reduce)


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
