"""Triton form of `residual_rmsnorm`: the product and its expand onto the residual stream, and its norm,
in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from perfbench.kernels.launch import check, check_rows, expand_arguments, tile
from perfbench.kernels.low_rank import Expansion
from perfbench.kernels.low_rank_triton import expand_columns, own_adapter
from perfbench.kernels.settings import setting

# A row is held in registers as a whole.
WIDEST = 16384


@triton.jit
def _epilogue(
    residual, y, h, own, b0, weight, out,
    RANK0, R0, COLUMN0, D0, B0, H_SPLIT, H_ROW, H_OWN, M, ROW, HIDDEN, EPS,
    PARTS: tl.constexpr, SPLITS: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < HIDDEN
    stream = tl.load(residual + row * HIDDEN + columns, mask=mask, other=0.0).to(tl.float32)
    stream += tl.load(y + row * ROW + columns, mask=mask, other=0.0).to(tl.float32)
    if PARTS > 0:
        adapter = own_adapter(own, row, M, OWN)
        ranks = h + row * H_ROW + tl.maximum(adapter, 0) * H_OWN
        stream = expand_columns(stream, ranks, b0, adapter, columns, mask, RANK0, R0, COLUMN0, D0, B0, H_SPLIT, SPLITS)
    tl.store(residual + row * HIDDEN + columns, stream.to(residual.dtype.element_ty), mask=mask)
    inverse = tl.rsqrt(tl.sum(stream * stream, axis=0) / HIDDEN + EPS)
    normed = stream * inverse * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * HIDDEN + columns, normed.to(out.dtype.element_ty), mask=mask)


def epilogue(
    residual: torch.Tensor,
    y: torch.Tensor,
    h: torch.Tensor | None,
    expansion: Expansion | None,
    weight: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """As `residual_rmsnorm.eager`, with h as `expand_arguments` takes it. ValueError on what does not fit."""
    rows, hidden = residual.shape
    check("residual", residual, (rows, hidden), residual)
    check_rows("y", y, (rows, hidden), residual)
    if tuple(weight.shape) != (hidden,) or hidden > WIDEST:
        expected = f"expected [{hidden}], at most {WIDEST}"
        raise ValueError(f"weight: {expected}, got {list(weight.shape)}; choose kernels eager")
    expanded = expand_arguments(h, expansion, residual, most=1)
    out = torch.empty_like(residual)
    chosen = setting("residual_rmsnorm", residual.device)
    block = tile(hidden, WIDEST)
    _epilogue[(rows,)](
        residual, y, *expanded.tensors, weight, out, *expanded.numbers, y.stride(0), hidden, eps,
        **expanded.constants, BLOCK=block, num_warps=min(chosen["num_warps"], max(1, block // 256)),
    )  # fmt: skip
    return out
