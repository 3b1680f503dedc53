"""The fused operations of the decode step against loops over the rows in fp64, and against planted faults."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import pytest
import torch

from perfbench.kernels import decode_attention, low_rank, qkv_epilogue, residual_rmsnorm, swiglu_epilogue
from perfbench.kernels.row_scale import Scale

# Relative, in the 2-norm of a row, as in test_eager; several roundings follow each other here.
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
FAULT_FACTOR = 10

FORMS = ["eager", *(["triton"] if importlib.util.find_spec("triton") else [])]

dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "bf16", "fp16"])
forms = pytest.mark.parametrize("form", FORMS)
groups = pytest.mark.parametrize("groups", [1, 3], ids=["one-group", "a-group-each"])

Parts = list[tuple[int, int, torch.Tensor]]


def normal(dtype: torch.dtype, seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(size, generator=generator).to(dtype)


def differences(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    assert found.shape == expected.shape
    return (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)


def judge(run: Callable[[int], torch.Tensor], expected: torch.Tensor, dtype: torch.dtype, groups: int) -> None:
    """`run(shift)` is the kernel with every group given the adapter `shift` places on."""
    assert float(differences(run(0), expected).max()) <= TOLERANCES[dtype]
    if groups > 1:
        assert float(differences(run(1), expected).min()) > FAULT_FACTOR * TOLERANCES[dtype]


def halves(form: str, h: torch.Tensor) -> torch.Tensor:
    """h [G, M, R] as the form wants it: Triton's adds up planes in fp32."""
    if form == "eager":
        return h
    rows = h.float().flatten(0, 1)
    part = torch.full_like(rows, 0.25)
    return torch.stack([rows - part, part])


def shifted(parts: Parts, shift: int) -> low_rank.Expansion:
    return low_rank.Expansion(tuple((rank, column, weight.roll(shift, 0)) for rank, column, weight in parts))


def adapted(y: torch.Tensor, h: torch.Tensor, b: Parts, scale: torch.Tensor | None, first: int) -> torch.Tensor:
    """fp64 [rows, D]: row by row, what `expand` and the scale should make of y [rows, D]."""
    out = y.double().clone()
    per_group = len(y) // len(h)
    for row in range(len(y)):
        group = row // per_group
        for rank, column, weight in b:
            ranks = h[group, row % per_group, rank : rank + weight.shape[1]].double()
            out[row, column : column + weight.shape[2]] += ranks @ weight[group].double()
        if scale is not None:
            out[row, first : first + scale.shape[1]] *= 1 + scale[group].double()
    return out


def rotated(head: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """RoPE by its definition: each pair (i, i + D / 2) turned by its angle."""
    half = len(head) // 2
    out = torch.empty_like(head)
    for i in range(half):
        c, s = math.cos(float(angles[i])), math.sin(float(angles[i]))
        out[i] = head[i] * c - head[i + half] * s
        out[i + half] = head[i + half] * c + head[i] * s
    return out


@dtypes
@groups
@pytest.mark.parametrize("rows", [1, 4])
def test_expand_of_modules_that_are_alike(dtype: torch.dtype, groups: int, rows: int) -> None:
    """One product for all of them where each group has one row, a product each where it has more."""
    make, modules, rank, columns = normal(dtype, seed=20), 3, 2, 17
    y, h = make(groups * rows, modules * columns), make(groups, rows, modules * rank)
    stacked = make(groups, modules, rank, columns)

    def parts(weights: torch.Tensor) -> Parts:
        return [(i * rank, i * columns, weight) for i, weight in enumerate(weights.unbind(1))]

    def run(shift: int) -> torch.Tensor:
        out, weights = y.clone(), stacked.roll(shift, 0)
        low_rank.expand(out, h, low_rank.Expansion(tuple(parts(weights)), weights))
        return out

    judge(run, adapted(y, h, parts(stacked), None, 0), dtype, groups)


@forms
@dtypes
@groups
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_qkv_epilogue(form: str, dtype: torch.dtype, groups: int, kv_heads: int) -> None:
    make, heads, dim, rows = normal(dtype, seed=21), 4, 6, 6
    q_columns, columns = heads * dim, (heads + 2 * kv_heads) * dim
    qkv, h = make(rows, columns), make(groups, rows // groups, 5)
    b: Parts = [(0, 0, make(groups, 2, q_columns)), (2, q_columns + kv_heads * dim, make(groups, 3, kv_heads * dim))]
    scale, first = make(groups, columns - q_columns), q_columns  # on K and V
    angles = torch.randn(rows, dim // 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    both = torch.cat([angles, angles], dim=1)
    sign = torch.cat([-torch.ones(dim // 2), torch.ones(dim // 2)])
    cos, sin = both.cos().to(dtype), (both.sin() * sign).to(dtype)
    heads_of = adapted(qkv, h, b, scale, first).view(rows, -1, dim)
    turned = torch.stack(
        [torch.stack([rotated(heads_of[r, i], angles[r]) for i in range(heads + kv_heads)]) for r in range(rows)]
    )
    expected = torch.cat([turned, heads_of[:, heads + kv_heads :]], dim=1).flatten(1)

    def run(shift: int) -> torch.Tensor:
        entry = torch.full((rows, 2, kv_heads, dim), float("nan"), dtype=dtype)
        q = qkv_epilogue.FORMS[form](
            qkv.clone(), halves(form, h), shifted(b, shift), Scale(scale.roll(shift, 0), first), cos, sin, entry
        )
        return torch.cat([q.reshape(rows, -1), entry.view(rows, -1)], dim=1)

    judge(run, expected, dtype, groups)


@forms
@dtypes
@groups
@pytest.mark.parametrize("activation", swiglu_epilogue.ACTIVATIONS)
def test_swiglu_epilogue(
    form: str, dtype: torch.dtype, groups: int, activation: str
) -> None:
    make, rows, inner = normal(dtype, seed=22), 6, 37
    gate_up, h = make(rows, 2 * inner), make(groups, rows // groups, 5)
    b: Parts = [(0, 0, make(groups, 2, inner)), (2, inner, make(groups, 3, inner))]
    scale = make(groups, inner)
    both = adapted(gate_up, h, b, scale, inner)
    expected = swiglu_epilogue.ACTIVATIONS[activation](both[:, :inner]) * both[:, inner:]

    def run(shift: int) -> torch.Tensor:
        return swiglu_epilogue.FORMS[form](
            gate_up.clone(), halves(form, h), shifted(b, shift), Scale(scale.roll(shift, 0), inner), activation
        )

    judge(run, expected, dtype, groups)


@forms
@dtypes
@groups
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["own-type", "fp32"])
def test_residual_rmsnorm(form: str, dtype: torch.dtype, groups: int, weight_dtype: torch.dtype | None) -> None:
    make, rows, hidden, eps = normal(dtype, seed=23), 6, 37, 1e-5
    residual, y, h = make(rows, hidden), make(rows, hidden), make(groups, rows // groups, 3)
    b: Parts = [(0, 0, make(groups, 3, hidden))]
    weight = make(hidden).to(weight_dtype or dtype)
    stream = residual.double() + adapted(y, h, b, None, 0)
    normed = stream / (stream.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()
    expected = torch.cat([stream, normed], dim=1)

    def run(shift: int) -> torch.Tensor:
        in_place = residual.clone()
        found = residual_rmsnorm.FORMS[form](in_place, y, halves(form, h), shifted(b, shift), weight, eps)
        assert found.dtype == dtype
        return torch.cat([in_place, found], dim=1)

    judge(run, expected, dtype, groups)


@forms
@dtypes
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_decode_attention(form: str, dtype: torch.dtype, beams: int, padded: bool, kv_heads: int) -> None:
    make, requests, heads, dim, length, n = normal(dtype, seed=24), 3, 4, 6, 7, 5
    rows = requests * beams
    q, prompt = make(rows, heads, dim), make(requests, 2, kv_heads, length, dim)
    generated = make(n + 2, rows, 2, kv_heads, dim) if beams > 1 else None
    ancestors = torch.randint(0, rows, (rows, n), generator=torch.Generator().manual_seed(5))
    where = None if generated is None else ancestors + torch.arange(n) * rows
    pads = (4, 0, 2) if padded else (0, 0, 0)
    mask = torch.ones(requests, 1, 1, length, dtype=torch.bool)
    for request, pad in enumerate(pads):
        mask[request, ..., :pad] = False
        prompt[request, :, :, :pad] = 100.0  # whoever looks there is far off

    def alone(row: int, head: int) -> torch.Tensor:
        request, kv = row // beams, head // (heads // kv_heads)
        keys, values = prompt[request, :, kv, pads[request] :].double()
        if generated is not None:
            own = torch.stack([generated[step, ancestors[row, step], :, kv] for step in range(n)]).double()
            keys, values = torch.cat([keys, own[:, 0]]), torch.cat([values, own[:, 1]])
        return (keys @ q[row, head].double() / math.sqrt(dim)).softmax(dim=0) @ values

    expected = torch.stack([torch.cat([alone(row, head) for head in range(heads)]) for row in range(rows)])

    def run(shift: int) -> torch.Tensor:
        # The fault: every row reads the generated tokens of the next, or every request the next one's prompt.
        rolled = None if where is None else where.roll(shift, 0)
        whose = prompt if where is not None else prompt.roll(shift, 0)
        return decode_attention.FORMS[form](q, whose, generated, rolled, mask if padded else None)

    judge(run, expected, dtype, groups=rows)
