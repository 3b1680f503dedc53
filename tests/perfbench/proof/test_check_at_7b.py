"""The check at the widths of LLaMA-2 7B in bf16, where rounding is what a fixed tolerance used to stumble over."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from perfbench.methods import parameters
from perfbench.methods.bank import Bank
from perfbench.methods.plan import AdapterPlan
from perfbench.methods.registry import METHODS
from perfbench.proof import check
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.static.arm import StaticArm
from perfbench.spec import backbone_config

TENANTS = 2


@pytest.fixture(scope="module")
def base() -> Iterator[backbone.Backbone]:
    """Two layers and a small vocabulary: a gigabyte and some seconds."""
    name = "llama2-7b-two-layers"
    with pytest.MonkeyPatch.context() as patch:
        config = backbone_config.NAMED_CONFIGS["llama2-7b"] | {"num_hidden_layers": 2, "vocab_size": 1000}
        patch.setitem(backbone_config.NAMED_CONFIGS, name, config)
        yield backbone.load(name, "bf16", "cpu", seed=0)


def make_plan(base: backbone.Backbone, method: str, slot: int) -> AdapterPlan:
    options, module = METHODS[method].options(), parameters.implementation(method)
    values = parameters.make(method, base.shape, options, seed=slot, input_rms=base.input_rms)
    plan: AdapterPlan = module.plan(values, base.shape, options)
    return plan


def check_of(base: backbone.Backbone, method: str, held: tuple[int, ...]) -> check.Check:
    """Of two requests of two tenants, in whose slots the adapters of the tenants `held` lie."""
    bank, plan_of = None, None
    if method != "none":
        layout = parameters.meta_plan(method, base.shape, METHODS[method].options())
        bank, plan_of = Bank(layout, TENANTS, base.dtype, base.device, base.linear), partial(make_plan, base, method)
        for tenant in held:
            bank.admit(plan_of(tenant))
    ids = torch.randint(3, 1000, (TENANTS, 6), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids, torch.ones_like(ids), (0, 1) if bank else (-1, -1), 1, new_tokens=3)
    arm = StaticArm(base, bank, "eager")
    try:
        return check.check(arm, batch, TENANTS, base, seed=0, plan_of=plan_of)
    finally:
        arm.close()


@pytest.mark.parametrize("method", ["none", "lora", "fanlora", "ia3", "para"])
def test_every_method_passes(base: backbone.Backbone, method: str) -> None:
    found = check_of(base, method, (0, 1))
    assert (found.status, found.reason) == ("ok", None)
    assert 1e-3 < found.noise < 0.1


@pytest.mark.parametrize("method", ["lora", "ia3", "para"])
def test_one_tenant_s_adapter_in_the_other_s_slot_fails(base: backbone.Backbone, method: str) -> None:
    found = check_of(base, method, (0, 0))
    assert found.status == "check_failed"
