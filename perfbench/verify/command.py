"""`perfbench verify`: the sections one after the other, each in a child process, written down as each one ends.

Free of torch: a child that dies takes nothing with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
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
from perfbench.verify.report import FAIL, Finding
from perfbench.verify.worker import SECTIONS

# Seconds for all of it; the speeds get what the checks leave.
BUDGET_S = {"cuda": 480.0, "cpu": 120.0}
# Seconds after which a section is given up.
LONGEST_S = 300.0


def default_out() -> Path:
    """`runs/verify-<UTC time>`."""
    return Path("runs") / f"verify-{datetime.now(UTC).strftime('%Y%m%d-%H%M%S')}"


def verify(
    device: str, device_name: str, out: Path, *, full: bool, resume: bool, notes: Console
) -> dict[str, Any]:
    """Everything that can be verified on `device` (cpu | cuda), into `out`; what the JSON says.

    full: the whole grid, without a limit of time. RunDirectoryError where `out` can't be used; PerfbenchError.
    """
    if device == "cuda" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise PerfbenchError("TRITON_INTERPRET: set, so kernels would not run on the GPU; unset it")
    found = _open(device, device_name, out, full=full, resume=resume)
    started = time.monotonic()
    limit = "without a limit" if full else f"at most {found['budget_s'] / 60:.0f} minutes"
    notes.print(f"{device_name}: {', '.join([*SECTIONS, 'grid'])}; {limit} -> {out}")
    for section in SECTIONS:
        if found["sections"].get(section, {}).get("status") in (None, FAIL):
            _take(found, section, _child(section, device), out, notes)
    left = None if full else found["budget_s"] - (time.monotonic() - started)
    names = grid.FULL if full else grid.QUICK
    _take(found, "grid", grid.findings(names, device, out, left), out, notes)
    return found


def _open(device: str, device_name: str, out: Path, *, full: bool, resume: bool) -> dict[str, Any]:
    """A new report, or the one in `out`, of the same code on the same device. RunDirectoryError."""
    where = {"kind": device, "name": device_name}
    fresh: dict[str, Any] = {
        "schema_version": report.SCHEMA_VERSION,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "perfbench_version": __version__,
        "device": where,
        "full": full,
        "budget_s": BUDGET_S[device],
        "environment": environment.collect(device, threads()),
        "sections": {},
    }
    fresh["kernel_settings"] = fresh["environment"]["kernel_settings"]
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


def _child(section: str, device: str) -> Iterator[Finding]:
    """The findings of a section as a child process makes them; one that dies or hangs is a finding too."""
    variables = dict(os.environ)
    if section == "kernels" and device == "cpu":
        variables["TRITON_INTERPRET"] = "1"
    deadline = time.monotonic() + LONGEST_S
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "perfbench.verify.worker", section, device]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=variables)
        assert child.stdout is not None
        try:
            with grid.time_limit(deadline - time.monotonic()):
                for line in child.stdout:
                    yield Finding(**json.loads(line))
                code = child.wait()
        except grid.OutOfTimeError:
            yield Finding("the rest", FAIL, f"not done after {LONGEST_S:.0f} s")
            return
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        if code != 0:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            yield Finding("the rest", FAIL, f"the child process ended with {code}: {lines[-1] if lines else 'no word'}")
