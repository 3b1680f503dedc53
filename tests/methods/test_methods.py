"""Every method file: how many parameters, what the initial values do, what a seed decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perfbench import testing
from perfbench.methods import fanlora, parameters
from perfbench.methods.bank import Bank
from perfbench.methods.fanlora import FanLoraOptions
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import BackboneShape
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.transformers_plan import PlanArm
from perfbench.spec.backbone_config import find_config

SERVED = tuple(name for name, method in METHODS.items() if method.served_by == "plan" and name != "none")
LLAMA2_7B = BackboneShape.of_config(find_config("llama2-7b"))
TINY = BackboneShape.of_config(find_config("llama-tiny"))

PAPER_COUNTS = {
    "lora": 9_994_240,
    "fanlora": 8_613_888,
    "ia3": 9_831_936,
    "ia3-original": 614_400,
    "para": 9_560_064,
}


@pytest.mark.parametrize("method", PAPER_COUNTS)
def test_parameters_on_llama2_7b_are_the_papers(method: str) -> None:
    assert parameters.parameter_count(method, LLAMA2_7B, METHODS[method].options()) == PAPER_COUNTS[method]


def test_the_peft_arms_serve_as_many_parameters_as_lora() -> None:
    for method in ("peft", "peft-single"):
        assert parameters.parameter_count(method, LLAMA2_7B, METHODS[method].options()) == PAPER_COUNTS["lora"]


def test_the_bare_backbone_has_none() -> None:
    assert parameters.parameter_count("none", LLAMA2_7B, METHODS["none"].options()) == 0
    with pytest.raises(ValueError, match="none has no adapters"):
        parameters.implementation("none")


@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("method", SERVED)
def test_it_keeps_the_contract(method: str, check: Callable[[str], None]) -> None:
    check(method)


@pytest.fixture(scope="module")
def tiny() -> backbone.Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


def logits(tiny: backbone.Backbone, bank: Bank | None) -> torch.Tensor:
    ids = torch.arange(3, 3 + 2 * 9).view(2, 9)
    batch = Batch(ids, torch.ones_like(ids), (0, 0) if bank else (-1, -1), beams=1, new_tokens=4)
    return PlanArm(tiny, bank, "eager").generate(batch, with_logits=True).logits


@pytest.mark.parametrize("method", SERVED)
def test_the_default_device_is_the_cpu_with_one_generator_for_all_values(method: str) -> None:
    """Bit for bit what it has always been: seeds of committed results go on meaning the same adapters."""
    options, module = METHODS[method].options(), parameters.implementation(method)
    generator = torch.Generator().manual_seed(1)
    for name, value in parameters.make(method, TINY, options, seed=1).items():
        expected = torch.empty(module.shapes(TINY, options)[name])
        module.randomise(name, expected, generator)
        assert torch.equal(value, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("method", SERVED)
def test_an_adapter_made_on_a_gpu_goes_to_a_folder_and_back(method: str, tmp_path: Path) -> None:
    options, module = METHODS[method].options(), parameters.implementation(method)
    one, again = (parameters.make(method, TINY, options, seed=1, device="cuda") for _ in range(2))
    assert all(one[name].is_cuda and torch.equal(one[name], again[name]) for name in one)
    module.save(one, TINY, options, tmp_path, "llama-tiny")
    for layer, read in zip(module.plan(one, TINY, options), module.load(tmp_path, TINY, options), strict=True):
        for expected, found in zip(layer.tensors(), read.tensors(), strict=True):
            assert torch.allclose(found, expected.cpu(), rtol=1e-5, atol=1e-6)


def test_fanlora_s_default_keeps_v_and_o_below_and_up_and_down_above() -> None:
    assert fanlora.default_setting(32) == (("v", "o"),) * 18 + (("up", "down"),) * 14


def test_fanlora_takes_a_setting_with_an_empty_layer(tiny: backbone.Backbone) -> None:
    options = FanLoraOptions(rank=2, setting=(("q",), (), ("gate", "down")))
    values = parameters.make("fanlora", tiny.shape, options, seed=3)
    plan = fanlora.plan(values, tiny.shape, options)
    assert [tuple(layer.low_rank) for layer in plan] == [("q",), (), ("gate", "down")]
    bank = Bank(parameters.meta_plan("fanlora", tiny.shape, options), 1, tiny.dtype, tiny.device, tiny.linear)
    bank.admit(plan)
    assert not torch.equal(logits(tiny, bank), logits(tiny, None))


def test_fanlora_refuses_a_setting_of_another_depth_and_an_unread_path() -> None:
    options = FanLoraOptions(setting=(("q",),))
    with pytest.raises(ValueError, match="the setting has 1 layers, the backbone 3"):
        fanlora.setting_of(TINY, options)
    with pytest.raises(ValueError, match="is a path"):
        fanlora.setting_of(TINY, replace(options, setting="setting.json"))
