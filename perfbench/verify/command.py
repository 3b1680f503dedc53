"""`perfbench verify`: the sections one after the other, each in a child process, written down as each one ends.

Free of torch: a child that dies takes nothing with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from perfbench import __version__, environment
from perfbench.errors import PerfbenchError, RunDirectoryError
from perfbench.run import threads
from perfbench.verify import grid, report
from perfbench.verify.report import FAIL, SKIPPED, Finding
from perfbench.verify.worker import SECTIONS

# Seconds for all of it; the speeds get what the checks leave.
BUDGET_S = {"cuda": 480.0, "cpu": 120.0}
# Seconds after which a check has failed.
LONGEST_S = 300.0
# Section -> what is said when it begins.
ABOUT = {
    "kernels": "every kernel against fp64, compiled on a GPU, in Triton's interpreter on a CPU",
    "replay": "graph replay against no graph",
    "generate": "runtime static against generate()",
    "isolation": "each tenant of a mixed batch alone, and with slots shifted by one",
    "peers": "a layer's gate and up product with adapters, in the ways of the field; compiling takes a while",
    "grid": "speeds",
}
# What a child did not come to.
THE_REST = "the rest"
# Speeds, not checks: they may end with the time.
SPEEDS = ("peers",)


def default_out() -> Path:
    """`runs/verify-<UTC time>`."""
    return Path("runs") / f"verify-{datetime.now(UTC).strftime('%Y%m%d-%H%M%S')}"


def verify(
    device: str, device_name: str, out: Path, *, full: bool, minutes: int | None, resume: bool, notes: Console
) -> dict[str, Any]:
    """Everything that can be verified on `device` (cpu | cuda), into `out`; what the JSON says.

    full: the whole grid; minutes: after which no more is measured, by default BUDGET_S, and none with full.
    RunDirectoryError where `out` can't be used; PerfbenchError.
    """
    if device == "cuda" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise PerfbenchError("TRITON_INTERPRET: set, so kernels would not run on the GPU; unset it")
    found = _open(device, device_name, out, full=full, resume=resume)
    budget_s = None if full and minutes is None else 60.0 * minutes if minutes else BUDGET_S[device]
    found["budget_s"] = budget_s
    end = None if budget_s is None else time.monotonic() + budget_s
    limit = "without a limit" if budget_s is None else f"at most {budget_s / 60:.0f} minutes"
    notes.print(f"{device_name}: {', '.join([*SECTIONS, 'grid'])}; {limit} -> {out}")
    for section in SECTIONS:
        if not _is_done(found["sections"].get(section)):
            _take(found, section, _child(section, device, _seconds_for(section, end)), out, notes)
    left = None if end is None else end - time.monotonic()
    names = grid.FULL if full else grid.QUICK
    _take(found, "grid", grid.findings(names, device, out, left), out, notes)
    return found


def _is_done(section: dict[str, Any] | None) -> bool:
    """Whether a resumed run can leave a section as it is: whole, and nothing failed."""
    return section is not None and section["status"] != FAIL and THE_REST not in (
        finding["what"] for finding in section["findings"]
    )


def _seconds_for(section: str, end: float | None) -> float:
    """How long a section may take: a check as long as it needs, within reason; speeds half of what is left."""
    if section not in SPEEDS or end is None:
        return LONGEST_S
    return max(1.0, (end - time.monotonic()) / 2)


def _open(device: str, device_name: str, out: Path, *, full: bool, resume: bool) -> dict[str, Any]:
    """A new report, or the one in `out`, of the same code on the same device. RunDirectoryError."""
    where = {"kind": device, "name": device_name}
    fresh: dict[str, Any] = {
        "schema_version": report.SCHEMA_VERSION,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "perfbench_version": __version__,
        "device": where,
        "full": full,
        "budget_s": None,
        "environment": environment.collect(device, threads()),
        "sections": {},
    }
    if not resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunDirectoryError(f"{out}: expected a new or empty folder; give another --out, or --resume")
        report.write(fresh, out)
        return fresh
    found = report.read(out)
    for name, old, new in (
        ("device", found["device"], where),
        ("--full", found["full"], full),
        ("code", found["environment"]["checkout"], fresh["environment"]["checkout"]),
    ):
        if old != new:
            raise RunDirectoryError(f"{out}: was begun with another {name} ({old}, now {new}); give another --out")
    return found


def _take(found: dict[str, Any], section: str, findings: Iterator[Finding], out: Path, notes: Console) -> None:
    """Runs a section, says each finding as it comes, and writes the report."""
    started = time.monotonic()
    taken = []
    notes.print(f"{section}: {ABOUT[section]}")
    for finding in findings:
        taken.append(vars(finding))
        notes.print(f"{section}: {finding.what}: {finding.status}: {finding.finding}")
    found["sections"].pop(section, None)
    found["sections"][section] = {
        "status": report.status_of(taken),
        "seconds": round(time.monotonic() - started, 1),
        "findings": taken,
    }
    report.write(found, out)


def _child(section: str, device: str, seconds: float) -> Iterator[Finding]:
    """The findings of a section as a child process makes them; one that dies or hangs is a finding too."""
    variables = dict(os.environ)
    if section == "kernels" and device == "cpu":
        variables["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "perfbench.verify.worker", section, device]
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=variables)
        assert child.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            child.kill()

        alarm = threading.Timer(seconds, give_up)
        alarm.start()
        try:
            for line in child.stdout:
                if line.endswith(b"\n"):  # a child that is killed may leave half a line
                    yield Finding(**json.loads(line))
            code = child.wait()
        finally:
            alarm.cancel()
            child.kill()
            child.wait()
            child.stdout.close()
        if late.is_set() and section in SPEEDS:
            yield Finding(THE_REST, SKIPPED, f"not done in its {seconds:.0f} s; go on with --resume")
        elif late.is_set():
            yield Finding(THE_REST, FAIL, f"not done after {seconds:.0f} s")
        elif code != 0:
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines() or ["no word"]
            yield Finding(THE_REST, FAIL, f"the child process ended with {code}: {said[-1]}")
