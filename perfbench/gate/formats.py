"""A gate's report in every format: those of `perfbench.report.formats`, and what CI servers, dashboards and test
tools read, which FORMATS names. Free of torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from perfbench.errors import PerfbenchError
from perfbench.figures.metrics import METRICS
from perfbench.figures.stats import summary
from perfbench.files.plain_text import one_line
from perfbench.gate.gate_report import WORDS, Finding, Report
from perfbench.gate.text import change_words, columns_of, markdown, print_report, sides, unit_of
from perfbench.report import formats

# What GitHub shows of one kind of annotation per step; the rest would be dropped in silence.
MAX_ANNOTATIONS = 10
# The longest name of a benchmark that Bencher takes.
MAX_NAME = 1024


def junit(report: Report) -> str:
    """JUnit XML: a test case for the verdict and one for each finding; what is not gated is skipped."""
    suite = ElementTree.Element("testsuite", name="perfbench")
    counts = {"failure": 0, "error": 0, "skipped": 0}

    def add(classname: str, name: str, outcome: str | None, kind: str, message: str) -> None:
        test = ElementTree.SubElement(suite, "testcase", classname=one_line(classname), name=one_line(name), time="0")
        if outcome is not None:
            counts[outcome] += 1
            child = ElementTree.SubElement(test, outcome, message=one_line(message))
            if outcome != "skipped":
                child.set("type", kind)
                child.text = one_line(message)

    outcome = {"pass": None, "regression": "failure"}.get(report.verdict, "error")
    add("perfbench", "verdict", outcome, report.verdict, report.headline)
    outcomes = {"fail": "failure", "inconclusive": "error", "shown": "skipped", "pass": None}
    for one in report.findings:
        message = f"{one.note} {change_words(one)}" if one.change is not None else one.note
        add(one.case or "perfbench", one.figure or "is measured", outcomes[one.status], one.status, message)
    totals = {"failures": counts["failure"], "errors": counts["error"], "skipped": counts["skipped"]}
    numbers = {key: str(value) for key, value in {"tests": len(suite), **totals}.items()}
    suite.attrib.update(numbers)
    root = ElementTree.Element("testsuites", numbers)
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def github_annotations(report: Report) -> str:
    """GitHub workflow commands: the verdict, then what failed or stayed open, at most MAX_ANNOTATIONS in all."""
    level = {"pass": "notice", "inconclusive": "warning"}.get(report.verdict, "error")
    lines = [_command(level, "perfbench", report.headline)]
    for one in report.of("fail", "inconclusive")[: MAX_ANNOTATIONS - 1]:
        title = f"{one.case}: {one.figure}" if one.figure else one.case
        lines.append(_command("error" if one.status == "fail" else "warning", title, one.note))
    return "\n".join(lines) + "\n"


def _command(level: str, title: str, message: str) -> str:
    """One workflow command, with everything escaped that could end it or begin another."""
    data = one_line(message).replace("%", "%25")
    property_ = one_line(title).replace("%", "%25").replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={property_}::{data}"


def _values(report: Report) -> Iterator[Finding]:
    """The findings that have a value of the candidate, one for each case and figure."""
    seen = set()
    for one in report.findings:
        if one.figure and one.candidate is not None and (one.case, one.figure) not in seen:
            seen.add((one.case, one.figure))
            yield one


def _bounded_name(name: str) -> str:
    """At most MAX_NAME characters; what was cut stays told apart by a hash."""
    clean = one_line(name) or "unnamed"
    if len(clean) <= MAX_NAME:
        return clean
    return f"{clean[: MAX_NAME - 9]}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}"


def _custom(report: Report, *, bigger: bool) -> str:
    """github-action-benchmark's `customBiggerIsBetter` or `customSmallerIsBetter`."""
    entries = [
        {
            "name": _bounded_name(f"{one.case} {one.figure}"),
            "unit": unit_of(one.figure),
            "value": one.candidate,
            "extra": one_line(f"baseline {one.baseline}, change {change_words(one)}, {one.status}"),
        }
        for one in _values(report)
        if (METRICS[one.figure].better == "higher") == bigger
    ]
    return _json(entries)


def badge(report: Report) -> str:
    """The JSON of an endpoint badge of shields.io: the verdict, in its colour."""
    color = {"pass": "brightgreen", "regression": "red", "inconclusive": "yellow"}.get(report.verdict, "lightgrey")
    return _json({"schemaVersion": 1, "label": "perfbench", "message": WORDS[report.verdict].lower(), "color": color})


def bencher(report: Report) -> str:
    """Bencher Metric Format: benchmark -> measure -> value."""
    found: dict[str, dict[str, Any]] = {}
    for one in _values(report):
        found.setdefault(_bounded_name(one.case), {})[one.figure] = {"value": one.candidate}
    return _json(found)


def pytest_benchmark(report: Report) -> str:
    """pytest-benchmark's saved JSON, which `pytest-benchmark compare` reads: the whole generate call of each case of
    the candidate, in seconds.

    Raises PerfbenchError where the comparison has no timed samples.
    """
    if report.measured is None or not report.measured.total_ms:
        raise PerfbenchError("pytest-benchmark: this comparison has no timed samples")
    environment, checkout = report.measured.environment, report.measured.environment.get("checkout") or {}
    return _json(
        {
            "machine_info": _machine_info(environment),
            "commit_info": {
                "id": checkout.get("commit") or "unknown",
                "dirty": bool(checkout.get("dirty")),
                "time": report.measured.started_at,
                "author_time": report.measured.started_at,
                "project": "perfbench",
                "branch": "(unknown)",
            },
            "benchmarks": [
                _benchmark(case, [ms / 1e3 for ms in total_ms])
                for case, total_ms in report.measured.total_ms.items()
                if total_ms
            ],
            "datetime": report.measured.started_at,
            "version": "5.0.0",
        }
    )


def _machine_info(environment: Mapping[str, Any]) -> dict[str, Any]:
    cpu = environment.get("cpu") or {}
    implementation, _, version = str(environment.get("python") or "").partition(" ")
    return {
        "node": "unknown",
        "processor": "",
        "machine": str(environment.get("os") or "").rpartition(",")[0],
        "python_implementation": implementation,
        "python_implementation_version": version,
        "python_version": version,
        "python_build": ["", ""],
        "python_compiler": "",
        "release": "",
        "system": str(environment.get("os") or ""),
        "cpu": {"brand_raw": str(cpu.get("model") or ""), "count": cpu.get("logical_cores")},
        "gpus": [gpu.get("name") for gpu in environment.get("gpus") or []],
    }


def _benchmark(case: str, seconds: Sequence[float]) -> dict[str, Any]:
    group, _, name = one_line(case).rpartition("/")
    return {
        "group": group or None,
        "name": name,
        "fullname": one_line(case),
        "params": None,
        "param": None,
        "extra_info": {},
        "options": {
            "disable_gc": True,
            "timer": "perf_counter",
            "min_rounds": len(seconds),
            "max_time": 0.0,
            "min_time": 0.0,
            "warmup": True,
        },
        "stats": _statistics(seconds),
    }


def _statistics(seconds: Sequence[float]) -> dict[str, Any]:
    """pytest-benchmark's fields, from `perfbench.figures.stats.summary` and the outliers that it adds."""
    found = dict(summary(seconds))
    q1, q3 = float(found["q1"] or 0), float(found["q3"] or 0)
    iqr, mean, deviation = q3 - q1, float(found["mean"] or 0), float(found["stddev"] or 0)
    within = [value for value in seconds if q1 - 1.5 * iqr <= value <= q3 + 1.5 * iqr]
    iqr_outliers = len(seconds) - len(within)
    stddev_outliers = sum(not mean - deviation <= value <= mean + deviation for value in seconds)
    return found | {
        "stddev": deviation,
        "iqr_outliers": iqr_outliers,
        "stddev_outliers": stddev_outliers,
        "outliers": f"{stddev_outliers};{iqr_outliers}",
        "ld15iqr": min(within),
        "hd15iqr": max(within),
        "ops": 1 / mean,
        "total": sum(seconds),
        "iterations": 1,
        "data": list(seconds),
    }


def as_json(report: Report) -> str:
    """Everything of the report, as it is."""
    return _json(
        {
            "verdict": report.verdict,
            "exit_code": report.exit_code,
            "reason": report.reason,
            "baseline": report.baseline,
            "candidate": report.candidate,
            "notes": list(report.notes),
            "findings": [vars(one) for one in report.findings],
        }
    )


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Judged:
    """A report as a Subject of `report.formats`."""

    report: Report

    def print(self, console: Any) -> None:
        """What `gate` prints."""
        print_report(self.report, console=console)

    def markdown(self) -> str:
        """For a pull request or a step's summary."""
        return markdown(self.report)

    def records(self) -> list[dict[str, Any]]:
        """A row for each finding."""
        return [
            {name: one_line(value) if isinstance(value, str) else value for name, value in vars(one).items()}
            for one in self.report.findings
        ]

    def page(self) -> str:
        """The verdict and every finding."""
        from perfbench.report.page import page

        columns = columns_of("")
        table = {
            "caption": "",
            "columns": columns,
            "rows": [[of.cell(one) for of in columns] for one in self.report.findings],
        }
        lines = [one_line(f"{one.case} {one.figure}: {one.note}") for one in self.report.findings if one.note]
        return page(
            title=one_line(self.report.headline),
            lead=[one_line(line) for line in sides(self.report)],
            notices=[one_line(note) for note in self.report.notes],
            comparisons=[{"title": "Every figure", "tables": [table], "lines": lines, "charts": None}],
            comparisons_title="What was compared",
            open_first=1,
            charts=[],
            colors={},
        )


# What readers of a CI server, of a dashboard or of a test tool take; every other word of --write is one of
# `report.formats.FORMATS`.
FORMATS: dict[str, Callable[[Report], str]] = {
    "junit": junit,
    "annotations": github_annotations,
    "github-benchmark-bigger": lambda report: _custom(report, bigger=True),
    "github-benchmark-smaller": lambda report: _custom(report, bigger=False),
    "badge": badge,
    "bencher": bencher,
    "pytest-benchmark": pytest_benchmark,
    "json": as_json,
}


# Formats of nothing but timed samples: a comparison that timed none has no file in them.
TIMED = ("pytest-benchmark",)


def names() -> list[str]:
    """Every format of a report."""
    return list(dict.fromkeys((*FORMATS, *formats.FORMATS)))


def written(report: Report, name: str) -> str | bytes:
    """`report` in one of `names`. PerfbenchError where it can't be had in it."""
    return FORMATS[name](report) if name in FORMATS else formats.rendered(Judged(report), name)
