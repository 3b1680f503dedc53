"""What the oracle has answered is not asked again, and is an answer to nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from perfbench.methods import parameters
from perfbench.methods.bank import Bank
from perfbench.methods.plan import AdapterPlan
from perfbench.methods.registry import METHODS
from perfbench.proof import check, oracle
from perfbench.proof.answers import Kept, Oracle
from perfbench.runtimes import backbone
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.transformers_plan import PlanArm

RESIDENT = 3


@pytest.fixture(scope="module")
def base() -> Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences the oracle was asked about, call by call."""
    found: list[int] = []
    logits = oracle.logits

    def counting(base: Backbone, sequences: list[oracle.Served], dtype: torch.dtype) -> list[torch.Tensor]:
        found.append(len(sequences))
        return logits(base, sequences, dtype)

    monkeypatch.setattr(oracle, "logits", counting)
    return found


def plan_of(base: Backbone, method: str, slot: int, seed: int = 0) -> AdapterPlan:
    options = METHODS[method].options()
    values = parameters.make(
        method, base.shape, options, seed=seed + slot, input_rms=base.input_rms, device=base.device
    )
    plan: AdapterPlan = parameters.implementation(method).plan(values, base.shape, options)
    return plan


def batch_of(beams: int = 1) -> Batch:
    ids = torch.randint(5, 200, (4, 7), generator=torch.Generator().manual_seed(1))
    return Batch(ids, torch.ones_like(ids), slots=(0, 1, 2, -1), beams=beams, new_tokens=5)


def checked(
    base: Backbone, runtime: type, method: str, ask: Oracle, beams: int = 1, wrong_seed: int = 0
) -> check.Check:
    plans = [plan_of(base, method, slot, wrong_seed) for slot in range(RESIDENT)]
    bank = Bank(
        parameters.meta_plan(method, base.shape, METHODS[method].options()),
        RESIDENT,
        base.dtype,
        base.device,
        base.linear,
    )
    for plan in plans:
        bank.admit(plan)
    arm = runtime(base, bank, "eager")
    batch = batch_of(beams)
    if isinstance(arm, StaticArm):
        arm.reserve(batch)
    try:
        return check.check(arm, batch, RESIDENT, base, 1, partial(plan_of, base, method), ask)
    finally:
        arm.close()


@pytest.mark.parametrize("beams", [1, 2])
def test_a_second_runtime_asks_nothing_anew(base: Backbone, asked: list[int], beams: int) -> None:
    ask = Oracle(base, "lora of seed 0", Kept())
    first = checked(base, PlanArm, "lora", ask, beams)
    assert first.status == "ok"
    assert asked
    asked.clear()
    second = checked(base, StaticArm, "lora", ask, beams)
    assert second.status == "ok"
    assert asked == []
    assert (second.noise, second.tolerance) == (first.noise, first.tolerance)


def test_other_adapters_are_asked_about(base: Backbone, asked: list[int]) -> None:
    ask = Oracle(base, "lora of seed 0", Kept())
    checked(base, PlanArm, "lora", ask)
    asked.clear()
    assert checked(base, PlanArm, "ia3", replace(ask, adapters="ia3 of seed 0")).status == "ok"
    assert asked


def test_an_arm_with_wrong_adapters_fails_on_answers_that_are_known(base: Backbone, asked: list[int]) -> None:
    ask = Oracle(base, "lora of seed 0", Kept())
    checked(base, PlanArm, "lora", ask)
    assert checked(base, StaticArm, "lora", ask, wrong_seed=77).status == "check_failed"


def test_the_oldest_answers_are_forgotten_beyond_the_limit() -> None:
    kept, answer = Kept(most_bytes=100), torch.zeros(10)  # 40 bytes each
    for question in "abc":
        kept.put(question, answer)
    assert list(kept.answers) == ["b", "c"]
    assert kept.held_bytes == 80
    assert kept.get("a", torch.device("cpu")) is None
    kept.put("c", answer)
    assert kept.held_bytes == 80, "one question asked twice in one call is kept once"
    kept.put("d", torch.zeros(1000))
    assert kept.answers == {}
    assert kept.held_bytes == 0
