"""Triton form of `swiglu_epilogue`: both expands, scales, rotations, the activation and the product in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from perfbench.kernels.early_start_triton import wait
from perfbench.kernels.launch import (
    check_rows,
    early_start,
    expand_arguments,
    rank_tiles,
    scale_arguments,
    tile,
    turn_arguments,
)
from perfbench.kernels.low_rank import Expansion
from perfbench.kernels.low_rank_triton import expand_near, near_tiles, own_adapter
from perfbench.kernels.rotation import Rotation
from perfbench.kernels.rotation_triton import turn_row
from perfbench.kernels.row_scale import Scale
from perfbench.kernels.row_scale_triton import scale_values
from perfbench.kernels.settings import setting


@triton.jit
def _epilogue(
    gate_up, h, own, modules, scale_minus_one, scale_own, sine, sine_own, out,
    H_SPLIT, H_ROW, M, SCALE_STRIDE, SCALE_FROM, SCALE_COLUMNS, SCALE_M,
    SINE_STRIDE, SINE_FROM, SINE_COLUMNS, SINE_M, ROW, INNER,
    SPLITS: tl.constexpr, OWN: tl.constexpr, SCALED: tl.constexpr, SCALE_OWN: tl.constexpr,
    TURNED: tl.constexpr, SINE_OWN: tl.constexpr, SINE_HALF: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, NEXT_R: tl.constexpr, FAR_R: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK inner features of one row. It loads their gate and their up, which lie INNER columns apart
    in the product, adds the low-rank part of each, scales and rotates, and writes activation(gate) * up. The adapter's
    first ranks are loaded before it waits for the product."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCK
    columns = begin + tl.arange(0, BLOCK)
    mask = columns < INNER
    others = columns + INNER
    if len(modules) > 0:
        adapter = own_adapter(own, row, M, OWN)
        near_gate = near_tiles(gate_up, modules, adapter, begin, columns, mask, BLOCK, BLOCK_R, NEXT_R)
        near_up = near_tiles(gate_up, modules, adapter, begin + INNER, others, mask, BLOCK, BLOCK_R, NEXT_R)
    wait(EARLY)
    gate = tl.load(gate_up + row * ROW + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * ROW + others, mask=mask, other=0.0).to(tl.float32)
    if len(modules) > 0:
        ranks = h + row * H_ROW
        gate = expand_near(
            gate, near_gate, ranks, modules, adapter, begin, columns, mask, H_SPLIT,
            SPLITS, BLOCK, BLOCK_R, NEXT_R, FAR_R, STAGES,
        )  # fmt: skip
        up = expand_near(
            up, near_up, ranks, modules, adapter, begin + INNER, others, mask, H_SPLIT,
            SPLITS, BLOCK, BLOCK_R, NEXT_R, FAR_R, STAGES,
        )  # fmt: skip
    if SCALED:
        adapter = own_adapter(scale_own, row, SCALE_M, SCALE_OWN)
        gate = scale_values(gate, scale_minus_one, adapter, columns, mask, SCALE_STRIDE, SCALE_FROM, SCALE_COLUMNS)
        up = scale_values(up, scale_minus_one, adapter, others, mask, SCALE_STRIDE, SCALE_FROM, SCALE_COLUMNS)
    if TURNED:
        gate = turn_row(
            gate, gate_up, h, own, modules, sine, sine_own, row, begin, columns, mask, H_SPLIT, H_ROW, M,
            SINE_STRIDE, SINE_FROM, SINE_COLUMNS, SINE_M, ROW, SPLITS, OWN, SINE_OWN, SINE_HALF, BLOCK, FAR_R,
        )  # fmt: skip
        up = turn_row(
            up, gate_up, h, own, modules, sine, sine_own, row, begin + INNER, others, mask, H_SPLIT, H_ROW, M,
            SINE_STRIDE, SINE_FROM, SINE_COLUMNS, SINE_M, ROW, SPLITS, OWN, SINE_OWN, SINE_HALF, BLOCK, FAR_R,
        )  # fmt: skip
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
    h: torch.Tensor | None,
    expansion: Expansion | None,
    scale: Scale | None,
    activation: str,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """As `swiglu_epilogue.eager`, with h as `expand_arguments` takes it. ValueError on what does not fit."""
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    check_rows("gate_up", gate_up, (rows, 2 * inner), gate_up)
    expanded, scaled = expand_arguments(h, expansion, gate_up), scale_arguments(scale, gate_up)
    turned = turn_arguments(rotation, gate_up)
    out = torch.empty(rows, inner, dtype=gate_up.dtype, device=gate_up.device)
    chosen = setting("swiglu_epilogue", gate_up.device)
    # What is turned and expanded is held twice: of half the columns nothing spills.
    block = tile(inner, chosen["BLOCK"] // (2 if rotation is not None and expanded.modules else 1))
    _epilogue[(rows, triton.cdiv(inner, block))](
        gate_up, *expanded.tensors, expanded.modules, *scaled.tensors, *turned.tensors, out,
        *expanded.numbers, *scaled.numbers, *turned.numbers, gate_up.stride(0), inner,
        **expanded.constants, **scaled.constants, **turned.constants, ACTIVATION=activation, BLOCK=block,
        **rank_tiles(expanded, block, chosen["num_warps"], 2), num_warps=chosen["num_warps"],
        **early_start(gate_up),
    )  # fmt: skip
    return out
