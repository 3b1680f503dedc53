"""What every kernel should give: its definition in fp64, in loops over rows, heads and tokens, on the CPU.

No kernel may import this: nothing is its own judge. Speed is of no concern here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

# The modules of a fused product: (first rank, first column, b [T, R, D_out]).
Parts = Sequence[tuple[int, int, torch.Tensor]]


def low_rank(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, own: Sequence[int]) -> torch.Tensor:
    """y [rows, D_out] + (x [rows, D_in] a^T) b with the pair that own [rows] says, -1 none; a [T, R, D_in]."""
    out = y.double().clone()
    for row, adapter in enumerate(own):
        if adapter >= 0:
            out[row] += shrink(x[row : row + 1], a, [adapter])[0] @ b[adapter].double()
    return out


def shrink(x: torch.Tensor, a: torch.Tensor, own: Sequence[int]) -> torch.Tensor:
    """[rows, R] of x [rows, D_in]: the ranks of each row with its own adapter, zeros without one."""
    out = torch.zeros(len(x), a.shape[1], dtype=torch.float64)
    for row, adapter in enumerate(own):
        if adapter >= 0:
            out[row] = a[adapter].double() @ x[row].double()
    return out


def grouped_sum(x: torch.Tensor, rank: int) -> torch.Tensor:
    """[rows, R] of x [rows, D_in]: the sum of every R-th value from the first, from the second, and so on."""
    out = torch.zeros(len(x), rank, dtype=torch.float64)
    for feature, column in enumerate(x.double().T):
        out[:, feature % rank] += column
    return out


def row_scale(y: torch.Tensor, minus_one: torch.Tensor, own: Sequence[int]) -> torch.Tensor:
    """y [rows, D] times 1 + the scale that own [rows] says; minus_one [T, D]."""
    return adapted(y, y.new_zeros(len(y), 0), (), (minus_one, 0), own)


def adapted(
    y: torch.Tensor,
    ranks: torch.Tensor,
    parts: Parts,
    scale: tuple[torch.Tensor, int] | None,
    own: Sequence[int],
    rotation: tuple[torch.Tensor, int, int] | None = None,
    bias: tuple[torch.Tensor, int] | None = None,
) -> torch.Tensor:
    """y [rows, D] with low-rank parts and bias, and then scale and rotation, of each row's own adapter, -1 none.

    ranks [rows, R]: what each row gives with its own adapter; scale: l - 1 [T, columns] and its first column, as of the
    bias; rotation:
    sine [T, columns], half of a group of them, the first column.
    """
    out = y.double().clone()
    for row, adapter in enumerate(own):
        if adapter < 0:
            continue
        for rank, column, b in parts:
            mine = ranks[row, rank : rank + b.shape[1]].double()
            out[row, column : column + b.shape[2]] += mine @ b[adapter].double()
        if bias is not None:
            added, first = bias
            out[row, first : first + added.shape[1]] += added[adapter].double()
        unturned = out[row].clone()
        if scale is not None:
            minus_one, first = scale
            out[row, first : first + minus_one.shape[1]] *= 1 + minus_one[adapter].double()
        if rotation is not None:
            sine, half, first = rotation
            for i, turned in enumerate(sine[adapter].tolist()):
                other = i + half if i % (2 * half) < half else i - half
                out[row, first + i] += unturned[first + other] * turned
    return out


def between_vectors(
    y: torch.Tensor,
    ranks: torch.Tensor,
    b: torch.Tensor,
    of_ranks: torch.Tensor,
    of_columns: torch.Tensor,
    own: Sequence[int],
) -> torch.Tensor:
    """y [rows, D] + ((ranks * of_ranks) b) * of_columns with the vectors [T, R], [T, D] of each row's own adapter."""
    out = y.double().clone()
    for row, adapter in enumerate(own):
        if adapter >= 0:
            inner = ranks[row].double() * of_ranks[adapter].double()
            out[row] += (inner @ b.double()) * of_columns[adapter].double()
    return out


def rotated(head: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """RoPE of one head [D]: each pair (i, i + D / 2) turned by its angle, of angles [D / 2]."""
    half = len(head) // 2
    out = torch.empty_like(head)
    for i in range(half):
        cos, sin = math.cos(float(angles[i])), math.sin(float(angles[i]))
        out[i] = head[i] * cos - head[i + half] * sin
        out[i + half] = head[i + half] * cos + head[i] * sin
    return out


def rope(qkv: torch.Tensor, angles: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """fp64 qkv [rows, (H + 2 H_kv) D] with Q and K turned by angles [rows, D / 2], V as it is."""
    dim = 2 * angles.shape[1]
    heads = qkv.view(len(qkv), -1, dim)
    out = heads.clone()
    for row in range(len(qkv)):
        for head in range(heads.shape[1] - kv_heads):
            out[row, head] = rotated(heads[row, head], angles[row])
    return out.flatten(1)


def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


# As `hidden_act` names them.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": _gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
}


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """[rows, I] of fp64 gate_up [rows, 2 I]: activation(gate) * up."""
    gate, up = gate_up.chunk(2, dim=1)
    return ACTIVATIONS[activation](gate) * up


def rms_norm(stream: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """fp64 stream [rows, hidden] over the root of its mean square, times weight [hidden]."""
    rows = [row / math.sqrt(float((row * row).mean()) + eps) * weight.double() for row in stream]
    return torch.stack(rows)


def vectors(
    h: torch.Tensor, w_down: torch.Tensor, w_up: torch.Tensor, bias: torch.Tensor, own: Sequence[int]
) -> torch.Tensor:
    """PARA's [prompts, D] of h [prompts, hidden]: GELU(h w_down) w_up + bias of each prompt's own adapter, else 0."""
    out = torch.zeros(len(h), bias.shape[1], dtype=torch.float64)
    for prompt, adapter in enumerate(own):
        if adapter >= 0:
            inner = _gelu(h[prompt].double() @ w_down[adapter].double())
            out[prompt] = inner @ w_up[adapter].double() + bias[adapter].double()
    return out


def attention(
    q: torch.Tensor,
    prompt: torch.Tensor,
    generated: torch.Tensor | None,
    ancestors: torch.Tensor | None,
    pads: Sequence[int],
    seen: int,
) -> torch.Tensor:
    """[rows, H D] of q [rows, H, D], row by row and head by head.

    prompt [Q, 2, H_kv, S, D], of which each request sees the first `seen` tokens but for the first pads[request];
    generated [steps, rows, 2, H_kv, D], of which row r sees row ancestors[r, n] of step n, for all n there are.
    """
    rows, heads, dim = q.shape
    beams, group = rows // len(prompt), heads // prompt.shape[2]
    out = torch.empty(rows, heads, dim, dtype=torch.float64)
    for row in range(rows):
        request = row // beams
        for head in range(heads):
            kv = head // group
            keys, values = prompt[request, :, kv, pads[request] : seen].double()
            if generated is not None and ancestors is not None:
                own = [generated[step, source, :, kv].double() for step, source in enumerate(ancestors[row].tolist())]
                keys = torch.cat([keys, torch.stack([pair[0] for pair in own])])
                values = torch.cat([values, torch.stack([pair[1] for pair in own])])
            weights = (keys @ q[row, head].double() / math.sqrt(dim)).softmax(dim=0)
            out[row, head] = weights @ values
    return out.flatten(1)
