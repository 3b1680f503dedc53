"""`perfbench verify`: the sections one after the other, what is worth most first, written down as each one ends.

Free of torch: the sections run in child processes, and one that dies takes nothing with it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from perfbench import __version__
from perfbench.errors import PerfbenchError, RunDirectoryError, nearest
from perfbench.files.run_lock import has_files
from perfbench.machine import environment
from perfbench.measure.children import WORKER_LOG, Children
from perfbench.verify import grid, verify_report
from perfbench.verify.sections import AGAIN, THE_REST, Sections
from perfbench.verify.verify_report import FAIL, SKIPPED, Finding

# Seconds for all of it.
BUDGET_S = {"cuda": 480.0, "cpu": 120.0}
# Seconds after which a check has failed, and a section of speeds ends.
LONGEST_S, LONGEST_SPEEDS_S = 300.0, 900.0
# Section -> what is said when it begins. In this order: should the time end, what is worth most is there.
ABOUT = {
    "kernels": "every kernel against fp64, compiled on a GPU, in Triton's interpreter on a CPU",
    "q8": "speeds of 8 requests of 8 tenants",
    "replay": "graph replay against no graph",
    "generate": "runtime static against generate()",
    "isolation": "each tenant of a mixed batch alone, and with slots shifted by one",
    "grid": "all other speeds",
    "peers": "a layer's gate and up product with adapters, in the ways of the field; compiling takes a while",
    "tune": "launch settings of the Triton kernels for this GPU, written to kernels/settings.json",
}
# Those that run where nobody says otherwise.
USUAL = tuple(section for section in ABOUT if section != "tune")
# Measured by `perfbench run`'s own means; and speeds, which may end with the time where a check would have failed.
MEASURED = ("q8", "grid")
SPEEDS = ("peers", "tune")
# Seconds without which a section is not begun: what it does must be worth its start.
LEAST_S = {"tune": 60.0}


def default_out() -> Path:
    """`runs/verify-<UTC time>`."""
    return Path("runs") / f"verify-{datetime.now(UTC).strftime('%Y%m%d-%H%M%S')}"


def choose(names: Sequence[str] | None, *, tune: bool) -> tuple[str, ...]:
    """The sections to run, in their order: those named, by default USUAL. PerfbenchError on a name that is none."""
    for name in names or ():
        if name not in ABOUT:
            raise PerfbenchError(f"--section: expected the name of a section, got {name!r}; {nearest(name, ABOUT)}")
    wanted = {*(names or USUAL), *(["tune"] if tune else [])}
    return tuple(section for section in ABOUT if section in wanted)


def verify(
    device: str,
    device_name: str,
    out: Path,
    *,
    full: bool,
    minutes: int | None,
    resume: bool,
    notes: Console,
    sections: Sequence[str] = USUAL,
) -> dict[str, Any]:
    """What `sections` find on `device` (cpu | cuda), into `out`; what the JSON says.

    full: the whole grid; minutes: after which no more is done, by default BUDGET_S, and none with full.
    RunDirectoryError where `out` can't be used; PerfbenchError.
    """
    if device == "cuda" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise PerfbenchError("TRITON_INTERPRET: set, so kernels would not run on the GPU; unset it")
    found = _open(device, device_name, out, full=full, resume=resume)
    found["left_out"] = [name for name in USUAL if name not in {*sections, *found["sections"]}]
    budget_s = None if full and minutes is None else 60.0 * minutes if minutes else BUDGET_S[device]
    found["budget_s"] = budget_s
    limit = "without a limit" if budget_s is None else f"at most {budget_s / 60:.0f} minutes"
    notes.print(f"{device_name}: {', '.join(sections)}; {limit} -> {out}")
    proof = Proof(found, sections, out, notes)
    try:
        for section in sections:
            proof.take(section)
    finally:
        proof.close()
    return found


class Proof:
    """The sections of one call, their processes and their time."""

    def __init__(self, found: dict[str, Any], asked: Collection[str], out: Path, notes: Console):
        budget_s = found["budget_s"]
        self._end = None if budget_s is None else time.monotonic() + budget_s
        self._found, self._asked, self._out, self._notes = found, asked, out, notes
        self._device: str = found["device"]["kind"]
        measures = any(section in asked for section in MEASURED)
        checks = len(set(asked) - set(MEASURED))
        # A process takes 16 s to start on a GPU machine, which has cores for several: they start ahead of time. None
        # of those of the sections stays beside a measurement, so that there are two, before q8 and after it.
        ahead = self._device == "cuda" and measures
        self._children = Children(out / WORKER_LOG)
        self._sections = Sections(self._device, ahead=min(checks, 2) if ahead else 0)
        if ahead:
            self._children.start()

    def take(self, section: str) -> None:
        """Runs a section, says each finding as it comes, and writes the report; not what an earlier call has done, nor
        in place of what it found where there is no time."""
        before = self._found["sections"].get(section)
        if section not in MEASURED and is_done(before):
            return
        left = self._left()
        if left is not None and left < LEAST_S.get(section, grid.LEAST_S):
            if before is not None:
                return
            findings: Iterator[Finding] = iter([Finding(THE_REST, SKIPPED, f"the time is over; {AGAIN}")])
        elif section in MEASURED:
            findings = self._measured(section, left)
        else:
            findings = self._checked(section, left)
        self._write_down(section, findings)

    def close(self) -> None:
        """Ends the processes."""
        self._sections.close_all()
        self._children.close()

    def _left(self) -> float | None:
        return None if self._end is None else self._end - time.monotonic()

    def _measured(self, section: str, left: float | None) -> Iterator[Finding]:
        """The speeds; one child keeps the backbone from the first to the last of them."""
        self._sections.close()  # what it holds would count as memory that is taken
        part: grid.Part = "foremost" if section == "q8" else "rest" if "q8" in self._asked else "all"
        names = grid.FULL if self._found["full"] else grid.QUICK
        return grid.findings(names, self._device, self._out, left, part, self._children)

    def _checked(self, section: str, left: float | None) -> Iterator[Finding]:
        """What a child process finds. That the budget has cut it short is no fault; that a check takes for ever is."""
        if section in SPEEDS:
            self._children.close()  # the last speeds of the grid are in
        longest = LONGEST_SPEEDS_S if section in SPEEDS else LONGEST_S
        seconds = longest if left is None else min(longest, left)
        if section in SPEEDS or seconds < longest:
            late = Finding(THE_REST, SKIPPED, f"not done in its {seconds:.0f} s; {AGAIN}")
        else:
            late = Finding(THE_REST, FAIL, f"not done after {seconds:.0f} s")
        return self._sections.findings(section, seconds, late)

    def _write_down(self, section: str, findings: Iterator[Finding]) -> None:
        started = time.monotonic()
        taken = []
        self._notes.print(f"{section}: {ABOUT[section]}")
        for finding in findings:
            taken.append(vars(finding))
            self._notes.print(f"{section}: {finding.what}: {finding.status}: {finding.finding}")
        seconds = round(time.monotonic() - started, 1)
        entry = {"status": verify_report.status_of(taken), "seconds": seconds, "findings": taken}
        sections = self._found["sections"] | {section: entry}
        self._found["sections"] = {name: sections[name] for name in ABOUT if name in sections}
        verify_report.write(self._found, self._out)


def is_done(section: dict[str, Any] | None) -> bool:
    """Whether a resumed run can leave a section as it is: whole, and nothing failed."""
    return (
        section is not None
        and section["status"] != FAIL
        and THE_REST not in (finding["what"] for finding in section["findings"])
    )


def _open(device: str, device_name: str, out: Path, *, full: bool, resume: bool) -> dict[str, Any]:
    """A new report, or the one in `out`, of the same code on the same device. RunDirectoryError."""
    where = {"kind": device, "name": device_name}
    fresh: dict[str, Any] = {
        "schema_version": verify_report.SCHEMA_VERSION,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "perfbench_version": __version__,
        "device": where,
        "full": full,
        "budget_s": None,
        "environment": environment.collect(device, environment.threads()),
        "sections": {},
    }
    if not resume:
        if out.exists() and (not out.is_dir() or has_files(out)):
            raise RunDirectoryError(f"{out}: expected a new or empty folder; give another --out, or --resume")
        verify_report.write(fresh, out)
        return fresh
    found = verify_report.read(out)
    for name, old, new in (
        ("device", found["device"], where),
        ("--full", found["full"], full),
        ("code", found["environment"]["checkout"], fresh["environment"]["checkout"]),
    ):
        if old != new:
            raise RunDirectoryError(f"{out}: was begun with another {name} ({old}, now {new}); give another --out")
    return found
