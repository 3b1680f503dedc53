"""The eager kernels against loops over the requests in fp64, and against a planted fault."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from perfbench.kernels import low_rank, row_scale, vector_generator

# Relative, in the 2-norm of a row. A result rounded to 8 (11) bits is off by up to 2^-9 (2^-12) of each value,
# and the bottleneck is rounded once more on the way.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
FAULT_FACTOR = 10

dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "bf16", "fp16"])
groups = pytest.mark.parametrize("groups", [1, 5], ids=["one-group", "a-group-each"])


def normal(dtype: torch.dtype, seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(size, generator=generator).to(dtype)


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def least(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).min())


def judge(run: Callable[[int], torch.Tensor], expected: torch.Tensor, dtype: torch.dtype, groups: int) -> None:
    """`run(shift)` is the kernel with every group given the adapter `shift` places on."""
    tolerance = TOLERANCES[dtype]
    assert worst(run(0), expected) <= tolerance
    if groups > 1:
        assert least(run(1), expected) > FAULT_FACTOR * tolerance


@dtypes
@groups
def test_low_rank_is_each_request_s_own_pair(dtype: torch.dtype, groups: int) -> None:
    make = normal(dtype, seed=11)
    rows, rank, d_in, d_out = 7, 3, 37, 53
    y, x = make(groups, rows, d_out), make(groups, rows, d_in)
    a, b = make(groups, rank, d_in) / math.sqrt(d_in), make(groups, rank, d_out)
    expected = torch.stack(
        [
            torch.stack([y[g, m].double() + (x[g, m].double() @ a[g].double().T) @ b[g].double() for m in range(rows)])
            for g in range(groups)
        ]
    )

    def run(shift: int) -> torch.Tensor:
        out = y.clone()
        low_rank.FORMS["eager"](out, x, a.roll(shift, 0), b.roll(shift, 0))
        return out

    judge(run, expected, dtype, groups)


@dtypes
@groups
def test_row_scale_is_each_request_s_own_scale(dtype: torch.dtype, groups: int) -> None:
    make = normal(dtype, seed=12)
    rows, d = 7, 53
    y, s = make(groups, rows, d), make(groups, d)
    expected = torch.stack(
        [torch.stack([y[g, m].double() * (1 + s[g].double()) for m in range(rows)]) for g in range(groups)]
    )

    def run(shift: int) -> torch.Tensor:
        out = y.clone()
        row_scale.FORMS["eager"](out, s.roll(shift, 0))
        return out

    judge(run, expected, dtype, groups)


@dtypes
@groups
def test_vector_generator_is_each_request_s_own_vector(dtype: torch.dtype, groups: int) -> None:
    make = normal(dtype, seed=13)
    requests, hidden, rank, d = 5, 37, 3, 53
    h, bias = make(requests, hidden), make(groups, d)
    w_down, w_up = make(groups, hidden, rank) / math.sqrt(hidden), make(groups, rank, d)

    def alone(request: int) -> torch.Tensor:
        group = request if groups > 1 else 0
        inner = h[request].double() @ w_down[group].double()
        gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        return gelu @ w_up[group].double() + bias[group].double()

    expected = torch.stack([alone(request) for request in range(requests)])

    def run(shift: int) -> torch.Tensor:
        stacks = (w.roll(shift, 0) for w in (w_down, w_up, bias))
        return vector_generator.FORMS["eager"](h, *stacks)

    judge(run, expected, dtype, groups)


def test_the_kernels_write_in_place() -> None:
    make = normal(torch.float32, seed=14)
    y = make(2, 3, 8)
    before, place = y.clone(), y.data_ptr()
    low_rank.FORMS["eager"](y, make(2, 3, 6), make(2, 1, 6), make(2, 1, 8))
    row_scale.FORMS["eager"](y, make(2, 8))
    assert y.data_ptr() == place
    assert not torch.equal(y, before)
