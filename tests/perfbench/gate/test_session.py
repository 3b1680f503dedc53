"""The rules of a session, step by step, on pairs made for each of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest

from perfbench.errors import ComparisonError
from perfbench.gate import policy
from perfbench.gate.pairs import ARMS, pair_slowdown
from perfbench.gate.session import Outcome, Slowdowns, run_session

RULES = policy.load(None)


def session(*batches: tuple[float, float] | tuple[float, float, float], pairs: int = 12) -> Outcome:
    """A session whose n-th batch has this slow-down and spread (and shift of the control)."""
    draw = random.Random(1)
    left = list(batches)
    asked: list[tuple[str, int]] = []

    def measure(name: str, count: int) -> Sequence[Slowdowns]:
        asked.append((name, count))
        centre, spread, *control = left.pop(0)
        shift = math.log1p(control[0]) if control else 0.0
        values = [math.log1p(centre) + draw.gauss(0, spread) for _ in range(count)]
        return [{"candidate": [value], "control": [shift + draw.gauss(0, spread)]} for value in values]

    outcome = run_session(measure, RULES, ["all"], pairs)
    assert left == [], f"batches that nobody asked for; asked: {asked}"
    return outcome


def test_no_change_passes_in_one_batch() -> None:
    found = session((0.0, 0.01))
    assert (found.verdict, found.pairs) == ("pass", 12)


def test_a_slowdown_fails_only_once_it_recurs() -> None:
    found = session((0.06, 0.005), (0.06, 0.005))
    assert (found.verdict, found.pairs) == ("regression", 24)
    assert "it recurred in a fresh batch" in found.findings[0].note
    found = session((0.06, 0.005), (0.0, 0.005))
    assert found.verdict == "inconclusive"
    assert "did not in a fresh batch" in found.findings[0].note


def test_what_is_inconclusive_is_doubled_once() -> None:
    found = session((0.03, 0.02), (0.03, 0.02))
    assert (found.verdict, found.pairs) == ("inconclusive", 24)
    assert [step.split(":")[0] for step in found.story] == ["first batch", "doubled"]


def test_a_fresh_batch_is_as_large_as_the_one_that_failed() -> None:
    found = session((0.045, 0.02), (0.09, 0.02), (0.08, 0.01))
    assert found.story[-1].startswith("fresh batch: 24 pairs")
    assert found.pairs == 48


def test_an_implausible_gain_fails_and_must_recur_the_same_way() -> None:
    found = session((-0.5, 0.01), (-0.5, 0.01))
    assert found.verdict == "regression"
    assert "implausible gain" in found.findings[0].note
    assert session((-0.5, 0.01), (0.5, 0.01)).verdict == "inconclusive"
    assert session((-0.2, 0.01)).verdict == "pass"


@pytest.mark.parametrize("shift", [0.05, -0.05])
def test_a_control_that_moves_makes_the_run_void(shift: float) -> None:
    found = session((0.0, 0.005, shift))
    assert found.verdict == "fault"
    assert found.void is not None
    assert found.void.startswith("the control moved: decode_tokens_per_s")
    # In any batch: also where the first one was sound.
    assert session((0.06, 0.005), (0.06, 0.005, shift)).verdict == "fault"


def test_a_control_may_move_by_less_than_matters() -> None:
    assert session((0.0, 0.001, 0.01)).verdict == "pass"


def test_a_session_too_small_for_a_control_is_refused() -> None:
    with pytest.raises(ComparisonError, match="7 pairs: expected at least 8"):
        session(pairs=7)
    assert session((0.0, 0.001), pairs=8).verdict == "pass"


def wrong_passes(noise: Callable[[random.Random], float], *, against_both: bool, sessions: int = 1000) -> float:
    """The share of sessions that pass a candidate which is slower by exactly the least effect, where each process is
    slower by `noise` of its own; as pairs are judged, or with the candidate held against the mean of two baselines."""
    draw, passed = random.Random(5), 0

    def pair() -> Slowdowns:
        slower = {arm: noise(draw) + (math.log1p(0.03) if arm == "candidate" else 0) for arm in ARMS}
        block = {"case": "c", **{arm: {"decode_tokens_per_s": math.exp(-value)} for arm, value in slower.items()}}
        one, other = (
            pair_slowdown({"blocks": [block]}, "decode_tokens_per_s", ["c"], arm) for arm in ("candidate", "control")
        )
        return {"candidate": [one - other / 2 if against_both else one], "control": [other]}

    for _ in range(sessions):
        passed += run_session(lambda _, count: [pair() for _ in range(count)], RULES, ["all"], 12).verdict == "pass"
    return passed / sessions


NOISES: dict[str, Callable[[random.Random], float]] = {
    "normal": lambda draw: draw.gauss(0, 0.014),
    "skewed": lambda draw: draw.expovariate(1 / 0.014),
    "spikes": lambda draw: draw.gauss(0, 0.005) + (draw.random() < 0.15) * draw.expovariate(1 / 0.04),
    "heavy-tailed": lambda draw: 0.008 * draw.gauss(0, 1) / math.sqrt(draw.expovariate(1)),
}


@pytest.mark.parametrize("noise", NOISES)
def test_a_pass_at_the_least_effect_is_as_rare_as_the_policy_says(noise: str) -> None:
    """2.5% for a bound of 95%, whatever the noise of a process is like; 1.5% are three errors of 1000 sessions."""
    assert wrong_passes(NOISES[noise], against_both=False) <= 0.04


def test_the_mean_of_two_baselines_would_pass_too_often() -> None:
    """The fault, planted: the difference from it is skewed where the noise is, and the bound no longer holds."""
    assert wrong_passes(NOISES["skewed"], against_both=True) > 0.045


def test_a_pass_takes_the_confidence_of_one_of_two_looks() -> None:
    """The bound at 95% of the doubled batch lies short of 3%, and that at 97.5% does not."""
    found = session((0.02, 0.02), (0.02, 0.02))
    assert (found.verdict, found.pairs) == ("inconclusive", 24)
    assert "at 97.5%, that of one of 2 looks" in found.findings[0].note
