"""What `compare`, `gate` and `ab` share: from a function that makes a report to what is printed, written and returned.

Free of torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from perfbench import crash_report, exit_codes
from perfbench.errors import PerfbenchError, nearest
from perfbench.files.plain_text import printable
from perfbench.gate.formats import TIMED, github_annotations, names, written
from perfbench.gate.gate_report import Report
from perfbench.gate.text import markdown, print_report

# (one of `formats.names`, file)
Writes = Sequence[tuple[str, Path]]


def writes_of(values: Sequence[str], *, exact_only: bool = False) -> Writes:
    """The `--write FORMAT=FILE` of the command line, of a comparison of exact figures alone where it says so. Raises
    PerfbenchError on what can't be written."""
    found = []
    for value in values:
        name, equals, file = value.partition("=")
        if not equals or not file:
            raise PerfbenchError(f"--write {value}: expected FORMAT=FILE, such as junit=gate.xml")
        if name not in names():
            raise PerfbenchError(f"--write {value}: unknown format {name!r}; {nearest(name, names())}")
        if exact_only and name in TIMED:
            raise PerfbenchError(
                f"--write {value}: {name} holds timed samples, of which --exact-only has none; leave one out"
            )
        if not Path(file).parent.is_dir():
            raise PerfbenchError(f"--write {value}: no folder {Path(file).parent}; make it first")
        found.append((name, Path(file)))
    return found


def verdict_of(make: Callable[[], Report], writes: Writes) -> int:
    """Makes a report, prints it, writes it, and returns its exit code: 0 pass, 1 regression, 2 invalid input,
    3 inconclusive, 4 harness fault.

    An error of the input and a fault of our own become reports too, so that no reader of the outputs finds those of
    an earlier run, and a fault can't leave with the exit code 1 that means a regression.
    """
    try:
        report = make()
    except PerfbenchError as error:
        report = Report("invalid", str(error))
    except Exception as error:
        report = _fault(error)
    try:
        failed = _tell(report, writes)
    except Exception as error:
        report = _fault(error)  # a report without findings, which every format can write
        failed = _tell(report, writes)
    for message in failed:
        print(f"perfbench: {printable(message)}", file=sys.stderr)
    # A pass of which somebody's reader would see nothing is no pass.
    return exit_codes.BAD_INPUT if failed and report.exit_code == exit_codes.OK else report.exit_code


def _fault(error: Exception) -> Report:
    return Report("fault", f"{crash_report.in_one_line(error)}; it is no slow-down")


def _tell(report: Report, writes: Writes) -> list[str]:
    """Writes and prints the report; what could not be written, a line each."""
    failed = _write_all(report, writes)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        failed += _write(Path(summary), markdown(report), append=True)
    _print(report)
    return failed


def _print(report: Report) -> None:
    """What people see; a reader that leaves early (`| head`) changes neither the files nor the exit code."""
    try:
        print_report(report)
        if os.environ.get("GITHUB_ACTIONS") == "true":
            print(github_annotations(report), end="")
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # rich ends the process with 1, which would mean a regression
        # Else Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write_all(report: Report, writes: Writes) -> list[str]:
    failed = []
    for name, file in writes:
        if name in TIMED and report.measured is None:
            file.unlink(missing_ok=True)
            continue
        try:
            content = written(report, name)
        except PerfbenchError as error:
            if report.verdict in ("invalid", "fault"):
                file.unlink(missing_ok=True)
            else:
                failed.append(str(error))
        else:
            failed += _write(file, content)
    return failed


def _write(file: Path, content: str | bytes, *, append: bool = False) -> list[str]:
    """What went wrong, in one line, or nothing."""
    try:
        with file.open("ab" if append else "wb") as out:
            out.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        return [f"{file}: can't be written ({error.strerror})"]
    return []
