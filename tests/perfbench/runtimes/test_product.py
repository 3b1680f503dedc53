"""x W^T by whatever way, against fp64."""

from __future__ import annotations

import pytest
import torch

from perfbench.runtimes.static.product import FEW_VALUES, product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, FEW_VALUES // 64 + 1])
@pytest.mark.parametrize("d_out", [33, 96])
def test_it_is_the_product(rows: int, d_out: int, bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight, b = (torch.randn(size, generator=generator).to(dtype) for size in ((rows, 64), (d_out, 64), (d_out,)))
    found = product(x, weight, b if bias else None)
    expected = x.double() @ weight.double().T + (b.double() if bias else 0)
    assert found.shape == (rows, d_out)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert float((found.double() - expected).norm() / expected.norm()) < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("d_in", [1024, 1031])
@pytest.mark.parametrize("d_out", [16, 127, 129])
def test_small_and_large_weights(d_out: int, d_in: int, rows: int) -> None:
    """On both sides of both limits, which choose the library."""
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, d_in, generator=generator), torch.randn(d_out, d_in, generator=generator)
    expected = x.double() @ weight.double().T
    assert float((product(x, weight).double() - expected).norm() / expected.norm()) < 1e-6


def test_a_transposed_weight_is_read_as_it_lies() -> None:
    """The fused weights are whole rows, yet a view of some of them must do as well."""
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))[8:24]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(product(x, weight), x @ weight.T, atol=1e-5)
