"""The bank: admission without allocation, refusals that change nothing, unlike adapters side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from perfbench.errors import AdapterError
from perfbench.measure.on_device.arms import PLAN_ARMS
from perfbench.methods import parameters
from perfbench.methods.bank import Bank, union_layout
from perfbench.methods.fanlora import FanLoraOptions
from perfbench.methods.lora import LoraOptions
from perfbench.methods.para import ParaOptions
from perfbench.methods.plan import AdapterPlan, plan_bytes
from perfbench.methods.registry import METHODS
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch

SERVED = tuple(name for name, method in METHODS.items() if method.served_by == "plan" and name != "none")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tiny() -> backbone.Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


def make_plan(tiny: backbone.Backbone, method: str, options: Any, seed: int) -> AdapterPlan:
    values = parameters.make(method, tiny.shape, options, seed=seed)
    return parameters.implementation(method).plan(values, tiny.shape, options)


def make_bank(tiny: backbone.Backbone, plans: Sequence[AdapterPlan], capacity: int) -> Bank:
    return Bank(union_layout(plans), capacity, tiny.dtype, tiny.device, tiny.linear)


def logits(
    tiny: backbone.Backbone, bank: Bank | None, slots: tuple[int, ...], runtime: str = "transformers"
) -> torch.Tensor:
    """[Q, N, V] of the same prompt for every slot, in one batch."""
    ids = torch.arange(3, 12).repeat(len(slots), 1)
    forced = torch.arange(20, 23).repeat(len(slots), 1)
    batch = Batch(ids, torch.ones_like(ids), slots, beams=1, new_tokens=3)
    return PLAN_ARMS[runtime](tiny, bank, "eager").generate(batch, forced=forced, with_logits=True).logits


def contents(bank: Bank) -> list[torch.Tensor]:
    return [t.clone() for layer in bank.layers for t in layer.tensors()]


def same(before: list[torch.Tensor], bank: Bank) -> bool:
    return all(torch.equal(old, new) for old, new in zip(before, contents(bank), strict=True))


@pytest.mark.parametrize("method", SERVED)
def test_tenants_come_and_go_in_the_same_storage(tiny: backbone.Backbone, method: str) -> None:
    plans = [make_plan(tiny, method, METHODS[method].options(), seed) for seed in range(3)]
    bank = make_bank(tiny, plans, capacity=2)
    places = [t.data_ptr() for layer in bank.layers for t in layer.tensors()]
    assert bank.bytes_per_slot == plan_bytes(plans[0], tiny.dtype)
    assert [bank.admit(plan) for plan in plans[:2]] == [0, 1]
    first = logits(tiny, bank, (0, 1))
    bank.evict(0)
    assert bank.admit(plans[2]) == 0
    second = logits(tiny, bank, (0, 1))
    assert [t.data_ptr() for layer in bank.layers for t in layer.tensors()] == places
    assert not torch.allclose(first[0], second[0])
    assert torch.equal(first[1], second[1])
    bank.evict(0)
    bank.admit(plans[0])
    assert torch.equal(logits(tiny, bank, (0, 1)), first)


def test_a_full_bank_refuses_and_keeps_its_tenants(tiny: backbone.Backbone) -> None:
    plan = make_plan(tiny, "lora", LoraOptions(), 1)
    bank = make_bank(tiny, [plan], capacity=1)
    bank.admit(plan)
    before = contents(bank)
    with pytest.raises(AdapterError, match="the bank is full: all 1 slots are taken"):
        bank.admit(make_plan(tiny, "lora", LoraOptions(), 2))
    assert same(before, bank)


def too_wide(tiny: backbone.Backbone) -> AdapterPlan:
    # The first layer fits and only a later one does not: nothing of the first may have been written.
    small, large = (make_plan(tiny, "lora", LoraOptions(rank=rank), 3) for rank in (2, 3))
    return (*small[:-1], large[-1])


UNFIT = {
    "rank": (too_wide, r"layer 2: expected at most \[2, 64\], got \[3, 64\]"),
    "module": (
        lambda t: make_plan(t, "lora", LoraOptions(rank=1, modules=("q", "o")), 1),
        "without a low-rank pair on o",
    ),
    "scale": (lambda t: make_plan(t, "ia3", METHODS["ia3"].options(), 1), "without a scale on q"),
    "generator": (lambda t: make_plan(t, "para", ParaOptions(), 1), "another generator"),
    "depth": (lambda t: make_plan(t, "lora", LoraOptions(rank=1, modules=("q", "v")), 1)[:2], "3 layers, got 2"),
}


@pytest.mark.parametrize("fault", UNFIT)
def test_a_plan_that_does_not_fit_changes_nothing(tiny: backbone.Backbone, fault: str) -> None:
    unfit, message = UNFIT[fault]
    modules = ("q", "k", "v", "o", "gate", "up", "down") if fault == "rank" else ("q", "v")
    fit = make_plan(tiny, "lora", LoraOptions(rank=2, modules=modules), 1)
    bank = make_bank(tiny, [fit], capacity=2)
    bank.admit(fit)
    before, free = contents(bank), list(bank.free)
    with pytest.raises(AdapterError, match=message):
        bank.admit(unfit(tiny))
    assert same(before, bank)
    assert bank.free == free


def test_a_bias_without_a_pair_is_refused(tiny: backbone.Backbone) -> None:
    plan = make_plan(tiny, "lora", LoraOptions(rank=2, lora_bias=True), 1)
    alone = tuple(replace(layer, low_rank={}) for layer in plan)
    with pytest.raises(ValueError, match="a bias is added together with a low-rank pair"):
        make_bank(tiny, [alone], capacity=1)


MIXED = {
    "ranks": [("lora", LoraOptions(rank=rank)) for rank in (1, 5, 3)],
    "modules": [("lora", LoraOptions(modules=m)) for m in (("q",), ("v", "down"), ("gate", "up", "o"))],
    "settings": [
        ("fanlora", FanLoraOptions()),
        ("fanlora", FanLoraOptions(rank=3, setting=(("q",), (), ("gate", "down")))),
        ("fanlora", FanLoraOptions(rank=2, setting=((), ("k", "o"), ()))),
    ],
    "magnitudes": [
        ("dora", METHODS["dora"].options(rank=3, modules=("q", "down"))),
        ("lora", LoraOptions(rank=2, modules=("q", "gate"))),
        ("ia3", METHODS["ia3"].options()),
    ],
    "biases": [
        ("lora", LoraOptions(rank=3, modules=("q", "v", "down"), lora_bias=True)),
        ("lora", LoraOptions(rank=2, modules=("q", "gate"))),
        ("ia3", METHODS["ia3"].options()),
    ],
    "generators": [("para", ParaOptions(rank=rank)) for rank in (2, 7, 4)],
    # Scales on the same outputs, stored for one tenant and generated for another, beside low-rank pairs.
    "scales": [("ia3", METHODS["ia3"].options()), ("para", ParaOptions()), ("lora", LoraOptions())],
    "rotations": [
        ("road", METHODS["road"].options(group_size=4, modules=("q", "v", "down"))),
        ("road", METHODS["road"].options(variant="road_4")),
        ("ia3", METHODS["ia3"].options()),
        ("lora", LoraOptions()),
    ],
    "grouped-sums": [
        ("miss", METHODS["miss"].options(rank=4, modules=("q", "v", "down"))),
        ("miss", METHODS["miss"].options(rank=6)),
        ("lora", LoraOptions(rank=3, modules=("k", "v", "gate"))),
    ],
    "shared-pairs": [
        ("vera", METHODS["vera"].options(rank=16)),
        ("lora", LoraOptions(rank=3, modules=("k", "v", "gate"))),
        ("miss", METHODS["miss"].options()),
    ],
    "other-scales": [
        ("para", ParaOptions()),
        ("ia3-original", METHODS["ia3-original"].options()),
        ("fanlora", FanLoraOptions()),
    ],
}


@pytest.mark.parametrize("runtime", PLAN_ARMS)
@pytest.mark.parametrize("mix", MIXED)
def test_unlike_adapters_in_one_bank_are_what_each_is_alone(tiny: backbone.Backbone, mix: str, runtime: str) -> None:
    plans = [make_plan(tiny, method, options, seed) for seed, (method, options) in enumerate(MIXED[mix])]
    bank = make_bank(tiny, plans, capacity=4)
    for other in (2, 0, 1):
        # Through slots that held another adapter before: what it left behind must not show.
        bank.admit(plans[other])
    for slot in (0, 1, 2):
        bank.evict(slot)
    slots = [bank.admit(plan) for plan in plans]
    together = logits(tiny, bank, (*slots, -1), runtime)
    for plan, found in zip(plans, together, strict=False):
        own = make_bank(tiny, [plan], capacity=1)
        own.admit(plan)
        alone = logits(tiny, own, (0,))[0]
        assert float((found - alone).norm() / alone.norm()) < TOLERANCE
        assert float((found - together[-1]).norm() / alone.norm()) > 100 * TOLERANCE


@pytest.mark.parametrize("method", SERVED)
def test_no_adapter_and_an_evicted_one_are_the_bare_backbone(tiny: backbone.Backbone, method: str) -> None:
    plan = make_plan(tiny, method, METHODS[method].options(), 1)
    bank = make_bank(tiny, [plan], capacity=2)
    bank.admit(plan)
    stale = bank.admit(plan)
    bare = logits(tiny, None, (-1, -1, -1))
    assert not torch.equal(logits(tiny, bank, (0, -1, stale))[2], bare[2])
    bank.evict(stale)
    found = logits(tiny, bank, (0, -1, stale))
    assert not torch.equal(found[0], bare[0])
    assert torch.equal(found[1:], bare[1:])
    assert torch.equal(logits(tiny, bank, (-1, -1, -1)), bare)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_an_adapter_that_only_fp16_can_not_hold_is_refused_there(tiny: backbone.Backbone, dtype: str) -> None:
    """Served, its infinities would make every logit NaN; nothing of it stays behind."""
    plan = make_plan(tiny, "lora", LoraOptions(modules=("q",)), 1)
    plan[1].low_rank["q"].a[0, 0] = 70000.0
    bank = Bank(union_layout([plan]), 1, {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype], "cpu")
    if dtype == "bf16":
        assert bank.admit(plan) == 0
        return
    with pytest.raises(AdapterError, match=r"layer 1: a number of the adapter is 7e\+04, more than float16 holds"):
        bank.admit(plan)
    assert bank.free == [0]
    assert not bank.shrinks.any()


def test_a_magnitude_needs_a_linear_and_one_without_a_bias(tiny: backbone.Backbone) -> None:
    """DoRA leaves the bias as it is, which a scale of the output would not."""
    plan = make_plan(tiny, "dora", METHODS["dora"].options(rank=2), 1)
    with pytest.raises(ValueError, match="made with the backbone's linears"):
        Bank(union_layout([plan]), 1, tiny.dtype, "cpu").admit(plan)
    bank = Bank(
        union_layout([plan]), 1, tiny.dtype, "cpu", lambda _, module: torch.nn.Linear(*tiny.shape.features(module))
    )
    with pytest.raises(AdapterError, match="layer 0: q: DoRA scales no bias, and this backbone's has one"):
        bank.admit(plan)
    assert bank.free == [0]


def test_slots_out_of_range_are_refused(tiny: backbone.Backbone) -> None:
    plan = make_plan(tiny, "lora", LoraOptions(), 1)
    bank = make_bank(tiny, [plan], capacity=2)
    bank.admit(plan)
    for slot in (-2, 2):
        with pytest.raises(ValueError, match=rf"slot {slot}: expected -1 \(no adapter\) to 1"):
            bank.rows([0, slot])
    for slot in (-1, 1, 2):
        with pytest.raises(ValueError, match=f"slot {slot} holds no adapter"):
            bank.evict(slot)


def test_ranks_of_grouped_sums_without_a_small_common_multiple_can_not_share_a_bank(tiny: backbone.Backbone) -> None:
    plans = [make_plan(tiny, "miss", METHODS["miss"].options(rank=rank, modules=("q",)), 1) for rank in (37, 41)]
    with pytest.raises(AdapterError, match="a common multiple of at most 1024 of their grouped sums, got 37, 41"):
        union_layout(plans)
    bank = make_bank(tiny, plans[:1], capacity=1)
    with pytest.raises(AdapterError, match="layer 0: the bank was laid out for ranks that divide 37, got 41"):
        bank.admit(plans[1])


def test_generators_that_pool_unlike_can_not_share_a_bank(tiny: backbone.Backbone) -> None:
    plans = [make_plan(tiny, "para", ParaOptions(pool=pool), 1) for pool in ("residual", "normalised")]
    with pytest.raises(AdapterError, match="must share their generator's modules and pooling"):
        union_layout(plans)
