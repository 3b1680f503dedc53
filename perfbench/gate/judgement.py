"""The rules that turn two values, or a bound, into a finding. The same for stored runs and for revisions side by side.

Free of torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from perfbench.figures.metrics import METRICS
from perfbench.gate.figures import case_figures, change, exact
from perfbench.gate.gate_report import Finding
from perfbench.gate.policy import Policy, Primary
from perfbench.gate.rank_bounds import Bound


def judge_presence(
    policy: Policy,
    case_id: str,
    baseline: Mapping[str, Any] | None,
    candidate: Mapping[str, Any] | None,
    samples: tuple[int | None, int | None] = (None, None),
) -> Finding:
    """Whether one case, an entry of run.json, was measured on both sides: its check passed, and of its `samples`,
    where their number is known, at least one is valid; the status is only a word. Only a case that is new, that the
    baseline failed and that is measured now, or that the policy skips, may lack a side; a crash is called a crash,
    never "slower"."""
    skipped = policy.skipped(case_id)

    def found(status: str, note: str) -> Finding:
        if status == "fail" and skipped is not None:
            status, note = "shown", f"{note}; not gated: {skipped}"
        return Finding("case", case_id, "", status, note=note)

    if candidate is None:
        return found("fail", "missing in the candidate")
    why = _why_not_measured(candidate, samples[1])
    if baseline is None:
        if why:
            return found("fail", f"new, {why}{_because(candidate)} in the candidate")
        return found("shown", "new: not in the baseline")
    if why:
        return found("fail", f"{why}{_because(candidate)} in the candidate")
    if why := _why_not_measured(baseline, samples[0]):
        return found("shown", f"measured now; {why} in the baseline")
    return found("pass", f"measured on both sides{_because(candidate)}")


def _why_not_measured(case: Mapping[str, Any], samples: int | None) -> str | None:
    """In a few words; None for a case that was measured."""
    status, check = case["status"], case["check"]
    if status != "ok":
        return {"pending": "not measured"}.get(status, str(status).replace("_", " "))
    if not isinstance(check, dict) or check.get("passed") is not True:
        return "not measured (its status says ok, but its check did not pass)"
    if samples == 0:
        return "not measured (its status says ok, but none of its samples is valid)"
    return None


def _because(case: Mapping[str, Any]) -> str:
    return f" ({' '.join(str(case['reason']).split())})" if case["reason"] else ""


def judge_exact(
    policy: Policy, case_id: str, baseline: Mapping[str, Any], candidate: Mapping[str, Any], differs: str = ""
) -> list[Finding]:
    """Every exact figure that either side has, of one case that both have measured. `differs`: what of the machines
    differs on which some of these depend, in words: those are then shown and not judged."""
    figures = exact()
    before, after = case_figures(baseline, figures), case_figures(candidate, figures)
    findings = [
        judge_figure(policy, case_id, figure, before[figure], after[figure], _contradiction(figure, before, after))
        for figure in figures
        if not (before[figure] is None and after[figure] is None)
    ]
    for place, one in enumerate(findings):
        wrong = _impossible(one.figure, before)
        if one.status == "fail" and one.candidate is not None and wrong and not _impossible(one.figure, after):
            findings[place] = _with(one, "shown", f"not gated: the baseline's contradicts itself: {wrong}")
        elif differs and METRICS[one.figure].one_machine:
            findings[place] = _with(one, "shown", f"not gated: it depends on the machine ({differs})")
    return findings


def _contradiction(figure: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Why the candidate's figure, one that changed, can't be so, whatever is better; None where it can."""
    if after[figure] is None or after[figure] == before[figure]:
        return None
    return "nothing is left of what the baseline has" if after[figure] == 0 else _impossible(figure, after)


def _impossible(figure: str, side: Mapping[str, Any]) -> str | None:
    """Why a figure of one side can't be what its other figures say; None where it can."""
    value, least = side[figure], side["least_flops_per_decode_step"]
    if value is None:
        return None
    if figure == "flops_per_decode_step" and value < (least or 1):
        return f"fewer than the {least or 1:,} that the step can't do without"
    return "no arm reads less than the bare backbone" if figure == "kept_bound" and value > 1 else None


def judge_figure(
    policy: Policy,
    case_id: str,
    figure: str,
    before: float | None,
    after: float | None,
    contradiction: str | None = None,
) -> Finding:
    """One exact figure: worse than its tolerance fails, and so do any change of one with no better or worse, and a
    value of which a `contradiction` says why it can't be so."""
    relative = relative_change(before, after)

    def found(status: str, note: str = "") -> Finding:
        return Finding("exact", case_id, figure, status, before, after, relative, note=note)

    if (reason := policy.skipped(case_id)) is not None:
        return found("shown", f"not gated: {reason}")
    if after is None:
        return found("fail", f"was {before:,}, and the candidate has no such figure")
    if contradiction is not None:
        was = "new" if before is None else f"{before:,}"
        return found("fail", f"contradictory: {was} -> {after:,}, {contradiction}; find out how it was counted")
    if before is None:
        return found("shown", "new: the baseline has no such figure")
    tolerance, reason = policy.tolerance(figure, case_id)
    better = METRICS[figure].better
    rise = math.copysign(math.inf, after) if relative is None else relative
    worsening = {"lower": rise, "higher": -rise, None: abs(rise)}[better]
    allowed = f" (tolerance {tolerance:.2%}{f': {reason}' if reason else ''})" if tolerance else ""
    if worsening > tolerance:
        return found("fail", f"{before:,} -> {after:,}{allowed}")
    if worsening > 0:
        return found("pass", f"{before:,} -> {after:,}, within its tolerance{allowed}")
    same = -worsening <= METRICS[figure].tolerance
    return found("pass", "" if same else f"better: {before:,} -> {after:,}; renew the baseline")


def relative_change(before: float | None, after: float | None) -> float | None:
    """`after` / `before` - 1; None where one is not known, or `before` alone is 0."""
    if before is None or after is None:
        return None
    if before == after:
        return 0.0
    change = after / before - 1 if before else math.inf
    return change if math.isfinite(change) else None


Values = tuple[float | None, float | None]


def judge_bound(policy: Policy, primary: Primary, case: str, values: Values, bound: Bound) -> Finding:
    """One primary figure: `bound` of the log slow-down, which fails only where the whole of it lies past the least
    effect, passes only where all of it lies short of that, and is inconclusive otherwise."""
    effect = math.log1p(primary.least_effect)
    found = timed_finding(case, primary.figure, values, bound)
    worse = f"the bound [{_percent(bound.low)}, {_percent(bound.high)}] of the slow-down"
    limit = f"the least effect that matters, {primary.least_effect:.0%}"
    if bound.low is None or bound.high is None:
        return _with(found, "inconclusive", f"{bound.units} are too few for a bound")
    if bound.low > effect:
        return _with(found, "fail", f"slower by {_percent(bound.centre)}: {worse} lies past {limit}")
    if bound.high < math.log1p(-policy.implausible_gain):
        gain = f"{policy.implausible_gain:.0%}"
        return _with(found, "fail", f"implausible gain: {worse} lies past {gain}; show that the work is still done")
    if bound.high < effect:
        return _with(found, "pass", f"{worse} lies short of {limit}")
    return _with(found, "inconclusive", f"{worse} has {limit} inside it")


def timed_finding(case: str, figure: str, values: Values, bound: Bound) -> Finding:
    """A timed figure with its bound, shown: the change of the figure itself, for a `bound` of the log slow-down."""
    ends = [None if end is None else change(figure, end) for end in (bound.low, bound.high)]
    low, high = (ends[0], ends[1]) if None in ends else sorted(ends)  # type: ignore[type-var]
    return Finding("timed", case, figure, "shown", *values, change(figure, bound.centre), low, high)


def _with(finding: Finding, status: str, note: str) -> Finding:
    return Finding(**{**vars(finding), "status": status, "note": note})


def _percent(log_slowdown: float | None) -> str:
    return "-" if log_slowdown is None else f"{math.expm1(log_slowdown):+.1%}"
