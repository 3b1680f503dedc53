"""Requests that pick their adapter out of a stack: repeated, unsorted, none at all; and places that a device names.

Triton's forms, in the interpreter where there is no GPU, against loops over the rows in fp64; and with every request
given the next one's adapter. The ranks come as planes of a shrink, or as columns of the base product.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not there for this platform")

from perfbench.kernels import (
    decode_attention,
    low_rank,
    qkv_epilogue,
    residual_rmsnorm,
    row_scale,
    swiglu_epilogue,
    vector_generator,
)
from tests.kernels.test_fused import TOLERANCES, Parts, differences, dtypes, judge, normal, rotated

ADAPTERS, BEAMS = 3, 2
OWN = torch.tensor([2, -1, 0, 2])
ROWS = len(OWN) * BEAMS
origins = pytest.mark.parametrize("origin", ["planes", "product"])


def make_h(origin: str, columns: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """What the kernels take for `columns` [rows, T x R]: as they are, or each row's own as two planes in fp32."""
    if origin == "product":
        return low_rank.FROM_PRODUCT["triton"](columns, ADAPTERS)
    every = columns.view(ROWS, ADAPTERS, -1)
    mine = torch.stack([every[row, own[row // BEAMS]].float() for row in range(ROWS)])
    mine[(own < 0).repeat_interleave(BEAMS)] = float("nan")  # never to be read
    return torch.stack([mine - 0.25, torch.full_like(mine, 0.25)])


def next_adapter(own: torch.Tensor, shift: int) -> torch.Tensor:
    return torch.where(own < 0, torch.zeros_like(own), (own + shift) % ADAPTERS) if shift else own


def adapted(y: torch.Tensor, columns: torch.Tensor, b: Parts, scale: row_scale.Scale | None) -> torch.Tensor:
    """fp64 [rows, D]: y [rows, D] with each row's own low-rank part and scale."""
    out = y.double().clone()
    for row in range(ROWS):
        own = int(OWN[row // BEAMS])
        if own < 0:
            continue
        mine = columns[row].view(ADAPTERS, -1)[own].double()
        for rank, column, weight in b:
            out[row, column : column + weight.shape[2]] += mine[rank : rank + weight.shape[1]] @ weight[own].double()
        if scale is not None:
            first, size = scale.first_column, scale.minus_one.shape[1]
            out[row, first : first + size] *= 1 + scale.minus_one[own].double()
    return out


def in_a_wider_row(y: torch.Tensor) -> torch.Tensor:
    """y as the first columns of a product that has more of them, full of NaN."""
    wide = torch.full((len(y), y.shape[1] + 5), float("nan"), dtype=y.dtype)
    wide[:, : y.shape[1]] = y
    return wide[:, : y.shape[1]]


@origins
@dtypes
def test_qkv_epilogue(origin: str, dtype: torch.dtype) -> None:
    make, heads, kv_heads, dim = normal(dtype, seed=41), 4, 2, 6
    q_columns, columns = heads * dim, (heads + 2 * kv_heads) * dim
    qkv, ranks = make(ROWS, columns), make(ROWS, ADAPTERS * 5)
    of_q, of_v = make(ADAPTERS, 2, q_columns), make(ADAPTERS, 3, kv_heads * dim)
    b: Parts = [(0, 0, of_q), (2, q_columns + kv_heads * dim, of_v)]
    scale = row_scale.Scale(make(ADAPTERS, columns - q_columns), q_columns)
    angles = torch.randn(ROWS, dim // 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    both = torch.cat([angles, angles], dim=1)
    sign = torch.cat([-torch.ones(dim // 2), torch.ones(dim // 2)])
    cos, sin = both.cos().to(dtype), (both.sin() * sign).to(dtype)
    of_heads = adapted(qkv, ranks, b, scale).view(ROWS, -1, dim)
    turned = torch.stack(
        [torch.stack([rotated(of_heads[r, i], angles[r]) for i in range(heads + kv_heads)]) for r in range(ROWS)]
    )
    expected = torch.cat([turned, of_heads[:, heads + kv_heads :]], dim=1).flatten(1)

    def run(shift: int) -> torch.Tensor:
        own = next_adapter(OWN, shift)
        entries = torch.full((4, ROWS, 2, kv_heads, dim), float("nan"), dtype=dtype)
        q = qkv_epilogue.FORMS["triton"](
            in_a_wider_row(qkv), make_h(origin, ranks, own), low_rank.Expansion(tuple(b), own=own),
            scale._replace(own=own), cos, sin, entries, torch.tensor([2]),
        )  # fmt: skip
        assert bool(entries[[0, 1, 3]].isnan().all()), "another step of the cache was written"
        return torch.cat([q.reshape(ROWS, -1), entries[2].view(ROWS, -1)], dim=1)

    judge(run, expected, dtype, ADAPTERS)


@origins
@dtypes
def test_swiglu_epilogue(origin: str, dtype: torch.dtype) -> None:
    make, inner = normal(dtype, seed=42), 37
    gate_up, ranks = make(ROWS, 2 * inner), make(ROWS, ADAPTERS * 5)
    b: Parts = [(0, 0, make(ADAPTERS, 2, inner)), (2, inner, make(ADAPTERS, 3, inner))]
    scale = row_scale.Scale(make(ADAPTERS, inner), inner)
    both = adapted(gate_up, ranks, b, scale)
    expected = torch.nn.functional.silu(both[:, :inner]) * both[:, inner:]

    def run(shift: int) -> torch.Tensor:
        own = next_adapter(OWN, shift)
        return swiglu_epilogue.FORMS["triton"](
            in_a_wider_row(gate_up), make_h(origin, ranks, own), low_rank.Expansion(tuple(b), own=own),
            scale._replace(own=own), "silu",
        )  # fmt: skip

    judge(run, expected, dtype, ADAPTERS)


@origins
@dtypes
def test_residual_rmsnorm(origin: str, dtype: torch.dtype) -> None:
    make, hidden, eps = normal(dtype, seed=43), 37, 1e-5
    residual, y, ranks = make(ROWS, hidden), make(ROWS, hidden), make(ROWS, ADAPTERS * 3)
    b: Parts = [(0, 0, make(ADAPTERS, 3, hidden))]
    weight = make(hidden)
    stream = residual.double() + adapted(y, ranks, b, None)
    expected = stream / (stream.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()

    def run(shift: int) -> torch.Tensor:
        own = next_adapter(OWN, shift)
        return residual_rmsnorm.FORMS["triton"](
            residual.clone(), in_a_wider_row(y), make_h(origin, ranks, own), low_rank.Expansion(tuple(b), own=own),
            weight, eps,
        )  # fmt: skip

    judge(run, expected, dtype, ADAPTERS)


@dtypes
def test_shrink(dtype: torch.dtype) -> None:
    make, rank, d_in = normal(dtype, seed=44), 4, 70
    x, a = make(ROWS, d_in), make(ADAPTERS, rank, d_in)
    rows = [x[row].double() @ a[OWN[row // BEAMS]].double().T * (OWN[row // BEAMS] >= 0) for row in range(ROWS)]
    served = (OWN >= 0).repeat_interleave(BEAMS)

    def run(shift: int) -> torch.Tensor:
        found = low_rank.SHRINKS["triton"](x, a, next_adapter(OWN, shift)).sum(dim=0)
        assert shift or not found[~served].any()
        return found[served]

    judge(run, torch.stack(rows)[served], dtype, ADAPTERS)


@dtypes
def test_expand(dtype: torch.dtype) -> None:
    """Of many rows, as in prefill: some columns of a wider row."""
    make, columns = normal(dtype, seed=48), 50
    y, ranks = make(ROWS, columns), make(ROWS, ADAPTERS * 5)
    b: Parts = [(0, 0, make(ADAPTERS, 2, 20)), (2, 31, make(ADAPTERS, 3, 19))]

    def run(shift: int) -> torch.Tensor:
        own = next_adapter(OWN, shift)
        out = in_a_wider_row(y)
        planes = make_h("planes", ranks, OWN)  # of the right adapter: what is shifted is b
        planes[:, (OWN < 0).repeat_interleave(BEAMS)] = 1.0
        low_rank.EXPANDS["triton"](out, planes, low_rank.Expansion(tuple(b), own=own))
        return out

    judge(run, adapted(y, ranks, b, None), dtype, ADAPTERS)


@dtypes
def test_vector_generator(dtype: torch.dtype) -> None:
    make, hidden, rank, columns = normal(dtype, seed=45), 33, 5, 40
    h, bias = make(len(OWN), hidden), make(ADAPTERS, columns)
    w_down, w_up = (make(ADAPTERS, hidden, rank) / math.sqrt(hidden)).to(dtype), make(ADAPTERS, rank, columns)
    served = OWN >= 0

    def alone(prompt: int) -> torch.Tensor:
        own = OWN[prompt]
        inner = h[prompt].double() @ w_down[own].double()
        gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        return gelu @ w_up[own].double() + bias[own].double()

    def run(shift: int) -> torch.Tensor:
        found = vector_generator.FORMS["triton"](h, w_down, w_up, bias, next_adapter(OWN, shift))
        assert shift or not found[~served].any()
        return found[served]

    judge(run, torch.stack([alone(prompt) for prompt in range(len(OWN))])[served], dtype, ADAPTERS)


def test_ranks_out_of_a_product_are_each_row_s_own() -> None:
    """Plain torch's form, for one adapter for each request in order, in rows and in columns first."""
    groups, rows, ranks = 3, 2, 4
    every = torch.randn(groups * rows, groups * ranks, generator=torch.Generator().manual_seed(46))
    expected = torch.stack([every[g * rows : (g + 1) * rows, g * ranks : (g + 1) * ranks] for g in range(groups)])
    assert torch.equal(low_rank.FROM_PRODUCT["eager"](every, groups), expected)
    assert torch.equal(low_rank.FROM_PRODUCT["eager"](every.t().contiguous().t(), groups), expected)


@pytest.mark.parametrize("form", ["eager", "triton"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@dtypes
def test_attention_sees_what_the_device_says_is_filled(
    form: str, beams: int, padded: bool, dtype: torch.dtype
) -> None:
    """Equal to a cache that ends there; one place more is seen to differ."""
    make, requests, heads, dim, length, places, n = normal(dtype, seed=47), 2, 4, 6, 7, 5, 3
    rows = requests * beams
    q = make(rows, heads, dim)
    prompt = make(requests, 2, 2, length + (places if beams == 1 else 0), dim)
    generated = make(places, rows, 2, 2, dim) if beams > 1 else None
    where = torch.randint(0, rows, (rows, places), generator=torch.Generator().manual_seed(5))
    where = where + torch.arange(places) * rows if beams > 1 else None
    padding = None
    if padded:
        padding = torch.ones(requests, 1, 1, length + places, dtype=torch.bool)
        padding[0, ..., :2] = False
    attend, masks = decode_attention.FORMS[form], decode_attention.MASKS[form]
    short = None if padding is None else padding[..., : length + n if beams == 1 else length]
    ends = prompt[:, :, :, : length + n] if beams == 1 else prompt
    expected = attend(q, ends, generated, None if where is None else where[:, :n], short)

    def run(filled: int) -> torch.Tensor:
        count = torch.tensor([filled])
        mask = masks(padding, count, length, places)
        if beams == 1:
            count = count + length
        return attend(q, prompt, generated, where, mask, count)

    assert float(differences(run(n), expected.double()).max()) <= TOLERANCES[dtype]
    assert float(differences(run(n + 1), expected.double()).max()) > 10 * TOLERANCES[dtype]
