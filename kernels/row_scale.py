"""The scale of each request's own adapter: y *= 1 + s.

Shapes: y [G, M, D] (written in place), s = l - 1 [G, D]; G groups of rows that share a scale, M rows of each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from perfbench.kernels.later import later


class Scale(NamedTuple):
    """The scales on some columns of a fused product.

    minus_one: [T, columns] from `first_column` on; own: int64 [requests], which of the T each request has, -1 none;
    where it is None there is one for each request in order, or one for all.
    """

    minus_one: torch.Tensor
    first_column: int
    own: torch.Tensor | None = None


def eager(y: torch.Tensor, scale_minus_one: torch.Tensor) -> None:
    """One launch; y + y * s is formed in fp32 inside it also where y and s are 16 bits wide."""
    y.addcmul_(y, scale_minus_one.unsqueeze(1))


def one_after_the_other(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """l - 1 of two scales on the same output, (1 + one)(1 + other) - 1; exact where either is 0."""
    return torch.addcmul(one + other, one, other)


def scaled(y: torch.Tensor, scale_minus_one: torch.Tensor) -> torch.Tensor:
    """The same as a new tensor, so that it can be differentiated."""
    return torch.addcmul(y, y, scale_minus_one.unsqueeze(1))


def scaled_rows(x: torch.Tensor, scale_minus_one: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
    """A new [rows, D] of x [rows, D], times 1 + s [G, D] of each row's adapter; `own` as in `Scale`."""
    assert own is None, "plain torch takes one adapter for each request in order, or one for all"
    return scaled(x.unflatten(0, (len(scale_minus_one), -1)), scale_minus_one).flatten(0, 1)


def scale_columns(y: torch.Tensor, scale: Scale) -> None:
    """The same on the columns of y [rows, D] that the scale is for; plain torch takes one for each request or all."""
    groups, columns = scale.minus_one.shape
    own = y if columns == y.shape[1] else y[:, scale.first_column : scale.first_column + columns]
    if groups == len(y):
        own.addcmul_(own, scale.minus_one)
    else:
        eager(own.unflatten(0, (groups, -1)), scale.minus_one)


FORMS = {"eager": eager, "compiled": eager, "triton": later("row_scale_triton", "scale_rows")}
SCALED_ROWS = {"eager": scaled_rows, "compiled": scaled_rows, "triton": later("row_scale_triton", "scaled_rows")}
