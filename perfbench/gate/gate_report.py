"""What a comparison found, and what follows from it: findings, a verdict, an exit code. Free of torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perfbench import exit_codes

# Verdict -> exit code of the process.
EXIT_CODES = {
    "pass": exit_codes.OK,
    "regression": exit_codes.FAILED,
    "invalid": exit_codes.BAD_INPUT,
    "inconclusive": exit_codes.INCONCLUSIVE,
    "fault": exit_codes.FAULT,
}

WORDS = {
    "pass": "PASS",
    "regression": "FAIL",
    "invalid": "INVALID INPUT",
    "inconclusive": "INCONCLUSIVE",
    "fault": "HARNESS FAULT",
}

STATUSES = ("fail", "inconclusive", "pass", "shown")


@dataclass(frozen=True)
class Finding:
    """One figure of one case, judged.

    kind: "case" (is it there, was it measured), "exact" or "timed"; status: one of STATUSES, "shown" meaning not
    gated; change: candidate / baseline - 1, of timed figures with its bound [low, high]; note: why, in one line.
    """

    kind: str
    case: str
    figure: str
    status: str
    baseline: float | None = None
    candidate: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Measured:
    """What a format needs of the candidate beside the findings: its environment (as in run.json), when it started
    (ISO 8601), and the whole calls of each case, case -> `total_ms` of every valid repetition."""

    environment: Mapping[str, Any]
    started_at: str
    total_ms: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Report:
    """One comparison: its `verdict` (a key of EXIT_CODES), the `reason` in one line, all findings, and notes.

    `baseline`, `candidate`: what to call the sides; `measured`: None where the comparison did not come that far.
    """

    verdict: str
    reason: str
    baseline: str = ""
    candidate: str = ""
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    measured: Measured | None = None

    @property
    def exit_code(self) -> int:
        """0 pass, 1 regression, 2 invalid input, 3 inconclusive, 4 harness fault."""
        return EXIT_CODES[self.verdict]

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        return f"{WORDS[self.verdict]}: {self.reason}"

    def of(self, *statuses: str) -> list[Finding]:
        """The findings of these statuses, in order."""
        return [finding for finding in self.findings if finding.status in statuses]


def judge(
    baseline: str,
    candidate: str,
    findings: Sequence[Finding],
    notes: Sequence[str] = (),
    measured: Measured | None = None,
) -> Report:
    """The report that follows from `findings`: any failure is a regression, else anything open is inconclusive, and
    a comparison in which nothing was gated is invalid, never a pass."""
    counts = Counter(finding.status for finding in findings)
    if counts["fail"]:
        verdict, reason = "regression", _failures([one for one in findings if one.status == "fail"])
    elif counts["inconclusive"]:
        open_ = [one for one in findings if one.status == "inconclusive"]
        verdict, reason = "inconclusive", f"{_named(open_[0])}: {open_[0].note}{_more(len(open_) - 1)}"
    elif any(one.status == "pass" and one.kind != "case" for one in findings):
        verdict, reason = "pass", _passed(findings)
    else:
        verdict, reason = "invalid", "no figure was gated; check the policy's figures and cases"
    return Report(verdict, reason, baseline, candidate, tuple(findings), tuple(notes), measured)


def _failures(failed: Sequence[Finding]) -> str:
    order = {"case": 0, "timed": 1, "exact": 2}
    first = min(failed, key=lambda one: order[one.kind])
    return f"{_named(first)}: {first.note}{_more(len(failed) - 1)}"


def _passed(findings: Sequence[Finding]) -> str:
    exact = sum(one.kind == "exact" and one.status == "pass" for one in findings)
    timed = [one for one in findings if one.kind == "timed" and one.status == "pass"]
    parts = [f"{exact} exact figures hold"] if exact else []
    if timed:
        parts.append(f"{_listed([one.figure for one in timed])} no worse than the policy allows")
    else:
        parts.append("no timed figure was gated")
    return "; ".join(parts)


def _named(finding: Finding) -> str:
    return f"{finding.case}: {finding.figure}" if finding.figure else finding.case


def _more(count: int) -> str:
    return f" (and {count} more)" if count else ""


def _listed(names: Sequence[str]) -> str:
    return " and ".join(dict.fromkeys(names))
