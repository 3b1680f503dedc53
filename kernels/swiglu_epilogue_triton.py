"""Triton form of `swiglu_epilogue`: both expands, up's scale, the activation and the product in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from perfbench.kernels.launch import check, check_scale, parts_of, tile
from perfbench.kernels.low_rank import Expansion
from perfbench.kernels.low_rank_triton import expand_columns


@triton.jit
def _epilogue(
    gate_up, planes, b0, b1, scale_minus_one, out,
    RANK0, R0, COLUMN0, D0, RANK1, R1, COLUMN1, D1, R_ALL, PLANE,
    M, SCALE_M, SCALE_FROM, SCALED, INNER,
    PARTS: tl.constexpr, SPLITS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = row // M
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < INNER
    others = columns + INNER
    gate = tl.load(gate_up + row * 2 * INNER + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * INNER + others, mask=mask, other=0.0).to(tl.float32)
    if PARTS > 0:
        gate = expand_columns(gate, planes, b0, row, group, columns, mask, RANK0, R0, COLUMN0, D0, R_ALL, PLANE, SPLITS)
        up = expand_columns(up, planes, b0, row, group, others, mask, RANK0, R0, COLUMN0, D0, R_ALL, PLANE, SPLITS)
    if PARTS > 1:
        gate = expand_columns(gate, planes, b1, row, group, columns, mask, RANK1, R1, COLUMN1, D1, R_ALL, PLANE, SPLITS)
        up = expand_columns(up, planes, b1, row, group, others, mask, RANK1, R1, COLUMN1, D1, R_ALL, PLANE, SPLITS)
    scale = scale_minus_one + (row // SCALE_M) * SCALED - SCALE_FROM
    there = mask & (columns >= SCALE_FROM) & (columns < SCALE_FROM + SCALED)
    gate += gate * tl.load(scale + columns, mask=there, other=0.0).to(tl.float32)
    there = mask & (others >= SCALE_FROM) & (others < SCALE_FROM + SCALED)
    up += up * tl.load(scale + others, mask=there, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        gate = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:  # tanh(v) = 2 sigmoid(2 v) - 1
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = gate * tl.sigmoid(2.0 * inner)
    tl.store(out + row * INNER + columns, (gate * up).to(out.dtype.element_ty), mask=mask)


def epilogue(
    gate_up: torch.Tensor,
    planes: torch.Tensor | None,
    expansion: Expansion | None,
    scale_minus_one: torch.Tensor | None,
    scale_from: int,
    activation: str,
) -> torch.Tensor:
    """As `swiglu_epilogue.eager`, with `planes` of `low_rank_triton.shrink` for h. ValueError on what does not fit."""
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    check("gate_up", gate_up, (rows, 2 * inner), gate_up)
    scale, scale_rows = check_scale(scale_minus_one, scale_from, gate_up)
    arguments, parts, splits = parts_of(planes, expansion, gate_up, most=2)
    out = torch.empty(rows, inner, dtype=gate_up.dtype, device=gate_up.device)
    block = tile(inner, 1024)
    _epilogue[(rows, triton.cdiv(inner, block))](
        gate_up, *arguments[:3], scale, out, *arguments[3:],
        rows if planes is None else rows // planes.shape[1], scale_rows, scale_from,
        0 if scale_minus_one is None else scale.shape[1], inner,
        PARTS=parts, SPLITS=splits, ACTIVATION=activation, BLOCK=block,
    )  # fmt: skip
    return out
