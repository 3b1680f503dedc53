"""What follows the O and the down product: low-rank expand, scale and rotation, the residual stream, and its
RMS norm."""

from __future__ import annotations

import torch
from torch.nn.functional import rms_norm

from perfbench.kernels.later import later
from perfbench.kernels.low_rank import Expansion, expand
from perfbench.kernels.rotation import Rotation, turn_columns
from perfbench.kernels.row_scale import Scale


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight in fp32 inside, over the last dimension; a weight in fp32 is not rounded to x's type."""
    if x.dtype == torch.float32 and x.device.type == "cpu":
        # torch's rms_norm is ten operations here, 35 microseconds in place of 15.
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        return (x * inverse).mul_(weight)
    if weight.dtype == x.dtype:
        return rms_norm(x, weight.shape, weight, eps)
    return rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


def eager(
    residual: torch.Tensor,
    y: torch.Tensor,
    h: torch.Tensor | None,
    expansion: Expansion | None,
    weight: torch.Tensor,
    eps: float,
    scale: Scale | None = None,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """The norm [rows, hidden] of `residual`, to which the product y [rows, hidden] (which may be overwritten) and its
    low-rank part, both scaled and rotated, are added in place; h as the form's shrink gives it."""
    onto = residual
    if scale is None and rotation is None:
        residual.add_(y)
    else:
        onto = y
    if onto is y:
        adapt(y, h, expansion, scale, rotation)
        residual.add_(y)
    elif h is not None and expansion is not None:
        expand(residual, h, expansion)
    return norm(residual, weight, eps)


def adapt(
    y: torch.Tensor, h: torch.Tensor | None, expansion: Expansion | None, scale: Scale | None, rotation: Rotation | None
) -> None:
    """What the adapters make of the product y [rows, hidden], in place: linear in y and h together."""
    if h is not None and expansion is not None:
        expand(y, h, expansion)
    turn_columns(y, scale, rotation)


FORMS = {"eager": eager, "compiled": eager, "triton": later("residual_rmsnorm_triton", "epilogue")}
