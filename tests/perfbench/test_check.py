"""The equality check: passes for every honest arm, and fails for the faults that it is there to find."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perfbench import backbone, check
from perfbench.methods import parameters
from perfbench.methods.bank import Bank
from perfbench.methods.registry import METHODS
from perfbench.runtimes.generation import Arm, Batch, Generation
from perfbench.runtimes.peft_arms import PeftMixedArm
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.static.decoder import Decoder
from perfbench.runtimes.transformers_plan import PlanArm
from perfbench.workload import shift_slots

SERVED = tuple(name for name, method in METHODS.items() if method.served_by == "plan" and name != "none")
RESIDENT = 4
# On three layers of random weights the scales of Q and K hardly show: as drawn, (IA)3 in bf16 is void there.
STRENGTHS = {("ia3", "bf16"): 6.0}
BACKBONES = dict.fromkeys(("fp32", "bf16"), "llama-tiny")


@pytest.fixture(scope="module")
def backbones() -> dict[str, backbone.Backbone]:
    return {dtype: backbone.load(name, dtype, "cpu", seed=0) for dtype, name in BACKBONES.items()}


def make_batch(beams: int = 1) -> Batch:
    ids = torch.randint(3, 256, (5, 6), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[3, :2] = 0
    return Batch(ids * mask, mask, (2, 0, -1, 3, 0), beams, new_tokens=4)


def make_arm(base: backbone.Backbone, method: str, strength: float = 1.0) -> PlanArm:
    options = METHODS[method].options()
    module = parameters.implementation(method)
    bank = Bank(parameters.meta_plan(method, base.shape, options), RESIDENT, base.dtype, base.device)
    for seed in range(RESIDENT):
        bank.admit(module.plan(parameters.make(method, base.shape, options, seed=seed), base.shape, options))
    for layer in bank.layers:
        for tensor in layer.tensors():
            tensor.mul_(strength)
    return PlanArm(base, bank, "eager")


def run(arm: Arm, base: backbone.Backbone, batch: Batch | None = None, *, has_adapters: bool = True) -> check.Check:
    return check.check(arm, batch or make_batch(), RESIDENT, base.dtype, seed=1, has_adapters=has_adapters)


@pytest.mark.parametrize("dtype", BACKBONES)
@pytest.mark.parametrize("method", SERVED)
def test_every_served_method_passes(backbones: dict[str, backbone.Backbone], method: str, dtype: str) -> None:
    found = run(make_arm(backbones[dtype], method, STRENGTHS.get((method, dtype), 1.0)), backbones[dtype])
    assert (found.status, found.reason) == ("ok", None), found
    assert found.tokens_equal is (True if dtype == "fp32" else None)
    assert found.requests == 5


@pytest.mark.parametrize("method", ["lora", "para"])
def test_beams_pass(backbones: dict[str, backbone.Backbone], method: str) -> None:
    assert run(make_arm(backbones["fp32"], method), backbones["fp32"], make_batch(beams=3)).status == "ok"


def test_the_bare_backbone_passes_without_a_shift(backbones: dict[str, backbone.Backbone]) -> None:
    base = backbones["fp32"]
    found = run(PlanArm(base, None, "eager"), base, has_adapters=False)
    assert found.status == "ok"
    assert found.shifted_relative_difference is None


def test_peft_s_mixed_batch_passes(backbones: dict[str, backbone.Backbone], tmp_path: Path) -> None:
    base, options = backbones["fp32"], METHODS["peft"].options()
    folders = [tmp_path / str(seed) for seed in range(RESIDENT)]
    for seed, folder in enumerate(folders):
        values = parameters.make("peft", base.shape, options, seed=seed)
        parameters.implementation("peft").save(values, base.shape, options, folder, base.name)
    assert run(PeftMixedArm(base, folders), base).status == "ok"


class Faulty:
    """An honest arm whose real generate call is given a fault."""

    def __init__(self, arm: PlanArm):
        self.arm, self.model = arm, arm.model

    def close(self) -> None:
        self.arm.close()


class ShiftsMixedBatches(Faulty):
    def generate(self, batch: Batch, **observers: Any) -> Generation:
        if len(set(batch.slots)) > 1:
            batch = replace(batch, slots=shift_slots(batch.slots, RESIDENT))
        return self.arm.generate(batch, **observers)


class LeaksOneRequest(Faulty):
    """Only the last request of a batch gets its neighbour's adapter."""

    def generate(self, batch: Batch, **observers: Any) -> Generation:
        if len(batch.slots) > 1:
            batch = replace(batch, slots=(*batch.slots[:-1], batch.slots[-2]))
        return self.arm.generate(batch, **observers)


class NotANumber(Faulty):
    def generate(self, batch: Batch, **observers: Any) -> Generation:
        found = self.arm.generate(batch, **observers)
        if found.logits is not None and len(batch.slots) > 1:
            found.logits[:, -1, 0] = float("nan")
        return found


@pytest.mark.parametrize("dtype", BACKBONES)
@pytest.mark.parametrize("method", SERVED)
@pytest.mark.parametrize("fault", [ShiftsMixedBatches, LeaksOneRequest])
def test_wrong_slots_fail(
    backbones: dict[str, backbone.Backbone], method: str, dtype: str, fault: type[Any]
) -> None:
    found = run(fault(make_arm(backbones[dtype], method)), backbones[dtype])
    assert found.status == "check_failed"
    assert found.relative_difference > found.tolerance
    assert found.to_json()["passed"] is False


def test_logits_that_are_not_numbers_fail_and_can_be_written(backbones: dict[str, backbone.Backbone]) -> None:
    found = run(NotANumber(make_arm(backbones["fp32"], "lora")), backbones["fp32"])
    assert found.status == "check_failed"
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert written["relative_difference"] is None
    assert written["passed"] is False


@pytest.mark.parametrize("method", SERVED)
def test_adapters_too_weak_to_tell_apart_are_void(backbones: dict[str, backbone.Backbone], method: str) -> None:
    found = run(make_arm(backbones["fp32"], method, strength=1e-6), backbones["fp32"])
    assert found.status == "check_void"
    assert "too weak" in (found.reason or "")
    assert found.to_json()["passed"] is False


def test_prompt_vectors_of_the_wrong_request_fail(backbones: dict[str, backbone.Backbone]) -> None:
    arm = make_arm(backbones["fp32"], "para")
    for vectors in arm._vectors.values():
        own = vectors._generate
        vectors._generate = lambda *inputs, own=own: own(*inputs).roll(1, 0)
    assert run(arm, backbones["fp32"]).status == "check_failed"


def test_prompt_vectors_pooled_at_the_wrong_token_fail(backbones: dict[str, backbone.Backbone]) -> None:
    """As under right padding taken for left: the last column instead of the last prompt token, in batches only."""
    arm = make_arm(backbones["fp32"], "para")
    bind = arm._bind

    def first_column(batch: Batch) -> None:
        bind(batch)
        if len(batch.slots) > 1:
            for vectors in arm._vectors.values():
                vectors.last_prompt_token = torch.zeros_like(vectors.last_prompt_token)

    arm._bind = first_column  # type: ignore[method-assign]
    assert run(arm, backbones["fp32"]).status == "check_failed"


def test_a_tie_is_told_from_a_difference(backbones: dict[str, backbone.Backbone]) -> None:
    found = make_arm(backbones["fp32"], "lora").generate(make_batch().alone(0), with_logits=True)
    own, logits = found.tokens[0], found.logits[0]
    assert torch.equal(own, logits.argmax(-1))
    other = own.clone()
    other[1] = logits[1].argsort()[-2]
    gap = float(logits[1].sort().values[-1] - logits[1].sort().values[-2]) / float(logits[1].std())
    assert not check.is_greedy_tie(logits, own, other, tolerance=0.9 * gap)
    assert check.is_greedy_tie(logits, own, other, tolerance=1.1 * gap)


def test_a_tie_of_beams_is_told_from_a_difference(backbones: dict[str, backbone.Backbone]) -> None:
    arm, alone = make_arm(backbones["fp32"], "lora"), make_batch(beams=3).alone(0)
    own = arm.generate(alone).tokens[0]
    other = own.flip(0) if not torch.equal(own, own.flip(0)) else own + 1
    paths = [check.forced_logits(arm, alone, path.unsqueeze(0))[0] for path in (other, own)]
    scores = [
        sum(float(step.log_softmax(-1)[token]) for step, token in zip(logits, path, strict=True))
        for logits, path in zip(paths, (other, own), strict=True)
    ]
    gap = abs(scores[0] - scores[1]) / abs(scores[0])
    assert not check.is_beam_tie(*paths, own, other, tolerance=0.9 * gap)
    assert check.is_beam_tie(*paths, own, other, tolerance=1.1 * gap)


class AnotherToken(Faulty):
    """Logits as they should be, but the batch is given another token than its logits say."""

    def generate(self, batch: Batch, **observers: Any) -> Generation:
        found = self.arm.generate(batch, **observers)
        if len(batch.slots) > 1 and "forced" not in observers:
            tokens = found.tokens.clone()
            tokens[-1, -1] = (tokens[-1, -1] + 1) % 256
            found = replace(found, tokens=tokens)
        return found


@pytest.mark.parametrize("beams", [1, 3])
def test_a_token_that_is_not_the_best_choice_fails(backbones: dict[str, backbone.Backbone], beams: int) -> None:
    found = run(AnotherToken(make_arm(backbones["fp32"], "lora")), backbones["fp32"], make_batch(beams))
    assert found.status == "check_failed"
    assert "request(s) 4: other tokens" in (found.reason or "")
    assert found.tokens_equal is False


@pytest.mark.parametrize(
    ("worst", "shifted", "parted", "status"),
    [
        (1e-5, 1.0, [], "ok"),
        (1e-5, None, [], "ok"),
        (2e-4, 1.0, [], "check_failed"),
        (float("nan"), 1.0, [], "check_failed"),
        (1e-5, 1.0, [3], "check_failed"),
        (1e-5, 9e-4, [], "check_void"),
        (1e-5, float("nan"), [], "check_void"),
    ],
)
def test_the_verdict(worst: float, shifted: float | None, parted: list[int], status: str) -> None:
    found, reason = check.verdict(worst, 1e-4, shifted, parted)
    assert found == status
    assert (reason is None) == (status == "ok")


def test_a_second_turn_on_a_cache_that_is_not_the_first_s_fails(
    backbones: dict[str, backbone.Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of the first turn, with the keys of its last token gone, as a place counted one too far would be."""
    base = backbones["fp32"]
    plan = make_arm(base, "lora")
    arm = StaticArm(base, plan.bank, "eager")
    batch = replace(make_batch(), follow_up=torch.full((5, 3), 9))
    found = check.check(arm, batch, RESIDENT, base.dtype, seed=1, has_adapters=True)
    assert found.status == "ok", found
    own = Decoder.prefill_follow_up

    def forgetful(self: Decoder, generated: torch.Tensor) -> torch.Tensor:
        for entry in self.cache.prompt:
            entry[:, 0, :, self.cache.size.prompt_tokens + self.cache.size.new_tokens - 2] = 0
        return own(self, generated)

    monkeypatch.setattr(Decoder, "prefill_follow_up", forgetful)
    assert check.check(arm, batch, RESIDENT, base.dtype, seed=1, has_adapters=True).status == "check_failed"
