"""Triton form of `residual_rmsnorm`: expand on the residual stream and its norm, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from perfbench.kernels.launch import check, parts_of, tile
from perfbench.kernels.low_rank import Expansion
from perfbench.kernels.low_rank_triton import expand_columns

# A row is held in registers as a whole.
WIDEST = 16384


@triton.jit
def _epilogue(
    residual, planes, b0, weight, out, RANK0, R0, COLUMN0, D0, R_ALL, PLANE, M, HIDDEN, EPS,
    PARTS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < HIDDEN
    stream = tl.load(residual + row * HIDDEN + columns, mask=mask, other=0.0).to(tl.float32)
    if PARTS > 0:
        group = row // M
        stream = expand_columns(
            stream, planes, b0, row, group, columns, mask, RANK0, R0, COLUMN0, D0, R_ALL, PLANE, SPLITS)
        tl.store(residual + row * HIDDEN + columns, stream.to(residual.dtype.element_ty), mask=mask)
    inverse = tl.rsqrt(tl.sum(stream * stream, axis=0) / HIDDEN + EPS)
    normed = stream * inverse * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * HIDDEN + columns, normed.to(out.dtype.element_ty), mask=mask)


def epilogue(
    residual: torch.Tensor,
    planes: torch.Tensor | None,
    expansion: Expansion | None,
    weight: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """As `residual_rmsnorm.eager`, with `planes` of `low_rank_triton.shrink` for h. ValueError on what does not fit."""
    rows, hidden = residual.shape
    check("residual", residual, (rows, hidden), residual)
    if tuple(weight.shape) != (hidden,) or hidden > WIDEST:
        expected = f"expected [{hidden}], at most {WIDEST}"
        raise ValueError(f"weight: {expected}, got {list(weight.shape)}; choose kernels eager")
    arguments, parts, splits = parts_of(planes, expansion, residual, most=1)
    out = torch.empty_like(residual)
    block = tile(hidden, WIDEST)
    _epilogue[(rows,)](
        residual, *arguments[:2], weight, out, *arguments[2:],
        rows if planes is None else rows // planes.shape[1], hidden, eps,
        PARTS=parts, SPLITS=splits, BLOCK=block, num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return out
