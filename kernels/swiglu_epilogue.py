"""What follows the fused gate and up product: low-rank expands, scales, rotations, activation(gate) * up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import gelu, silu

from perfbench.kernels.later import later
from perfbench.kernels.low_rank import Expansion, expand
from perfbench.kernels.rotation import Rotation, turn_columns
from perfbench.kernels.row_scale import Scale

# `hidden_act` of a config -> what it is.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_pytorch_tanh": partial(gelu, approximate="tanh"),
}


def eager(
    gate_up: torch.Tensor,
    h: torch.Tensor | None,
    expansion: Expansion | None,
    scale: Scale | None,
    activation: str,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """[rows, I] from gate_up [rows, 2 I], which is overwritten; the rest as in `qkv_epilogue`."""
    if h is not None and expansion is not None:
        expand(gate_up, h, expansion)
    turn_columns(gate_up, scale, rotation)
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate).mul_(up)


FORMS = {"eager": eager, "compiled": eager, "triton": later("swiglu_epilogue_triton", "epilogue")}
