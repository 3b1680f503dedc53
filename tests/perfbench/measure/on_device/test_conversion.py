"""Arm `converted`: it loses what the theory says, serves what it was converted to, and is PEFT's own conversion."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from perfbench.errors import AdapterError
from perfbench.measure import inputs
from perfbench.measure.on_device import arms, conversion
from perfbench.measure.on_device.conversion import as_lora, nearest_pair
from perfbench.methods import parameters
from perfbench.methods.converted import ConvertedOptions
from perfbench.methods.plan import AdapterPlan
from perfbench.methods.registry import METHODS
from perfbench.methods.road import RoadOptions
from perfbench.methods.shape import MODULE_PATHS
from perfbench.proof import check
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch
from perfbench.spec import cases, scenario
from perfbench.spec.cases import Case

RESIDENT, SEED = 3, 5


@pytest.fixture(scope="module")
def base() -> backbone.Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


def batch(beams: int = 1) -> Batch:
    ids = torch.randint(3, 256, (4, 6), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return Batch(ids * mask, mask, (2, 0, -1, 1), beams, new_tokens=4)


def source(base: backbone.Backbone, method: str, options: Any = None, **made: Any) -> AdapterPlan:
    options = options or METHODS[method].options()
    values = parameters.make(method, base.shape, options, seed=1, input_rms=base.input_rms, **made)
    plan: AdapterPlan = parameters.implementation(method).plan(values, base.shape, options)
    return plan


def lost(base: backbone.Backbone, plan: AdapterPlan, of: str, rank: int) -> dict[str, Any]:
    values = as_lora(plan, base, rank)
    own = parameters.implementation("converted").plan(values, base.shape, ConvertedOptions(of=of, rank=rank))
    return conversion.loss(base, batch(), lambda slot: plan, lambda slot: own)


def case_of(runtime: str = "static", **options: Any) -> Case:
    return Case("c", "converted", "converted", ConvertedOptions(**options), runtime, "eager")


@pytest.mark.parametrize(("method", "rank"), [("lora", 4), ("fanlora", 12), ("miss", 8)])
def test_a_method_of_that_rank_loses_nothing(base: backbone.Backbone, method: str, rank: int) -> None:
    found = lost(base, source(base, method), method, rank)
    assert max(found["conversion_errors"].values()) < 1e-4
    assert found["conversion_logit_distance"] < 1e-4


def test_of_a_lower_rank_the_tail_of_the_singular_values_is_lost(base: backbone.Backbone) -> None:
    plan = source(base, "lora")
    found = lost(base, plan, "lora", 2)["conversion_errors"]
    for index, layer in enumerate(plan):
        for module, pair in layer.low_rank.items():
            values = torch.linalg.svdvals(pair.b.T @ pair.a)
            tail = values[2:].norm() / values.norm()
            assert found[f"layers.{index}.{module}"] == pytest.approx(tail.item(), rel=1e-3)


@pytest.mark.parametrize("method", ["road", "ia3", "ia3-original", "vera"])
def test_a_higher_rank_loses_less(base: backbone.Backbone, method: str) -> None:
    plan = source(base, method)
    found = [lost(base, plan, method, rank) for rank in (2, 8, 24)]
    errors, distances = ([one[name] for one in found] for name in ("conversion_error", "conversion_logit_distance"))
    assert errors == sorted(errors, reverse=True)
    assert 1 > errors[0] > 2 * errors[-1]
    assert distances[0] > distances[-1]


def test_what_changes_nothing_loses_nothing(base: backbone.Backbone) -> None:
    found = lost(base, source(base, "road", initial=True), "road", 4)
    assert (found["conversion_error"], found["conversion_logit_distance"]) == (0, 0)


@pytest.mark.parametrize("rank", [4, 64])
def test_the_randomised_decomposition_is_within_a_hundredth_of_the_exact_one(rank: int) -> None:
    """Of a change like RoAd's or (IA)3's, whose singular values fall slowly, the worst that there is."""
    draw = torch.Generator().manual_seed(3)
    weight, scale = torch.randn(512, 768, generator=draw) * 0.02, torch.randn(512, 1, generator=draw) * 0.25
    state = torch.random.get_rng_state()
    a, b = nearest_pair(weight * scale, rank)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (a.shape, b.shape) == ((rank, 768), (512, rank))
    exact = torch.linalg.svdvals(weight * scale)[rank:].norm()
    assert 1 <= (b @ a - weight * scale).norm() / exact < 1.01
    assert all(map(torch.equal, nearest_pair(weight * scale, rank), (a, b)))


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA that is already:UserWarning")
@pytest.mark.parametrize(("method", "options", "rank"), [("lora", {}, 2), ("miss", {}, 8), ("vera", {"rank": 16}, 8)])
def test_peft_converts_to_the_same(
    base: backbone.Backbone, method: str, options: dict[str, Any], rank: int, tmp_path: Path
) -> None:
    """Those methods that PEFT converts, MiSS to its own rank alone; it refuses RoAd and (IA)3."""
    told, module = METHODS[method].options(**options), parameters.implementation(method)
    values = parameters.make(method, base.shape, told, seed=1, input_rms=base.input_rms)
    module.save(values, base.shape, told, tmp_path, base.name)
    model = peft.PeftModel.from_pretrained(base.skeleton(), str(tmp_path))
    _, theirs = peft.convert_to_lora(model, rank=rank)
    ours = as_lora(module.plan(values, base.shape, told), base, rank)
    assert len(ours) == len(theirs)
    for name, path in ((name, re.sub(r"\.a$", "", name)) for name in ours if name.endswith(".a")):
        _, index, linear = path.split(".")
        place = f"base_model.model.model.layers.{index}.{MODULE_PATHS[linear]}"
        expected = theirs[f"{place}.lora_B.weight"] @ theirs[f"{place}.lora_A.weight"]
        found = ours[f"{path}.b"] @ ours[name]
        assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("runtime", ["transformers", "static", "continuous"])
@pytest.mark.parametrize("of", ["road", "ia3-original"])
def test_each_request_gets_its_own_tenant_s_conversion(
    base: backbone.Backbone, of: str, runtime: str, tmp_path: Path
) -> None:
    built = arms.build(case_of(runtime, of=of, rank=8), base, batch(), RESIDENT, SEED, tmp_path)
    assert built.plan_of is not None
    found = check.check(built.arm, batch(), RESIDENT, base, SEED, built.plan_of)
    assert (found.status, found.reason, found.tokens_equal) == ("ok", None, True)
    plan_of: Callable[[int], AdapterPlan] = built.plan_of
    wrong = check.check(built.arm, batch(), RESIDENT, base, SEED, lambda slot: plan_of((slot + 1) % RESIDENT))
    assert wrong.status == "check_failed", "another tenant's conversion"
    before = arms.build(
        Case("c", of, of, METHODS[of].options(), runtime, "eager"), base, batch(), RESIDENT, SEED, tmp_path
    )
    unconverted = check.check(built.arm, batch(), RESIDENT, base, SEED, before.plan_of)
    assert unconverted.status == "check_failed", "the adapter that it was converted from"


def test_beams_get_their_conversion(base: backbone.Backbone, tmp_path: Path) -> None:
    built = arms.build(case_of(of="miss", rank=8), base, batch(beams=3), RESIDENT, SEED, tmp_path)
    found = check.check(built.arm, batch(beams=3), RESIDENT, base, SEED, built.plan_of)
    assert (found.status, found.reason) == ("ok", None)


def test_trained_adapters_are_converted_from_their_folders(base: backbone.Backbone, tmp_path: Path) -> None:
    """The same adapters, random or read, become the same; of folders the rotated modules are their own."""
    told = RoadOptions(modules=("q", "up"))
    for tenant in range(RESIDENT):
        values = parameters.make("road", base.shape, told, seed=tenant)
        parameters.implementation("road").save(values, base.shape, told, tmp_path / f"t{tenant}", base.name)
    case = case_of(of="road", rank=4, adapters=str(tmp_path))
    built = arms.build(case, base, batch(), RESIDENT, SEED, tmp_path / "scratch")
    assert built.plan_of is not None
    for tenant in range(RESIDENT):
        plan = parameters.implementation("road").plan(
            parameters.make("road", base.shape, told, seed=tenant), base.shape, told
        )
        expected = as_lora(plan, base, 4)
        found = [tensor for layer in built.plan_of(tenant) for tensor in layer.tensors()]
        assert all(torch.equal(own, other.T if name.endswith(".b") else other)
                   for own, (name, other) in zip(found, expected.items(), strict=True))  # fmt: skip
    numbers = sum(tensor.numel() for tensor in expected.values())
    assert built.adapters["parameters_per_tenant"] == parameters.parameter_count("road", base.shape, told)
    assert built.adapters["bytes_per_tenant"] == built.adapters["resident_bytes_per_tenant"] == 4 * numbers
    assert set(built.adapters["conversion_errors"]) == {name[:-2] for name in expected}
    found = check.check(built.arm, batch(), RESIDENT, base, SEED, built.plan_of)
    assert (found.status, found.reason) == ("ok", None)


def test_folders_are_read_as_the_converted_method_s(base: backbone.Backbone, tmp_path: Path) -> None:
    for tenant in range(2):
        values = parameters.make("road", base.shape, RoadOptions(), seed=tenant)
        parameters.implementation("road").save(values, base.shape, RoadOptions(), tmp_path / f"t{tenant}", base.name)
    path = tmp_path / "s.yaml"
    for of in ("road", "vera"):
        path.write_text(
            "backbone: llama-tiny\ndtype: fp32\ndevice: cpu\n"
            f"methods: [converted: {{of: {of}, adapters: {tmp_path}}}]\n"
            "workload: {prompt_tokens: 6, new_tokens: 3, requests: 2, tenants: 2}\n",
            encoding="utf-8",
        )
        comparisons = cases.expand(scenario.resolve(scenario.load(path, []), "cpu", "given"))
        if of == "road":
            assert inputs.check(comparisons) == []
        else:
            with pytest.raises(AdapterError, match=r"t0.*peft_type.*ROAD"):
                inputs.check(comparisons)


def test_what_can_t_be_converted_is_refused_in_a_line(base: backbone.Backbone) -> None:
    with pytest.raises(AdapterError, match="scales that are made from the prompt can't be merged"):
        as_lora(source(base, "para"), base, 4)
    with pytest.raises(AdapterError, match="rank 1000: expected at most 64, the smaller side of q's weight"):
        as_lora(source(base, "road"), base, 1000)


@pytest.mark.parametrize("case", [case_of(), Case("c", "road", "road", METHODS["road"].options(), "static", "eager")])
def test_the_loss_is_a_figure_of_converted_arms_alone(base: backbone.Backbone, case: Case, tmp_path: Path) -> None:
    figures = arms.build(case, base, batch(), RESIDENT, SEED, tmp_path).adapters
    assert ("conversion_error" in figures) == ("conversion_logit_distance" in figures) == (case.method == "converted")
