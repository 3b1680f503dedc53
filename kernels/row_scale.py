"""The scale of each request's own adapter: y *= 1 + s.

Shapes: y [G, M, D] (written in place), s = l - 1 [G, D]; G groups of rows that share a scale, M rows of each.
"""

from __future__ import annotations

import torch


def eager(y: torch.Tensor, scale_minus_one: torch.Tensor) -> None:
    """One launch; y + y * s is formed in fp32 inside it also where y and s are 16 bits wide."""
    y.addcmul_(y, scale_minus_one.unsqueeze(1))


FORMS = {"eager": eager}
