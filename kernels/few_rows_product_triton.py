"""Triton form of `few_rows_product`: a program reads whole rows of W, so that no second launch has to add up parts.

On an H200 the library's product takes 1.3 to 2 us more for LLaMA-2 7B's QKV and down products as soon as they have a
tail, of whatever size, and splits o and down over a second launch; this one takes no more with a tail than without
(`results/h200/facts/products.jsonl`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear

from perfbench.kernels.early_start_triton import let_next_start
from perfbench.kernels.launch import INTERPRETED, MOST_ROWS, check, check_rows, of_few_rows, starts_early


@triton.jit
def _product(
    x, weight, bias, y, ROWS, D_OUT, D_IN, X_ROW,
    HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N columns of y for all rows. It walks D_in in blocks of BLOCK_K, of which several are on
    their way at a time: W's tile [BLOCK_N, BLOCK_K] is the left factor, being the one that is long, x's tile
    [BLOCK_K, BLOCK_M] the right one. The sums are fp32, in one order. The epilogue behind it may start as soon as the
    last of its programs has."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    let_next_start(EARLY)
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, D_IN, BLOCK_K):
        features = start + tl.arange(0, BLOCK_K)
        there, has = (columns < D_OUT)[:, None], (rows < ROWS)[None, :]
        if not WHOLE:  # the last block reaches past the end
            there, has = there & (features < D_IN)[None, :], has & (features < D_IN)[:, None]
        left = tl.load(weight + columns[:, None].to(tl.int64) * D_IN + features[None, :], mask=there, other=0.0)
        right = tl.load(x + rows[None, :] * X_ROW + features[:, None], mask=has, other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias + columns, mask=columns < D_OUT, other=0.0).to(tl.float32)[:, None]
    place = y + rows[None, :] * D_OUT + columns[:, None]
    tl.store(place, sums.to(y.dtype.element_ty), mask=(columns < D_OUT)[:, None] & (rows < ROWS)[None, :])


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `few_rows_product.eager`; the library's product where `of_few_rows` says so. ValueError on inputs that do not
    fit."""
    rows, d_in = x.shape
    chosen = of_few_rows(x)
    if chosen is None:
        return linear(x, weight, bias)
    d_out = weight.shape[0]
    check_rows("x", x, (rows, d_in), x)
    check("weight", weight, (d_out, d_in), x)
    if bias is not None:
        check("bias", bias, (d_out,), x)
    y = torch.empty(rows, d_out, dtype=x.dtype, device=x.device)
    _product[(triton.cdiv(d_out, chosen["BLOCK_N"]),)](
        x, weight, x if bias is None else bias, y, rows, d_out, d_in, x.stride(0),
        HAS_BIAS=bias is not None, WHOLE=d_in % chosen["BLOCK_K"] == 0, BLOCK_M=MOST_ROWS,
        BLOCK_N=chosen["BLOCK_N"], BLOCK_K=chosen["BLOCK_K"], UPCAST=INTERPRETED,
        num_warps=chosen["num_warps"], num_stages=chosen["num_stages"], EARLY=starts_early(x),
    )  # fmt: skip
    return y
