"""What the table of cases does not say of the eager kernels: where they write, and whose ranks a product gives."""

from __future__ import annotations

import pytest
import torch

from perfbench.kernels import grouped_sum, low_rank, row_scale


def test_the_kernels_write_in_place() -> None:
    generator = torch.Generator().manual_seed(14)

    def make(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    y = make(2, 3, 8)
    before, place = y.clone(), y.data_ptr()
    low_rank.FORMS["eager"](y, make(2, 3, 6), make(2, 1, 6), make(2, 1, 8))
    row_scale.FORMS["eager"](y, make(2, 8))
    assert y.data_ptr() == place
    assert not torch.equal(y, before)


def test_ranks_out_of_a_product_are_each_row_s_own() -> None:
    """For one adapter for each request in order, in rows and in columns first."""
    groups, rows, ranks = 3, 2, 4
    every = torch.randn(groups * rows, groups * ranks, generator=torch.Generator().manual_seed(46))
    expected = torch.stack([every[g * rows : (g + 1) * rows, g * ranks : (g + 1) * ranks] for g in range(groups)])
    assert torch.equal(low_rank.FROM_PRODUCT["eager"](every, groups), expected)
    assert torch.equal(low_rank.FROM_PRODUCT["eager"](every.t().contiguous().t(), groups), expected)
    shared = torch.arange(groups * rows * 2.0).view(-1, 2)
    both = low_rank.FROM_PRODUCT["eager"](torch.cat([every, shared], dim=1), groups, 2)
    assert torch.equal(both, torch.cat([expected, shared.view(groups, rows, 2)], dim=2))
    assert torch.equal(low_rank.FROM_PRODUCT["eager"](shared, groups, 2), shared.view(groups, rows, 2))


@pytest.mark.parametrize("own", [0, 3])
@pytest.mark.parametrize(("ranks", "columns"), [(5, 33), (257, 517)], ids=["small", "large"])
def test_modules_with_vectors_are_one_product(ranks: int, columns: int, own: int) -> None:
    """Together and one by one they are what fp64 gives, behind `own` other ranks, on both sides of MANY_VALUES."""
    generator = torch.Generator().manual_seed(47)

    def make(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    groups, modules = 4, 3
    b, of_ranks, of_columns = make(ranks, columns), make(groups, modules, ranks), make(groups, modules, columns)
    h, y = make(groups, 1, own + ranks), make(groups, modules * columns)
    assert (b.numel() > low_rank.MANY_VALUES) == (ranks == 257)
    added = torch.einsum("gr,gmr,rc,gmc->gmc", *(one.double() for one in (h[:, 0, own:], of_ranks, b, of_columns)))
    expected = y.double() + added.flatten(1)
    parts = tuple(
        low_rank.VectorPart(own, module * columns, b, of_ranks[:, module], of_columns[:, module])
        for module in range(modules)
    )
    joint = low_rank.JointVectors(own, b, of_ranks, of_columns.flatten(1))
    for given in (None, joint):
        found = y.clone()
        low_rank.expand(found, h, low_rank.Expansion((), vectors=parts, joint=given))
        assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_the_matrix_of_a_grouped_sum_gives_the_sum() -> None:
    x = torch.arange(22.0).view(2, 11)
    for rank in (1, 4, 11, 16):
        assert torch.equal(x @ grouped_sum.matrix(rank, x).T, grouped_sum.eager(x, rank, 2)[:, 0])
