"""The equality check: passes for every honest arm, and fails for the faults that it is there to find."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from perfbench.methods import parameters
from perfbench.methods.bank import Bank
from perfbench.methods.plan import AdapterPlan
from perfbench.methods.registry import METHODS
from perfbench.proof import best_choices, check
from perfbench.proof.check import shift_slots
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch, Generation
from perfbench.runtimes.peft_arms import PeftMixedArm
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.static.decoder import Decoder
from perfbench.runtimes.transformers_plan import PlanArm

SERVED = tuple(name for name, method in METHODS.items() if method.served_by == "plan" and name != "none")
RESIDENT = 4
DTYPES = ("fp32", "bf16")


@pytest.fixture(scope="module")
def backbones() -> dict[str, backbone.Backbone]:
    return {dtype: backbone.load("llama-tiny", dtype, "cpu", seed=0) for dtype in DTYPES}


def make_batch(beams: int = 1) -> Batch:
    ids = torch.randint(3, 256, (5, 6), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[3, :2] = 0
    return Batch(ids * mask, mask, (2, 0, -1, 3, 0), beams, new_tokens=4)


def make_plan(base: backbone.Backbone, method: str, strength: float, slot: int) -> AdapterPlan:
    options, module = METHODS[method].options(), parameters.implementation(method)
    values = parameters.make(method, base.shape, options, seed=slot, input_rms=base.input_rms, linear_of=base.linear)
    return tuple(layer.map(lambda tensor: tensor * strength) for layer in module.plan(values, base.shape, options))


def make_bank(base: backbone.Backbone, method: str, strength: float = 1.0) -> Bank:
    layout = parameters.meta_plan(method, base.shape, METHODS[method].options())
    bank = Bank(layout, RESIDENT, base.dtype, base.device, base.linear)
    for slot in range(RESIDENT):
        bank.admit(make_plan(base, method, strength, slot))
    return bank


def make_arm(base: backbone.Backbone, method: str, strength: float = 1.0) -> PlanArm:
    return PlanArm(base, make_bank(base, method, strength), "eager")


def run(
    arm: Any, base: backbone.Backbone, method: str, batch: Batch | None = None, strength: float = 1.0
) -> check.Check:
    plan_of = None if method == "none" else partial(make_plan, base, method, strength)
    return check.check(arm, batch or make_batch(), RESIDENT, base, seed=1, plan_of=plan_of)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", SERVED)
def test_every_served_method_passes(backbones: dict[str, backbone.Backbone], method: str, dtype: str) -> None:
    found = run(make_arm(backbones[dtype], method), backbones[dtype], method)
    assert (found.status, found.reason) == ("ok", None), found
    assert found.tokens_equal is (True if dtype == "fp32" else None)
    assert found.requests == 5


@pytest.mark.parametrize("method", ["lora", "para"])
def test_beams_pass(backbones: dict[str, backbone.Backbone], method: str) -> None:
    assert run(make_arm(backbones["fp32"], method), backbones["fp32"], method, make_batch(beams=3)).status == "ok"


def test_the_bare_backbone_passes_without_a_shift(backbones: dict[str, backbone.Backbone]) -> None:
    base = backbones["fp32"]
    found = run(PlanArm(base, None, "eager"), base, "none")
    assert found.status == "ok"
    assert (found.wrong_share, found.noise_share, found.shifted_share) == (None, None, None)


def test_peft_s_mixed_batch_passes(backbones: dict[str, backbone.Backbone], tmp_path: Path) -> None:
    base, options = backbones["fp32"], METHODS["peft"].options()
    folders = [tmp_path / str(seed) for seed in range(RESIDENT)]
    for seed, folder in enumerate(folders):
        values = parameters.make("peft", base.shape, options, seed=seed, input_rms=base.input_rms)
        parameters.implementation("peft").save(values, base.shape, options, folder, base.name)
    assert run(PeftMixedArm(base, folders), base, "lora").status == "ok"


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", SERVED)
@pytest.mark.parametrize("fault", [ShiftsMixedBatches, LeaksOneRequest])
def test_wrong_slots_fail(backbones: dict[str, backbone.Backbone], method: str, dtype: str, fault: type[Any]) -> None:
    found = run(fault(make_arm(backbones[dtype], method)), backbones[dtype], method)
    assert found.status == "check_failed"
    assert found.wrong_share is not None
    assert found.wrong_share > check.LARGEST_SHARE
    assert found.to_json()["passed"] is False


def test_logits_that_are_not_numbers_fail_and_can_be_written(backbones: dict[str, backbone.Backbone]) -> None:
    found = run(NotANumber(make_arm(backbones["fp32"], "lora")), backbones["fp32"], "lora")
    assert found.status == "check_failed"
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert written["relative_difference"] is None
    assert written["passed"] is False


@pytest.mark.parametrize("method", SERVED)
def test_adapters_too_weak_to_tell_apart_are_void(backbones: dict[str, backbone.Backbone], method: str) -> None:
    found = run(make_arm(backbones["fp32"], method, 1e-7), backbones["fp32"], method, strength=1e-7)
    assert found.status == "check_void"
    assert "too weak" in (found.reason or "")
    assert found.to_json()["passed"] is False


def test_prompt_vectors_of_the_wrong_request_fail(backbones: dict[str, backbone.Backbone]) -> None:
    arm = make_arm(backbones["fp32"], "para")
    for vectors in arm._vectors.values():
        own = vectors._generate
        vectors._generate = lambda *inputs, own=own: own(*inputs).roll(1, 0)
    assert run(arm, backbones["fp32"], "para").status == "check_failed"


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
    assert run(arm, backbones["fp32"], "para").status == "check_failed"


def test_a_tie_is_told_from_a_difference(backbones: dict[str, backbone.Backbone]) -> None:
    found = make_arm(backbones["fp32"], "lora").generate(make_batch().alone(0), with_logits=True)
    own, logits = found.tokens[0], found.logits[0]
    assert torch.equal(own, logits.argmax(-1))
    other = own.clone()
    other[1] = logits[1].argsort()[-2]
    gap = float(logits[1].sort().values[-1] - logits[1].sort().values[-2]) / float(logits[1].std())
    assert not best_choices.is_greedy_tie(logits, own, other, tolerance=0.9 * gap)
    assert best_choices.is_greedy_tie(logits, own, other, tolerance=1.1 * gap)


def test_a_tie_of_beams_is_told_from_a_difference(backbones: dict[str, backbone.Backbone]) -> None:
    arm, alone = make_arm(backbones["fp32"], "lora"), make_batch(beams=3).alone(0)
    own = arm.generate(alone).tokens[0]
    other = own.flip(0) if not torch.equal(own, own.flip(0)) else own + 1
    paths = [best_choices.forced_logits(arm, alone, path.unsqueeze(0))[0] for path in (other, own)]
    scores = [
        sum(float(step.log_softmax(-1)[token]) for step, token in zip(logits, path, strict=True))
        for logits, path in zip(paths, (other, own), strict=True)
    ]
    gap = abs(scores[0] - scores[1]) / abs(scores[0])
    assert not best_choices.is_beam_tie(*paths, own, other, tolerance=0.9 * gap)
    assert best_choices.is_beam_tie(*paths, own, other, tolerance=1.1 * gap)


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
    found = run(AnotherToken(make_arm(backbones["fp32"], "lora")), backbones["fp32"], "lora", make_batch(beams))
    assert found.status == "check_failed"
    assert "request(s) 4: other tokens" in (found.reason or "")
    assert found.tokens_equal is False


@pytest.mark.parametrize(
    ("worst", "tolerance", "shares", "parted", "status"),
    [
        (1e-5, 1e-4, (0.0, 1e-3, 1.0), [], "ok"),
        (1e-5, 1e-4, (-0.2, 0.1, 0.8), [], "ok"),
        (1e-5, 1e-4, None, [], "ok"),
        (2e-4, 1e-4, (0.0, 1e-3, 1.0), [], "check_failed"),
        (float("nan"), 1e-4, (0.0, 1e-3, 1.0), [], "check_failed"),
        (1e-5, 1e-4, (0.0, 1e-3, 1.0), [3], "check_failed"),
        (1e-5, 1e-4, (0.3, 1e-3, 1.0), [], "check_failed"),
        (1e-5, 1e-4, (float("nan"), 1e-3, 1.0), [], "check_failed"),
        (1e-5, float("nan"), (0.0, 1e-3, 1.0), [], "check_failed"),
        (1e-5, 0.8, (0.0, 1e-3, 1.0), [], "check_void"),
        (1e-5, float("inf"), None, [], "check_void"),
        (1e-5, 1e-4, (0.0, 0.11, 1.0), [], "check_void"),
        (1e-5, 1e-4, (0.0, float("nan"), 1.0), [], "check_void"),
        (1e-5, 1e-4, (0.0, 1e-3, 0.7), [], "check_void"),
        (1e-5, 1e-4, (0.0, 1e-3, float("nan")), [], "check_void"),
    ],
)
def test_the_verdict(
    worst: float, tolerance: float, shares: tuple[float, float, float] | None, parted: list[int], status: str
) -> None:
    named = None if shares is None else check.Shares(*shares)
    found, reason = check.verdict(worst, tolerance / 3, tolerance, named, parted)
    assert found == status
    assert (reason is None) == (status == "ok")


def test_one_request_of_every_tenant_is_sampled() -> None:
    """So that one wrong tenant in 64 is seen, and no run of 64 requests of one tenant costs 64 references."""
    distinct = tuple(range(64))
    assert check.sample(distinct, seed=0) == list(distinct)
    assert len(check.sample((3,) * 64, seed=0)) == check.SAMPLED_REQUESTS
    mixed = (-1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5)
    assert {mixed[i] for i in check.sample(mixed, seed=0)} == {-1, 0, 5}
    assert len(check.sample(tuple(range(200)), seed=0)) == check.MOST_TENANTS


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_tenant_in_64_fails(backbones: dict[str, backbone.Backbone], dtype: str) -> None:
    base = backbones[dtype]
    layout = parameters.meta_plan("lora", base.shape, METHODS["lora"].options())
    bank = Bank(layout, 64, base.dtype, base.device, base.linear)
    for slot in range(64):
        bank.admit(make_plan(base, "lora", 1.0, slot))
    ids = torch.randint(3, 256, (64, 5), generator=torch.Generator().manual_seed(4))
    batch = Batch(ids, torch.ones_like(ids), tuple(range(64)), 1, new_tokens=3)
    plan_of = partial(make_plan, base, "lora", 1.0)
    assert check.check(PlanArm(base, bank, "eager"), batch, 64, base, 1, plan_of).status == "ok"
    bank.evict(41)
    bank.admit(make_plan(base, "lora", 1.0, 42))
    found = check.check(PlanArm(base, bank, "eager"), batch, 64, base, 1, plan_of)
    assert (found.status, found.requests) == ("check_failed", 64)


def test_a_second_turn_on_a_cache_that_is_not_the_first_s_fails(
    backbones: dict[str, backbone.Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of the first turn, with the keys of its last token gone, as a place counted one too far would be."""
    base = backbones["fp32"]
    arm = StaticArm(base, make_bank(base, "lora"), "eager")
    batch = replace(make_batch(), follow_up=torch.full((5, 3), 9))
    found = run(arm, base, "lora", batch)
    assert found.status == "ok", found
    own = Decoder.prefill_follow_up

    def forgetful(self: Decoder, generated: torch.Tensor) -> torch.Tensor:
        for entry in self.cache.prompt:
            entry[:, 0, :, self.cache.size.prompt_tokens + self.cache.size.new_tokens - 2] = 0
        return own(self, generated)

    monkeypatch.setattr(Decoder, "prefill_follow_up", forgetful)
    assert run(arm, base, "lora", batch).status == "check_failed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["whole turn", "decode steps"])
def test_a_second_turn_with_the_next_tenant_s_adapters_fails_in_every_dtype(
    backbones: dict[str, backbone.Backbone], dtype: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bits the second turn's logits are as far off by rounding as by another adapter."""
    base = backbones[dtype]
    arm = StaticArm(base, make_bank(base, "lora"), "eager")
    batch = replace(make_batch(), follow_up=torch.full((5, 3), 9))
    assert run(arm, base, "lora", batch).status == "ok"
    own = Decoder.prefill_follow_up

    def swapped(self: Decoder, generated: torch.Tensor) -> torch.Tensor:
        assert self.adapters is not None
        logits = own(self, generated) if part == "decode steps" else None
        self.adapters.take(shift_slots(self.batch.slots, RESIDENT))
        return own(self, generated) if logits is None else logits

    monkeypatch.setattr(Decoder, "prefill_follow_up", swapped)
    found = run(arm, base, "lora", batch)
    assert found.status == "check_failed", found


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_greedy_token_that_is_far_from_the_best_choice_fails_in_every_dtype(
    backbones: dict[str, backbone.Backbone], dtype: str
) -> None:
    base = backbones[dtype]

    class WorstToken(Faulty):
        """Logits as they should be, but the last request's last token is the worst choice of all."""

        def generate(self, batch: Batch, **observers: Any) -> Generation:
            found = self.arm.generate(batch, **observers)
            if "forced" not in observers and found.logits is not None:
                tokens = found.tokens.clone()
                tokens[-1, -1] = found.logits[-1, -1].argmin()
                found = replace(found, tokens=tokens)
            return found

    found = run(WorstToken(make_arm(base, "lora")), base, "lora")
    assert found.status == "check_failed"
    assert "request(s) 4: other tokens" in (found.reason or "")


def test_what_was_timed_holds_beside_the_oracle_and_a_fault_beside_other_arms_is_told(
    backbones: dict[str, backbone.Backbone],
) -> None:
    base, batch = backbones["fp32"], make_batch()
    plan_of = partial(make_plan, base, "lora", 1.0)
    arm = make_arm(base, "lora")
    timed = arm.generate(batch).tokens
    assert check.as_timed(arm, batch, timed, 3, base, plan_of) is None
    other = timed.clone()
    other[1, 2] = (other[1, 2] + 1) % 256
    assert check.as_timed(arm, batch, other, 3, base, plan_of) == (
        "request(s) 1: other tokens when timed than when checked"
    )
    # The same wrong tokens twice, as where another arm has written over this one's adapters.
    wrong = ShiftsMixedBatches(arm)
    found = check.as_timed(wrong, batch, wrong.generate(batch).tokens, 3, base, plan_of)
    assert (found or "").startswith("request 3: beside the other arms its logits differ by")


def test_shifted_slots_are_all_wrong_and_all_valid() -> None:
    assert shift_slots((0, 3, -1, 2), resident=4) == (1, 0, 0, 3)
    assert shift_slots((0, -1), resident=1) == (-1, 0)
    for resident in (1, 2, 5):
        slots = (-1, *range(resident))
        shifted = shift_slots(slots, resident)
        assert all(old != new for old, new in zip(slots, shifted, strict=True))
        assert set(shifted) <= set(slots)
