"""PARA's vector generator (eq. 6) for the prompts of several tenants: l - 1 = GELU(h w_down) w_up + (bias - 1).

Shapes: h [Q, hidden], w_down [G, hidden, R], w_up [G, R, D], bias_minus_one [G, D]; Q requests in G groups that
share an adapter. Result: [Q, D]. The GELU is the exact one (erf). Runs once for each prompt, in prefill.
"""

from __future__ import annotations

import torch
from torch.nn.functional import gelu

from perfbench.kernels.later import later


def eager(
    h: torch.Tensor,
    w_down: torch.Tensor,
    w_up: torch.Tensor,
    bias_minus_one: torch.Tensor,
    own: torch.Tensor | None = None,
) -> torch.Tensor:
    """Two batched products, the second of them with the bias; `own` as in `low_rank.shrink`."""
    assert own is None, "plain torch takes one adapter for each request in order, or one for all"
    grouped = h.view(w_down.shape[0], -1, h.shape[-1])
    bottleneck = gelu(torch.bmm(grouped, w_down))
    return torch.baddbmm(bias_minus_one.unsqueeze(1), bottleneck, w_up).view(h.shape[0], -1)


FORMS = {"eager": eager, "compiled": eager, "triton": later("vector_generator_triton", "generate")}
