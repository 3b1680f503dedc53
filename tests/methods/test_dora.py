"""DoRA: LoRA with a length for each row, which is served as a scale."""

from __future__ import annotations

import pytest
import torch

from perfbench.methods import parameters
from perfbench.methods.bank import Bank, union_layout
from perfbench.methods.dora import DoraOptions
from perfbench.runtimes import backbone
from perfbench.testing import check_method


def test_it_keeps_the_contract_of_a_method() -> None:
    check_method("dora")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_bank_holds_the_scale_that_the_definition_gives(dtype: str) -> None:
    """y = m (W + B A) x / |W + B A|, by dense weights in fp64; alpha / rank is 2.5."""
    base = backbone.load("llama-tiny", dtype, "cpu", seed=0)
    options = DoraOptions(rank=2, alpha=5.0, modules=("q", "down"))
    values = parameters.make("dora", base.shape, options, seed=1, linear_of=base.linear)
    plan = parameters.implementation("dora").plan(values, base.shape, options)
    bank = Bank(union_layout([plan]), 1, base.dtype, base.device, base.linear)
    slot = bank.admit(plan)
    for index in range(base.shape.layers):
        for module in options.modules:
            a, b, length = (values[f"layers.{index}.{module}.{kind}"].double() for kind in ("a", "b", "magnitude"))
            rows = base.linear(index, module).weight.double() + 2.5 * b @ a
            expected = length / rows.square().sum(dim=1).sqrt()
            found = 1 + bank.layers[index].scale_minus_one[module][slot].double()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if dtype == "fp32" else 5e-3)
            assert (expected - 1).abs().max() > 0.05


def test_magnitudes_count_in_the_backbone_s_own_rows_at_first() -> None:
    base = backbone.load("llama-tiny", "fp32", "cpu", seed=0)
    options = DoraOptions(modules=("v",))
    values = parameters.make("dora", base.shape, options, seed=1, initial=True, linear_of=base.linear)
    for index in range(base.shape.layers):
        rows = base.linear(index, "v").weight.norm(dim=1)
        assert torch.equal(values[f"layers.{index}.v.magnitude"], rows)
