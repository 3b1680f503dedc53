"""What follows the fused Q, K, V product: low-rank expand, scales, RoPE, and the write of K and V into the cache."""

from __future__ import annotations

import torch

from perfbench.kernels.later import later
from perfbench.kernels.low_rank import Expansion, expand
from perfbench.kernels.row_scale import scale_columns


def eager(
    qkv: torch.Tensor,
    h: torch.Tensor | None,
    expansion: Expansion | None,
    scale_minus_one: torch.Tensor | None,
    scale_from: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    entry: torch.Tensor,
) -> torch.Tensor:
    """Returns Q, rotated: a view [rows, H, D] of qkv, which is overwritten.

    qkv [rows, (H + 2 H_kv) D]; h [G, M, R] as in `low_rank.expand`; scale_minus_one [G, columns] from column
    `scale_from` on; cos, sin [rows or 1, D], sin with its first half negated; entry [..., 2, H_kv, D]: where the cache
    takes the keys and the values. A scale does not commute with RoPE: it comes first.
    """
    if h is not None and expansion is not None:
        expand(qkv, h, expansion)
    if scale_minus_one is not None:
        scale_columns(qkv, scale_minus_one, scale_from)
    kv_heads, dim = entry.shape[-2:]
    heads = qkv.view(qkv.shape[0], -1, dim)
    turned = heads[:, :-kv_heads]
    swapped = turned.roll(dim // 2, dims=2)
    turned.mul_(cos.unsqueeze(1)).addcmul_(swapped, sin.unsqueeze(1))
    entry.copy_(heads[:, -2 * kv_heads :].view(entry.shape))
    return heads[:, : -2 * kv_heads]


FORMS = {"eager": eager, "triton": later("qkv_epilogue_triton", "epilogue")}
