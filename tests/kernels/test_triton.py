"""The Triton kernels, in the interpreter where there is no GPU, against fp64 and against planted faults."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="triton is not there for this platform")

from perfbench.kernels import low_rank, row_scale, vector_generator
from perfbench.kernels.settings import DEFAULTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative, in the 2-norm of a row. The interpreter cuts off the bits that a GPU rounds: 1 ulp, 2^-7 (2^-10).
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
FAULT_FACTOR = 10

dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "bf16", "fp16"])
# (groups, rows of each, rank, d_in, d_out): one and many of everything, odd sizes, ranks 1 to 128, a split D_in.
LOW_RANK = [
    (1, 1, 1, 17, 33),
    (3, 1, 4, 37, 53),
    (2, 5, 3, 130, 40),
    (5, 2, 16, 64, 129),
    (2, 3, 128, 33, 16),
    (2, 1, 8, DEFAULTS["low_rank.shrink"]["SPLIT_K"] + 70, 24),
    (1, 70, 5, 48, 20),
]


def normal(dtype: torch.dtype, seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(size, generator=generator).to(dtype).to(DEVICE)


def judge(run: Callable[[int], torch.Tensor], expected: torch.Tensor, dtype: torch.dtype, groups: int) -> None:
    """`run(shift)` is the kernel with every group given the adapter `shift` places on; two runs give one result."""

    def differences(found: torch.Tensor) -> torch.Tensor:
        return (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)

    found = run(0)
    assert float(differences(found).max()) <= TOLERANCES[dtype]
    assert torch.equal(run(0), found)
    if groups > 1:
        assert float(differences(run(1)).min()) > FAULT_FACTOR * TOLERANCES[dtype]


@dtypes
@pytest.mark.parametrize(("groups", "rows", "rank", "d_in", "d_out"), LOW_RANK)
def test_low_rank(dtype: torch.dtype, groups: int, rows: int, rank: int, d_in: int, d_out: int) -> None:
    make = normal(dtype, seed=31)
    y, x = make(groups, rows, d_out), make(groups, rows, d_in)
    a, b = make(groups, rank, d_in) / math.sqrt(d_in), make(groups, rank, d_out)
    expected = torch.stack(
        [y[g].double() + x[g].double() @ a[g].double().T @ b[g].double() for g in range(groups)]
    )

    def run(shift: int) -> torch.Tensor:
        out = y.clone()
        low_rank.FORMS["triton"](out, x, a.roll(shift, 0), b.roll(shift, 0))
        return out

    judge(run, expected, dtype, groups)


@dtypes
@pytest.mark.parametrize("rank", [1, 4])
def test_a_pair_of_zeros_leaves_the_bits_alone(dtype: torch.dtype, rank: int) -> None:
    """The empty slot, which requests without an adapter read."""
    make = normal(dtype, seed=32)
    y, x = make(3, 2, 29), make(3, 2, 21)
    a, b = make(3, rank, 21), make(3, rank, 29)
    a[1] = b[1] = 0
    out = y.clone()
    low_rank.FORMS["triton"](out, x, a, b)
    assert torch.equal(out[1], y[1])
    assert not torch.equal(out[0], y[0])


@dtypes
@pytest.mark.parametrize(("groups", "rows", "columns"), [(1, 1, 1), (3, 2, 53), (2, 7, 1030)])
def test_row_scale(dtype: torch.dtype, groups: int, rows: int, columns: int) -> None:
    make = normal(dtype, seed=33)
    y, s = make(groups, rows, columns), make(groups, columns)
    expected = y.double() * (1 + s.double().unsqueeze(1))

    def run(shift: int) -> torch.Tensor:
        out = y.clone()
        row_scale.FORMS["triton"](out, s.roll(shift, 0))
        return out

    judge(run, expected, dtype, groups)


@dtypes
@pytest.mark.parametrize(
    ("groups", "prompts", "hidden", "rank", "columns"), [(1, 1, 17, 1, 5), (3, 3, 70, 12, 53), (1, 4, 33, 5, 520)]
)
def test_vector_generator(
    dtype: torch.dtype, groups: int, prompts: int, hidden: int, rank: int, columns: int
) -> None:
    make = normal(dtype, seed=34)
    h, bias = make(prompts, hidden), make(groups, columns)
    w_down, w_up = make(groups, hidden, rank) / math.sqrt(hidden), make(groups, rank, columns)
    w_down = w_down.to(dtype)

    def alone(prompt: int) -> torch.Tensor:
        group = prompt * groups // prompts
        inner = h[prompt].double() @ w_down[group].double()
        gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        return gelu @ w_up[group].double() + bias[group].double()

    expected = torch.stack([alone(prompt) for prompt in range(prompts)])

    def run(shift: int) -> torch.Tensor:
        stacks = (t.roll(shift, 0) for t in (w_down, w_up, bias))
        return vector_generator.FORMS["triton"](h, *stacks)

    judge(run, expected, dtype, groups)


def test_inputs_that_do_not_fit_are_refused_by_name() -> None:
    make = normal(torch.float32, seed=35)
    y, x, a, b = make(2, 1, 8), make(2, 1, 6), make(2, 3, 6), make(2, 3, 8)
    form = low_rank.FORMS["triton"]
    with pytest.raises(ValueError, match=r"a: expected sizes \[2, 3, 6\], got \[2, 3, 5\]"):
        form(y, x, a[..., :5].contiguous(), b)
    with pytest.raises(ValueError, match=r"b: expected torch.float32.*got torch.float16"):
        form(y, x, a, b.half())
    with pytest.raises(ValueError, match="x: expected a contiguous tensor"):
        form(y, make(6, 1, 2).transpose(0, 2), a, b)
    with pytest.raises(ValueError, match=r"one of fp32, bf16, fp16, got torch.float64"):
        form(y.double(), x.double(), a.double(), b.double())


def test_without_a_gpu_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda":
        pytest.skip("there is a GPU here")
    monkeypatch.setattr("perfbench.kernels.launch.INTERPRETED", False)
    with pytest.raises(ValueError, match="expected a tensor on one CUDA device, got cpu; choose kernels eager"):
        row_scale.FORMS["triton"](torch.ones(1, 1, 4), torch.ones(1, 4))
