"""`perfbench ab`: two revisions measured side by side, from the refs to a report. Free of torch.

Where both would run the same code nothing is measured. Else exact figures of every case come first, from one process
of each revision; only where they hold are pairs timed, of the cases that the policy's primary figures look at.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from perfbench.errors import ComparisonError, nearest
from perfbench.gate import clocks
from perfbench.gate.exact_phase import ExactPhase
from perfbench.gate.figures import sampled
from perfbench.gate.gate_report import Finding, Measured, Report, judge
from perfbench.gate.judgement import timed_finding
from perfbench.gate.pairs import ARMS, ArmCrashed, Pair, measure_pair, pair_slowdown, pair_value
from perfbench.gate.policy import Policy
from perfbench.gate.rank_bounds import signed_rank_bound
from perfbench.gate.revisions import Revision, asked_for, is_dirty, repository_of, revisions
from perfbench.gate.same_code import WORKER, same_code
from perfbench.gate.session import check_size, run_session
from perfbench.gate.sides import side_of
from perfbench.machine import environment, instructions
from perfbench.progress import say

# The turns of a pair where nobody says how many: of all cases together, since a primary figure is a mean over its
# cases, and at least of each.
BLOCKS, LEAST_BLOCKS = 20, 3
PAIRS, REPORT, WORKER_LOG = "pairs.jsonl", "report.json", "worker.log"


@dataclass(frozen=True)
class Plan:
    """What the command line asks for. scenario, settings, case: as `perfbench run` takes them; pairs: in the first
    batch; blocks: of each case in a pair, None for BLOCKS of all; repetitions: in a block; record: only measure the
    pairs, judge nothing; even_if_same: measure also where both arms run the same code; plugins: files with methods, as
    `revisions` takes them; instructions: count them too."""

    baseline: str
    candidate: str
    scenario: Path
    settings: tuple[str, ...]
    case: str | None
    policy: Policy
    pairs: int
    blocks: int | None
    repetitions: int
    seed: int
    out: Path
    record: bool
    even_if_same: bool
    plugins: tuple[str, ...] = ()
    instructions: bool = False


def cache_folder() -> Path:
    """Where environments of other dependencies are kept between sessions."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "perfbench" / "environments"


def compare_revisions(plan: Plan) -> Report:
    """The report of one session; `plan.out` gets every pair as it is measured.

    Raises ComparisonError on a ref that there is not, that does not build, or that can't take part.
    """
    if not plan.scenario.is_file():
        raise ComparisonError(f"{plan.scenario}: no such file; give a scenario")
    if not plan.record:
        check_size(plan.pairs)
    for primary in plan.policy.primary:
        if primary.figure not in sampled():
            raise ComparisonError(
                f"{primary.figure}: expected a figure of every repetition ({nearest(primary.figure, sampled())}): "
                "a block is too short for a tail; `perfbench gate` judges tails between stored runs"
            )
    counter = instructions.counter() if plan.instructions else None
    made = not plan.out.exists()
    _make_out(plan.out)
    try:
        return _report(plan, counter)
    except ComparisonError:
        if made:
            with suppress(OSError):  # what the processes said of a refused side stays
                plan.out.rmdir()
        raise


def _report(plan: Plan, counter: str | None) -> Report:
    sides = {"baseline": plan.baseline, "candidate": plan.candidate}
    with revisions(Path.cwd(), sides, cache_folder(), plan.plugins) as pair_of_revisions:
        session = _Session(plan, pair_of_revisions, counter)
        for arm, text in sides.items():
            if side_of(text).ref == "HEAD" and is_dirty(repository_of(Path.cwd())):
                session.notes.append(
                    f"the checkout has changes that are not committed; the {arm} is HEAD, without them"
                )
        return session.report()


def _make_out(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ComparisonError(f"{out}: expected a new or empty folder, it has files in it; give another --out")
    except OSError as error:
        raise ComparisonError(f"{out}: can't be written ({error.strerror}); give another --out") from None


class _Session:
    """One session over two revisions that are checked out; `counter`: what counts instructions, or None."""

    def __init__(self, plan: Plan, arms: Mapping[str, Revision], counter: str | None):
        self.plan, self.arms = plan, arms
        self.notes: list[str] = []
        self.exact = ExactPhase(arms, plan.policy, self._job, plan.out / WORKER_LOG, counter, self.notes)
        self.began = datetime.now(UTC).isoformat(timespec="seconds")
        self.measured: list[Pair] = []  # also those that were dropped
        asked = [set(asked_for(revision)) for revision in arms.values() if revision.runner]
        if len(asked) == 2 and (changed := ", ".join(sorted(asked[0] ^ asked[1]))):
            self.notes.append(f"the commits ask for different packages ({changed}); both ran with those of this Python")
        for revision in arms.values():
            if not (revision.command or revision.runner or (revision.folder / WORKER).is_file()):
                raise ComparisonError(
                    f"{revision.label}: older than `perfbench ab`, it has no {WORKER}; choose a later ref"
                )

    def report(self) -> Report:
        """Exact figures, then pairs; a crash of the candidate is its failure, one of the baseline ours."""
        if not self.plan.even_if_same and (same := same_code(self.arms, self.plan.scenario, self.plan.settings)):
            if self.plan.record:
                raise ComparisonError(
                    f"nothing to record: both sides are the same; add --even-if-same; compared: {same}"
                )
            reason = "both sides are the same, so nothing was measured (--even-if-same measures them anyway)"
            return Report("pass", reason, *self._labels(), (), (*self.notes, f"the same on both sides: {same}"))
        findings: list[Finding] = []
        try:
            findings = self.exact.findings()
            if any(one.status == "fail" for one in findings):
                self.notes.append("no pair was timed: the exact figures fail already")
                return self._judged(findings)
            return self._timed(findings)
        except ArmCrashed as crash:
            if crash.case is None:
                last = _last_line(self.plan.out / WORKER_LOG)
                label = self.arms["candidate" if crash.arm == "candidate" else "baseline"].label
                raise ComparisonError(f"{label}: can't be measured: {last or crash.why}") from None
            if crash.arm == "candidate":
                crashed = Finding("case", crash.case, "", "fail", note=f"crashed ({crash.why}) in the candidate")
                return self._judged([*findings, crashed])
            return Report("fault", f"the {crash}", *self._labels(), tuple(findings), tuple(self.notes))
        except clocks.ClocksMoved as moved:
            return Report("fault", str(moved), *self._labels(), tuple(findings), tuple(self.notes))

    def _labels(self) -> tuple[str, str]:
        return self.arms["baseline"].label, self.arms["candidate"].label

    def _judged(self, findings: Sequence[Finding]) -> Report:
        return judge(*self._labels(), findings, self.notes, self._measured())

    def _job(self, *, prepare: bool, only: Sequence[str] | None = None) -> dict[str, Any]:
        return {
            "scenario": str(self.plan.scenario.resolve()),
            "set": list(self.plan.settings),
            "case": self.plan.case,
            "threads": environment.threads(),
            "prepare": prepare,
            "only": None if only is None else list(only),
        }

    def _timed(self, findings: list[Finding]) -> Report:
        policy = self.plan.policy
        common = [one.case for one in findings if one.kind == "case" and one.status == "pass"]
        gated = [case for case in common if policy.skipped(case) is None]
        groups = [[case for case in gated if fnmatchcase(case, primary.cases)] for primary in policy.primary]
        # What no primary figure looks at is not timed: a pair is to take seconds.
        cases = [case for case in gated if any(case in group for group in groups)]
        for primary, group in zip(policy.primary, groups, strict=True):
            if not group:
                raise ComparisonError(f"{primary.figure}: no case of both revisions matches {primary.cases!r}")
        labels = [
            group[0] if len(group) == 1 else f"{len(group)} cases ({primary.cases})"
            for primary, group in zip(policy.primary, groups, strict=True)
        ]

        def draw(batch: str, count: int) -> list[dict[str, list[float]]]:
            return [
                {
                    arm: [
                        pair_slowdown(pair, primary.figure, group, arm)
                        for primary, group in zip(policy.primary, groups, strict=True)
                    ]
                    for arm in ("candidate", "control")
                }
                for pair in self._measure(batch, count, cases)
            ]

        if self.plan.record:
            draw("recorded", self.plan.pairs)
            self.notes += clocks.told(self.measured)
            self.notes.append(f"recorded {self.plan.pairs} pairs in {self.plan.out / PAIRS}; they were not judged")
            return self._judged(findings)
        outcome = run_session(draw, policy, labels, self.plan.pairs)
        self.notes += [*outcome.story, *clocks.told(self.measured)]
        for finding, primary, group in zip(outcome.findings, policy.primary, groups, strict=True):
            values = [pair_value(self.pairs, primary.figure, group, arm) for arm in ("baseline", "candidate")]
            findings.append(replace(finding, baseline=values[0], candidate=values[1]))
        findings += self._each_timed(cases, {(one.case, one.figure) for one in findings})
        if outcome.void:
            reason = f"{outcome.void}; this run is void, run again on a quieter machine"
            return Report("fault", reason, *self._labels(), tuple(findings), tuple(self.notes))
        return self._judged(findings)

    def _measure(self, batch: str, count: int, cases: Sequence[str]) -> list[Pair]:
        """`count` new pairs that are evidence; each is written down as soon as it is there. Raises ClocksMoved."""
        blocks = self.plan.blocks or max(LEAST_BLOCKS, math.ceil(BLOCKS / len(cases)))
        began = len(self.measured)
        while True:
            batch_so_far = self.measured[began:]
            kept = [pair for pair in batch_so_far if "dropped" not in pair]
            if len(batch_so_far) - len(kept) > clocks.allowed(count):
                raise clocks.void(batch_so_far)
            if len(kept) == count:
                return kept
            took = f" ({statistics.median(one['seconds'] for one in kept):.0f} s each)" if kept else ""
            say(f"{batch} batch: pair {len(kept) + 1} of {count}{took}")
            pair = measure_pair(
                self.arms,
                self._job(prepare=False, only=cases),
                cases,
                self.exact.ready["candidate"].requests,
                blocks=blocks,
                repetitions=self.plan.repetitions,
                seed=f"{self.plan.seed}/{batch}/{len(batch_so_far)}",
                log=self.plan.out / WORKER_LOG,
            )
            if (reason := clocks.why_dropped(pair, ARMS)) is not None:
                say(f"dropped: {reason}")
                pair["dropped"] = reason
            self.measured.append({"batch": batch, **pair})
            with (self.plan.out / PAIRS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.measured[-1]) + "\n")

    @property
    def pairs(self) -> list[Pair]:
        """Those that are evidence."""
        return [pair for pair in self.measured if "dropped" not in pair]

    def _each_timed(self, cases: Sequence[str], told: set[tuple[str, str]]) -> list[Finding]:
        """Every timed figure of every case over all pairs, shown: the primary ones carry the verdict."""
        findings = []
        for case in cases:
            for figure in sampled():
                if (case, figure) in told or not self._all_have(case, figure):
                    continue
                logs = [pair_slowdown(pair, figure, [case], "candidate") for pair in self.pairs]
                values = tuple(pair_value(self.pairs, figure, [case], arm) for arm in ("baseline", "candidate"))
                bound = signed_rank_bound(logs, self.plan.policy.confidence)
                findings.append(timed_finding(case, figure, (values[0], values[1]), bound))
        return findings

    def _all_have(self, case: str, figure: str) -> bool:
        blocks = [block for pair in self.pairs for block in pair["blocks"] if block["case"] == case]
        return all(block[arm] and figure in block[arm] for block in blocks for arm in ARMS)

    def _measured(self) -> Measured | None:
        """The candidate's blocks as other tools want them; None before any pair."""
        if not self.pairs:
            return None
        found = environment.collect(self.exact.ready["candidate"].device, None)
        found["versions"] = self.exact.ready["candidate"].versions or found["versions"]
        found["checkout"] = {"commit": self.arms["candidate"].commit, "dirty": False}
        total_ms: dict[str, list[float]] = {}
        for pair in self.pairs:
            for block in pair["blocks"]:
                if block["candidate"]:
                    total_ms.setdefault(block["case"], []).append(block["candidate"]["total_ms"])
        return Measured(found, self.began, total_ms)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else ""
