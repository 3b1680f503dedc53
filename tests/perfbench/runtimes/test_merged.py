"""Merged adapters: what an unmerged one gives, for every operation of a plan; turns, and what can't be merged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from perfbench.errors import AdapterError
from perfbench.methods.ia3_original import Ia3OriginalOptions
from perfbench.methods.lora import LoraOptions
from perfbench.methods.miss import MissOptions
from perfbench.methods.road import RoadOptions
from perfbench.methods.shape import MODULES
from perfbench.methods.vera import VeraOptions
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.merged import MERGED_ARMS, Merging
from perfbench.runtimes.transformers_plan import PlanArm
from perfbench.spec import backbone_config
from perfbench.verify.on_device.runtimes import make_bank, make_plan

OPERATIONS: dict[str, tuple[str, Any]] = {
    "lora": ("lora", None),
    "lora-bias": ("lora", LoraOptions(lora_bias=True)),
    "ia3-outputs": ("ia3-original", Ia3OriginalOptions(modules=MODULES, inputs=())),
    "ia3-inputs": ("ia3-original", Ia3OriginalOptions(modules=MODULES, inputs=MODULES)),
    "road": ("road", RoadOptions(variant="road_4")),
    "miss": ("miss", MissOptions(rank=5)),
    "vera": ("vera", VeraOptions(rank=16)),
}
TINY = backbone_config.NAMED_CONFIGS["llama-tiny"]


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> backbone.Backbone:
    """With biases that are not zero."""
    monkeypatch.setitem(backbone_config.NAMED_CONFIGS, "of-a-test", TINY | {"attention_bias": True, "mlp_bias": True})
    found = backbone.load("of-a-test", "fp32", "cpu", seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in found.model.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return found


def make_batch(slot: int, beams: int) -> Batch:
    ids = torch.randint(3, 256, (3, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return Batch(ids * mask, mask, (slot,) * 3, beams, new_tokens=6)


def apart(base: backbone.Backbone, runtime: str, case: str, slots: tuple[int, ...], beams: int = 1) -> float:
    """The largest relative difference of a merged arm's logits over these turns; inf where it has other tokens."""
    method, options = OPERATIONS[case]
    arm = MERGED_ARMS[runtime](base, [make_plan(base, method, tenant, options) for tenant in range(2)], "eager")
    plain, worst = PlanArm(base, make_bank(base, method, options), "eager"), 0.0
    for slot in slots:
        batch = make_batch(slot, beams)
        tokens = plain.generate(batch).tokens
        if not torch.equal(arm.generate(batch).tokens, tokens):
            return float("inf")
        expected, found = (one.generate(batch, forced=tokens, with_logits=True).logits for one in (plain, arm))
        worst = max(worst, float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max()))
    arm.close()
    return worst


@pytest.mark.parametrize("runtime", MERGED_ARMS)
@pytest.mark.parametrize("case", OPERATIONS)
def test_it_is_what_the_unmerged_adapter_gives(base: backbone.Backbone, case: str, runtime: str) -> None:
    assert apart(base, runtime, case, (0, 1, -1, 0)) < 1e-5
    assert apart(base, runtime, case, (1,), beams=3) < 1e-5


def test_the_backbone_is_as_it_was(base: backbone.Backbone) -> None:
    before = {name: tensor.clone() for name, tensor in base.model.named_parameters()}
    assert apart(base, "static", "lora", (0,)) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.named_parameters())


def test_the_last_tenant_s_weights_are_seen(base: backbone.Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Merging.switch
    monkeypatch.setattr(Merging, "switch", lambda self, slot: own(self, 0))
    assert apart(base, "transformers", "lora", (0,)) < 1e-5
    assert apart(base, "transformers", "lora", (0, 1)) > 1e-3


def test_two_tenants_at_once_and_scales_of_the_prompt_are_refused(base: backbone.Backbone) -> None:
    arm = MERGED_ARMS["static"](base, [make_plan(base, "lora", 0)], "eager")
    with pytest.raises(ValueError, match=r"merged weights serve one tenant at a time, got slots \[-1, 0\]"):
        arm.generate(replace(make_batch(0, 1), slots=(0, -1, 0)))
    with pytest.raises(AdapterError, match="made from the prompt can't be merged"):
        MERGED_ARMS["transformers"](base, [make_plan(base, "para", 0)], "eager").switch(0)


def test_a_bias_is_not_merged_into_a_linear_that_has_none() -> None:
    base = backbone.load("llama-tiny", "fp32", "cpu", seed=0)
    arm = MERGED_ARMS["static"](base, [make_plan(base, "lora", 0, LoraOptions(lora_bias=True))], "eager")
    with pytest.raises(AdapterError, match="q: a bias can't be merged into a linear that has none"):
        arm.generate(make_batch(0, 1))
