"""What the table of cases does not say of the Triton kernels: empty slots, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="triton is not there for this platform")

from perfbench.kernels import low_rank, row_scale

pytestmark = pytest.mark.interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


def normal(dtype: torch.dtype, seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(size, generator=generator).to(dtype).to(DEVICE)


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
