"""How many pairs are measured, and what follows from them. Free of torch.

The same rules judge a real session and one that is resampled from recorded pairs (`perfbench.gate.power`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from perfbench.errors import ComparisonError
from perfbench.gate.gate_report import Finding
from perfbench.gate.judgement import judge_bound
from perfbench.gate.policy import Policy, Primary
from perfbench.gate.rank_bounds import Bound, signed_rank_bound

# One pair: arm ("candidate", "control") -> its log slow-down against the baseline in each primary figure, in order.
Slowdowns = Mapping[str, Sequence[float]]

# A control that is sound moves in at most 1% of the batches.
CONTROL_CONFIDENCE = 0.99
# A session may look twice, and a PASS at either look ends it: each look has half of the chance of a wrong one, so that
# both together have no more than the policy allows. A failure has to recur and needs no such share.
LOOKS = 2
# Fewer pairs have no bound at that confidence, and a control that can't move controls nothing.
LEAST_PAIRS = 8

# batch name, number of pairs -> so many new pairs
Draw = Callable[[str, int], Sequence[Slowdowns]]


@dataclass(frozen=True)
class Outcome:
    """How a session ended: a finding for each primary figure; `void`, why nothing may follow from it, or None; how
    many `pairs` it took; and its `story`, a note for each step."""

    findings: tuple[Finding, ...]
    void: str | None
    pairs: int
    story: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """pass, regression, inconclusive, or fault where the session is void."""
        if self.void:
            return "fault"
        statuses = {finding.status for finding in self.findings}
        if "fail" in statuses:
            return "regression"
        return "inconclusive" if "inconclusive" in statuses else "pass"


def run_session(draw: Draw, policy: Policy, labels: Sequence[str], pairs: int) -> Outcome:
    """Measures `pairs` pairs and judges; where that is inconclusive, as many again, once; where it fails, a fresh
    batch as large, in which every failure must recur.

    `labels`: what the cases of each primary figure are called. Raises ComparisonError on fewer than LEAST_PAIRS.
    """
    check_size(pairs)
    measured = list(draw("first", pairs))
    story: list[str] = []

    def judged(batch: Sequence[Slowdowns], name: str) -> tuple[list[Finding], str | None]:
        findings, void = _judge(policy, labels, batch)
        what = ", ".join(f"{one.figure} {one.status}" for one in findings)
        story.append(f"{name}: {len(batch)} pairs: {what}" + (f"; {void}" if void else ""))
        return findings, void

    findings, void = judged(measured, "first batch")
    if not void and not _any(findings, "fail") and _any(findings, "inconclusive"):
        measured += draw("doubled", pairs)
        findings, void = judged(measured, "doubled")
    used = len(measured)
    if not void and _any(findings, "fail"):
        fresh, void = judged(draw("fresh", used), "fresh batch")
        used *= 2
        findings = [_recurring(one, again) for one, again in zip(findings, fresh, strict=True)]
    return Outcome(tuple(findings), void, used, tuple(story))


def check_size(pairs: int) -> None:
    """Raises ComparisonError where a batch of so many pairs has no bound for its control."""
    if pairs < LEAST_PAIRS:
        raise ComparisonError(f"{pairs} pairs: expected at least {LEAST_PAIRS}; fewer have no bound for the control")


def _any(findings: Sequence[Finding], status: str) -> bool:
    return any(one.status == status for one in findings)


def _recurring(first: Finding, again: Finding) -> Finding:
    if first.status != "fail":
        return first
    # A gain in one batch and a loss in the other are no recurrence.
    same_way = (first.change or 0) * (again.change or 0) > 0
    if again.status == "fail" and same_way:
        return replace(first, note=f"{first.note}; it recurred in a fresh batch")
    note = f"failed ({first.note}), and did not in a fresh batch ({again.note})"
    return replace(first, status="inconclusive", note=note)


def _judge(policy: Policy, labels: Sequence[str], batch: Sequence[Slowdowns]) -> tuple[list[Finding], str | None]:
    findings, void = [], None
    for place, (primary, label) in enumerate(zip(policy.primary, labels, strict=True)):
        values = [pair["candidate"][place] for pair in batch]
        bound = signed_rank_bound(values, policy.confidence)
        control = signed_rank_bound([pair["control"][place] for pair in batch], CONTROL_CONFIDENCE)
        findings.append(_spent(judge_bound(policy, primary, label, (None, None), bound), policy, primary, values))
        void = void or control_moved(primary, control)
    return findings, void


def _spent(finding: Finding, policy: Policy, primary: Primary, values: Sequence[float]) -> Finding:
    """The finding, a pass only where the bound at the confidence of one of LOOKS looks passes too."""
    confidence = 1 - (1 - policy.confidence) / LOOKS
    high = signed_rank_bound(values, confidence).high
    if finding.status != "pass" or (high is not None and high < math.log1p(primary.least_effect)):
        return finding
    note = f"{finding.note}, but at {confidence:.1%}, that of one of {LOOKS} looks, it has that inside it"
    return replace(finding, status="inconclusive", note=note)


def control_moved(primary: Primary, control: Bound) -> str | None:
    """Why two processes of one revision can't be told to be equal: their bound leaves out 0, and its centre lies past
    half the least effect. None where all is well."""
    assert control.low is not None
    assert control.high is not None
    if control.low <= 0 <= control.high or abs(control.centre) <= math.log1p(primary.least_effect) / 2:
        return None
    low, centre, high = (math.expm1(value) for value in (control.low, control.centre, control.high))
    return (
        f"the control moved: {primary.figure} of two processes of the baseline differ by "
        f"{centre:+.1%} [{low:+.1%}, {high:+.1%}]"
    )
