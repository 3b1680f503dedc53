"""The scale of each request's own adapter: y *= 1 + s.

Shapes: y [G, M, D] (written in place), s = l - 1 [G, D]; G groups of rows that share a scale, M rows of each.
"""

from __future__ import annotations

import torch

from perfbench.kernels.later import later


def eager(y: torch.Tensor, scale_minus_one: torch.Tensor) -> None:
    """One launch; y + y * s is formed in fp32 inside it also where y and s are 16 bits wide."""
    y.addcmul_(y, scale_minus_one.unsqueeze(1))


def scale_columns(y: torch.Tensor, scale_minus_one: torch.Tensor, first: int) -> None:
    """The same on the columns of y [G x M, D] from `first` on; scale_minus_one [G, columns]."""
    groups, columns = scale_minus_one.shape
    own = y if columns == y.shape[1] else y[:, first : first + columns]
    if groups == len(y):
        own.addcmul_(own, scale_minus_one)
    else:
        eager(own.unflatten(0, (groups, -1)), scale_minus_one)


FORMS = {"eager": eager, "triton": later("row_scale_triton", "scale_rows")}
