"""Attention of one new token for each row, over a cache in which a prompt is held once for all its beams."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from perfbench.kernels.later import later


def eager(
    q: torch.Tensor,
    prompt: torch.Tensor,
    generated: torch.Tensor | None,
    where: torch.Tensor | None,
    mask: torch.Tensor | None,
    filled: torch.Tensor | None = None,
) -> torch.Tensor:
    """[rows, H D] for q [rows, H, D] of rows = Q x beams.

    prompt [Q, 2, H_kv, S, D]: keys and values; generated None (one beam: all lies in `prompt`) or [steps, rows, 2,
    H_kv, D], of which where [rows, n] says at which step x rows + row each row's own lie, in order; mask None or bool
    [Q, 1, 1, S or S + n], False on what is not to be seen. `filled`, int64 [1] on the device: how many places of
    `where`, or of `prompt` without it, are there yet; this form has it from the mask, as `seen` makes it.
    """
    requests, _, kv_heads, _, dim = prompt.shape
    if generated is None or where is None:
        # The heads of a group stand in for positions: K and V need no repeating.
        grouped = q.reshape(requests, kv_heads, -1, dim)
        return scaled_dot_product_attention(grouped, prompt[:, 0], prompt[:, 1], mask).reshape(requests, -1)
    rows, length = q.shape[0], prompt.shape[3]
    beams = rows // requests
    by_row = q.reshape(rows, kv_heads, -1, dim) * dim**-0.5
    by_request = by_row.view(requests, beams, kv_heads, -1, dim).transpose(1, 2).flatten(2, 3)
    own = generated.flatten(0, 1).index_select(0, where.flatten()).unflatten(0, where.shape)
    own = own.permute(2, 0, 3, 1, 4)  # [2, rows, H_kv, n, D]
    on_prompt = by_request @ prompt[:, 0].transpose(-1, -2)  # [Q, H_kv, beams x group, S]
    on_prompt = on_prompt.unflatten(2, (beams, -1)).transpose(1, 2).flatten(0, 1)  # [rows, H_kv, group, S]
    scores = torch.cat([on_prompt, by_row @ own[0].transpose(-1, -2)], dim=-1)
    if mask is not None:
        masked = scores.unflatten(0, (requests, beams))[..., : mask.shape[-1]]
        masked.masked_fill_(~mask.unsqueeze(1), float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    shared = weights[..., :length].unflatten(0, (requests, beams)).transpose(1, 2).flatten(2, 3)
    from_prompt = (shared @ prompt[:, 1]).unflatten(2, (beams, -1)).transpose(1, 2).flatten(0, 1)
    return (from_prompt + weights[..., length:] @ own[1]).reshape(rows, -1)


def seen(padding: torch.Tensor | None, filled: torch.Tensor, length: int, places: int) -> torch.Tensor:
    """The mask, bool [Q or 1, 1, 1, length + places], of a cache whose first `length` tokens are there, but for the
    padding [Q, 1, 1, >= length], and of whose `places` after them the first `filled` [1] are."""
    there = torch.arange(places, device=filled.device).view(1, 1, 1, -1) < filled
    if padding is None:
        return torch.nn.functional.pad(there, (length, 0), value=True)
    return torch.cat([padding[..., :length], there.expand(len(padding), -1, -1, -1)], dim=-1)


def padding_alone(padding: torch.Tensor | None, filled: torch.Tensor, length: int, places: int) -> torch.Tensor | None:
    """What Triton's form takes for a mask: it reads `filled` itself."""
    return padding


FORMS = {"eager": eager, "compiled": eager, "triton": later("decode_attention_triton", "attend")}
# The mask of a step whose length the device alone knows, made once for all layers.
MASKS = {"eager": seen, "compiled": seen, "triton": padding_alone}
