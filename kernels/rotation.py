"""The rotation of pairs of a product's columns by each request's own adapter: y_i := y_i l_i + y_j sine_i, where j is
the column that i is paired with.

In each group of 2 x `half` columns those that lie `half` apart are a pair. l, the other part of the rotation, is the
scale of the column (`row_scale`); without a sine of its own a column is scaled, and with zeros it stays as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from perfbench.kernels.later import later
from perfbench.kernels.row_scale import Scale, scale_columns


class Rotation(NamedTuple):
    """The sines of some columns of a fused product.

    sine: [T, columns] from `first_column` on, whole groups of 2 x `half`; own: int64 [requests], which of the T each
    request has, -1 none; where it is None there is one for each request in order, or one for all.
    """

    sine: torch.Tensor
    half: int
    first_column: int
    own: torch.Tensor | None = None


def eager(y: torch.Tensor, scale_minus_one: torch.Tensor | None, sine: torch.Tensor, half: int) -> torch.Tensor:
    """A new [G, M, D] of y [G, M, D], s = l - 1 [G, D] (None: zeros) and sine [G, D]; G groups of rows that share an
    adapter, M rows of each."""
    out = y.clone() if scale_minus_one is None else torch.addcmul(y, y, scale_minus_one.unsqueeze(1))
    return out.addcmul_(partners(y, half), sine.unsqueeze(1))


def partners(y: torch.Tensor, half: int) -> torch.Tensor:
    """A new tensor of the size of y [..., D] that has at each column what y has at the column's partner."""
    return y.unflatten(-1, (-1, 2, half)).roll(1, -2).flatten(-3)  # of two the same as a flip, in half its time


def turn_columns(y: torch.Tensor, scale: Scale | None, rotation: Rotation | None) -> None:
    """Both on the columns of y [rows, D] that they are for, in place; plain torch takes one for each request or all."""
    if rotation is None:
        if scale is not None:
            scale_columns(y, scale)
        return
    groups, columns = rotation.sine.shape
    own = y if columns == y.shape[1] else y[:, rotation.first_column : rotation.first_column + columns]
    others = partners(own, rotation.half)
    if scale is not None:
        scale_columns(y, scale)
    if groups == len(y):
        own.addcmul_(others, rotation.sine)
    else:
        own.unflatten(0, (groups, -1)).addcmul_(others.unflatten(0, (groups, -1)), rotation.sine.unsqueeze(1))


FORMS = {"eager": eager, "compiled": eager, "triton": later("rotation_triton", "rotate")}
