"""What follows the fused Q, K, V product: low-rank expand, scales, rotations, RoPE, and K and V into the cache."""

from __future__ import annotations

from typing import NamedTuple

import torch

from perfbench.kernels.later import later
from perfbench.kernels.low_rank import Expansion, expand
from perfbench.kernels.rotation import Rotation, turn_columns
from perfbench.kernels.row_scale import Scale


class Places(NamedTuple):
    """Where the compiled form puts keys and values: at `first` and what follows it of the dimension `steps` of `cache`,
    whose others are [rows, 2, H_kv, D]. All of it, since what is written to a view Inductor writes to a copy first."""

    cache: torch.Tensor
    steps: int
    first: int


def eager(
    qkv: torch.Tensor,
    h: torch.Tensor | None,
    expansion: Expansion | None,
    scale: Scale | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    entry: torch.Tensor,
    at: torch.Tensor | None = None,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """Returns Q, rotated: [rows, H, D], which may be a view of qkv, which is overwritten.

    qkv [rows, (H + 2 H_kv) D]; h as the form's shrink gives it; cos, sin [rows or 1, D], sin with its first half
    negated; entry [..., 2, H_kv, D]: where the cache takes the keys and the values. With `at`, int64 [1] on the device,
    entry has a leading dimension of steps, of which that one is written. Neither a scale nor an adapter's
    rotation commutes with RoPE: they come first.
    """
    if h is not None and expansion is not None:
        expand(qkv, h, expansion)
    turn_columns(qkv, scale, rotation)
    kv_heads, dim = entry.shape[-2:]
    heads = qkv.view(qkv.shape[0], -1, dim)
    turned = heads[:, :-kv_heads]
    swapped = turned.roll(dim // 2, dims=2)
    turned.mul_(cos.unsqueeze(1)).addcmul_(swapped, sin.unsqueeze(1))
    made = heads[:, -2 * kv_heads :]
    if at is None:
        entry.copy_(made.view(entry.shape))
    else:
        entry.index_copy_(0, at, made.view(1, *entry.shape[1:]))
    return heads[:, : -2 * kv_heads]


def compiled(
    qkv: torch.Tensor,
    h: torch.Tensor | None,
    expansion: Expansion | None,
    scale: Scale | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    entry: torch.Tensor | Places,
    at: torch.Tensor | None = None,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """As `eager`, in the words from which Inductor makes one loop; with `at`, entry is `Places`."""
    if at is None or not isinstance(entry, Places):
        assert isinstance(entry, torch.Tensor)
        return eager(qkv, h, expansion, scale, cos, sin, entry, at, rotation)
    if h is not None and expansion is not None:
        expand(qkv, h, expansion)
    turn_columns(qkv, scale, rotation)
    rows, _, kv_heads, dim = entry.cache.select(entry.steps, 0).shape
    heads = qkv.view(qkv.shape[0], -1, dim)
    turned = heads[:, :-kv_heads]
    swapped = torch.cat([turned[..., dim // 2 :], turned[..., : dim // 2]], dim=2)
    turned = turned * cos.unsqueeze(1) + swapped * sin.unsqueeze(1)
    made = torch.stack([turned[:, -kv_heads:], heads[:, -kv_heads:]], dim=1)
    entry.cache.index_copy_(entry.steps, at + entry.first, made.view(rows, 2, kv_heads, dim).unsqueeze(entry.steps))
    return turned[:, :-kv_heads]


FORMS = {"eager": eager, "compiled": compiled, "triton": later("qkv_epilogue_triton", "epilogue")}
