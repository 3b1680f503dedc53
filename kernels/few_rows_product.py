"""x W^T of the few rows of a decode step: what it takes is the time in which W is read once."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from perfbench.kernels.later import later


def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [rows, D_in], weight [D_out, D_in], bias [D_out] or None -> [rows, D_out]."""
    return linear(x, weight, bias)


FORMS = {"eager": eager, "compiled": eager, "triton": later("few_rows_product_triton", "product")}
