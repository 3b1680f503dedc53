"""Families that only runtime transformers has: what the oracle says of them is what Hugging Face's model gives."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from perfbench.methods import parameters
from perfbench.methods.bank import Bank, union_layout
from perfbench.methods.plan import AdapterPlan
from perfbench.methods.registry import METHODS
from perfbench.proof import check, oracle
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.transformers_plan import PlanArm
from perfbench.spec import backbone_config

TINY = backbone_config.NAMED_CONFIGS["llama-tiny"]
QWEN3 = TINY | {"model_type": "qwen3", "head_dim": 32, "use_sliding_window": True, "sliding_window": 4,
                "max_window_layers": 2}  # fmt: skip
RESIDENT = 3


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def base(request: pytest.FixtureRequest) -> backbone.Backbone:
    """With norms that are not 1, so that one that is left out shows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backbone_config.NAMED_CONFIGS, "of-a-test", QWEN3)
        made = backbone.load("of-a-test", request.param, "cpu", seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.model.named_parameters():
        if "norm" in name:
            parameter.data += (0.3 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return made


def plan_of(base: backbone.Backbone, method: str, slot: int) -> AdapterPlan:
    options = METHODS[method].options()
    values = parameters.make(method, base.shape, options, seed=slot, input_rms=base.input_rms, linear_of=base.linear)
    plan: AdapterPlan = parameters.implementation(method).plan(values, base.shape, options)
    return plan


def checked(base: backbone.Backbone, method: str) -> check.Check:
    ids = torch.randint(3, 256, (4, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    batch = Batch(ids * mask, mask, (2, 0, -1, 1), 1, new_tokens=4)
    if method == "none":
        return check.check(PlanArm(base, None, "eager"), batch, RESIDENT, base, seed=1, plan_of=None)
    plans = [plan_of(base, method, slot) for slot in range(RESIDENT)]
    bank = Bank(union_layout(plans), RESIDENT, base.dtype, base.device, base.linear)
    for plan in plans:
        bank.admit(plan)
    return check.check(
        PlanArm(base, bank, "eager"), batch, RESIDENT, base, seed=1, plan_of=partial(plan_of, base, method)
    )


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.served_by == "plan"])
def test_every_method_passes_on_qwen3(base: backbone.Backbone, method: str) -> None:
    found = checked(base, method)
    assert found.status == "ok", found


@pytest.mark.parametrize("left_out", ["q_norm", "k_norm"])
def test_a_norm_of_the_heads_that_is_left_out_fails(
    base: backbone.Backbone, left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = oracle._of_heads

    def without(outputs: list[torch.Tensor], attention: Any, name: str, config: Any) -> list[torch.Tensor]:
        return outputs if name == left_out else own(outputs, attention, name, config)

    monkeypatch.setattr(oracle, "_of_heads", without)
    assert checked(base, "lora").status == "check_failed"
