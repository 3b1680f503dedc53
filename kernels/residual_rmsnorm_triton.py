"""Triton form of `residual_rmsnorm`: the product, its expand, scale and rotation onto the residual stream,
and its norm, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from perfbench.kernels.early_start_triton import wait
from perfbench.kernels.launch import (
    check,
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

# A row is held in registers as a whole.
WIDEST = 16384


@triton.jit
def _epilogue(
    residual, y, h, own, modules, scale_minus_one, scale_own, sine, sine_own, weight, out,
    H_SPLIT, H_ROW, M, SCALE_STRIDE, SCALE_FROM, SCALE_COLUMNS, SCALE_M,
    SINE_STRIDE, SINE_FROM, SINE_COLUMNS, SINE_M, ROW, HIDDEN, EPS,
    SPLITS: tl.constexpr, OWN: tl.constexpr, SCALED: tl.constexpr, SCALE_OWN: tl.constexpr,
    TURNED: tl.constexpr, SINE_OWN: tl.constexpr, SINE_HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    NEXT_R: tl.constexpr, FAR_R: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program owns one row, since its norm needs all of it. It adds the product and its low-rank part, scaled and
    rotated, to the residual stream, writes that back, and writes its RMS norm. What no kernel of the step writes, the
    adapter's first ranks among it, is loaded before it waits for the product.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < HIDDEN
    scale = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if len(modules) > 0:
        adapter = own_adapter(own, row, M, OWN)
        near = near_tiles(y, modules, adapter, 0, columns, mask, BLOCK, BLOCK_R, NEXT_R)
    wait(EARLY)
    stream = tl.load(residual + row * HIDDEN + columns, mask=mask, other=0.0).to(tl.float32)
    added = tl.load(y + row * ROW + columns, mask=mask, other=0.0).to(tl.float32)
    if len(modules) > 0:
        ranks = h + row * H_ROW
        added = expand_near(
            added, near, ranks, modules, adapter, 0, columns, mask, H_SPLIT,
            SPLITS, BLOCK, BLOCK_R, NEXT_R, FAR_R, STAGES,
        )  # fmt: skip
    if SCALED:
        adapter = own_adapter(scale_own, row, SCALE_M, SCALE_OWN)
        added = scale_values(added, scale_minus_one, adapter, columns, mask, SCALE_STRIDE, SCALE_FROM, SCALE_COLUMNS)
    if TURNED:
        added = turn_row(
            added, y, h, own, modules, sine, sine_own, row, 0, columns, mask, H_SPLIT, H_ROW, M,
            SINE_STRIDE, SINE_FROM, SINE_COLUMNS, SINE_M, ROW, SPLITS, OWN, SINE_OWN, SINE_HALF, BLOCK, FAR_R,
        )  # fmt: skip
    stream += added
    tl.store(residual + row * HIDDEN + columns, stream.to(residual.dtype.element_ty), mask=mask)
    normed = stream * tl.rsqrt(tl.sum(stream * stream, axis=0) / HIDDEN + EPS) * scale
    tl.store(out + row * HIDDEN + columns, normed.to(out.dtype.element_ty), mask=mask)


def epilogue(
    residual: torch.Tensor,
    y: torch.Tensor,
    h: torch.Tensor | None,
    expansion: Expansion | None,
    weight: torch.Tensor,
    eps: float,
    scale: Scale | None = None,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """As `residual_rmsnorm.eager`, with h as `expand_arguments` takes it. ValueError on what does not fit."""
    rows, hidden = residual.shape
    check("residual", residual, (rows, hidden), residual)
    check_rows("y", y, (rows, hidden), residual)
    if tuple(weight.shape) != (hidden,) or hidden > WIDEST:
        expected = f"expected [{hidden}], at most {WIDEST}"
        raise ValueError(f"weight: {expected}, got {list(weight.shape)}; choose kernels eager")
    expanded = expand_arguments(h, expansion, residual)
    scaled, turned = scale_arguments(scale, residual), turn_arguments(rotation, residual)
    out = torch.empty_like(residual)
    block = tile(hidden, WIDEST)
    warps = min(setting("residual_rmsnorm", residual.device)["num_warps"], max(1, block // 256))
    _epilogue[(rows,)](
        residual, y, *expanded.tensors, expanded.modules, *scaled.tensors, *turned.tensors, weight, out,
        *expanded.numbers, *scaled.numbers, *turned.numbers, y.stride(0), hidden, eps,
        **expanded.constants, **scaled.constants, **turned.constants,
        BLOCK=block, **rank_tiles(expanded, block, warps), num_warps=warps, **early_start(y),
    )  # fmt: skip
    return out
