"""What needs no quiet machine: which cases both sides of `perfbench ab` measure, and their exact figures. Free of
torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfbench.errors import ComparisonError
from perfbench.gate.figures import compiled
from perfbench.gate.gate_report import Finding
from perfbench.gate.judgement import judge_exact, judge_figure, judge_presence
from perfbench.gate.pairs import ArmProcess, Ready
from perfbench.gate.policy import Policy
from perfbench.gate.revisions import Revision
from perfbench.machine import instructions
from perfbench.progress import say


@dataclass
class ExactPhase:
    """arms: the two sides; job: makes the job of a process; log: of what the processes say; counter: what counts
    instructions, or None; notes: those of the session, which gets some more. ready: what each side said of itself."""

    arms: Mapping[str, Revision]
    policy: Policy
    job: Callable[..., dict[str, Any]]
    log: Path
    counter: str | None
    notes: list[str]
    ready: dict[str, Ready] = field(default_factory=dict)

    def findings(self) -> list[Finding]:
        """Which cases both measure, and their exact figures; alone on the machine, one revision after the other."""
        found: dict[str, dict[str, Any]] = {}
        for arm, revision in self.arms.items():
            say(f"{arm} {revision.label}: checking and counting")
            with self.log.open("ab") as log, ArmProcess(arm, revision, log) as process:
                self.ready[arm] = process.begin(self.job(prepare=True))
            found[arm] = {case: {"id": case, **entry} for case, entry in self.ready[arm].prepared.items()}
            if self.counter is not None:
                self._count_instructions(self.counter, arm, found[arm])
        self.notes += self._what_differs()
        before, after = found["baseline"], found["candidate"]
        findings = []
        for case in dict.fromkeys([*before, *after]):
            findings.append(judge_presence(self.policy, case, before.get(case), after.get(case)))
            if findings[-1].status == "pass":
                findings += judge_exact(self.policy, case, before[case], after[case])
        return findings + self._compiled()

    def _count_instructions(self, counter: str, arm: str, found: Mapping[str, dict[str, Any]]) -> None:
        """Into the exact figures of the cases that passed; in a process of its own, on one thread."""
        revision = self.arms[arm]
        if revision.command:
            self.notes.append(f"the {arm} is no commit: its instructions are not counted; a command may say them")
            return
        say(f"{arm} {revision.label}: counting instructions with {counter}")
        passed = [case for case, entry in found.items() if entry["status"] == "ok"]
        job = self.job(prepare=False, only=passed) | {"threads": 1, "instructions": counter}
        with (
            self.log.open("ab") as log,
            ArmProcess(arm, revision, log, instructions.under(counter)) as process,
        ):
            counted = process.begin(job).prepared
        for case, entry in counted.items():
            found[case]["exact"] = found[case]["exact"] | entry["exact"]

    def _what_differs(self) -> list[str]:
        """Of the two sides, in words: their packages, as their own processes see them, or nothing at all."""
        one, other = self.ready["baseline"], self.ready["candidate"]
        packages = [
            f"{name} {one.versions.get(name)} -> {version}"
            for name, version in other.versions.items()
            if one.versions and one.versions.get(name) != version
        ]
        if packages:
            return [f"packages that differ: {', '.join(packages)}"]
        arms = self.arms["baseline"], self.arms["candidate"]
        known = not (arms[0].command or arms[1].command)
        same = known and one.code == other.code and arms[0].packages == arms[1].packages
        return ["both revisions load the same code: what differs is noise"] if same else []

    def _compiled(self) -> list[Finding]:
        """Registers, spills and shared memory that the revisions' kernels were compiled to, where both say."""
        if any(revision.command or revision.runner for revision in self.arms.values()):
            return []
        before, after = (_resources(self.arms[arm].folder) for arm in ("baseline", "candidate"))
        if before is None or after is None:
            return []
        if before["triton"] != after["triton"]:
            self.notes.append(f"compiled kernels are not compared: triton {before['triton']} -> {after['triton']}")
            return []
        findings = []
        for kernel, targets in before["kernels"].items():
            for target, resources in targets.items():
                new = after["kernels"].get(kernel, {}).get(target, {})
                findings += [
                    judge_figure(self.policy, f"{kernel} on {target}", figure, resources[key], new.get(key))
                    for figure, key in compiled().items()
                    if key in resources
                ]
        return findings


def _resources(folder: Path) -> dict[str, Any] | None:
    """kernels/resources.json of a revision; None where it has none. Raises ComparisonError on a malformed one."""
    file = folder / "kernels" / "resources.json"
    if not file.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())
        if not isinstance(found["kernels"], dict) or "triton" not in found:
            raise ValueError("no kernels, or no version of triton")
    except (ValueError, KeyError, TypeError) as error:
        raise ComparisonError(f"{file}: expected compiled kernels, got {error}") from None
    return found
