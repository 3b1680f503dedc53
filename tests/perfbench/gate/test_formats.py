"""Each format as its consumer reads it, with names that try to break out of it."""

from __future__ import annotations

import html.parser
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from perfbench.errors import PerfbenchError
from perfbench.figures.metrics import METRICS
from perfbench.gate import policy, stored
from perfbench.gate.formats import MAX_ANNOTATIONS, names, written
from perfbench.gate.gate_report import EXIT_CODES, WORDS, Finding, Measured, Report, judge
from perfbench.gate.text import one_line, print_report, shared_prefix
from tests.perfbench.gate import runs

HOSTILE = (
    "a]]>\"'&<script>alert(1)</script>|`x`|@team [l](javascript:0) https://e.example www.e.example #1\n"
    "::error::x\r\n##[error]y\x00\x1b[31m\u202e\ud800\u2028%0A::set-env name=A::b"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, baseline: Path) -> Report:
    """A real comparison of six processes a side, 10% slower, one operation more in one case."""
    run = runs.half_of(tmp_path_factory.mktemp("run") / "r", 1, sample=runs.slower_by(0.1, quiet=True))
    manifest = json.loads((run / "run.json").read_text())
    manifest["cases"][runs.LORA]["exact"]["aten_ops_per_decode_step"] += 1
    (run / "run.json").write_text(json.dumps(manifest))
    sides = [stored.load(path, exact_only=False) for path in (baseline, run)]
    return stored.compare(policy.load(None), *sides)


@pytest.fixture(scope="module")
def hostile() -> Report:
    findings = [Finding("case", f"{HOSTILE}/{number}", "", "fail", note=f"crashed ({HOSTILE})") for number in range(20)]
    findings.append(Finding("exact", HOSTILE, "bytes_per_tenant", "fail", 1, 2, 1.0, note=HOSTILE))
    measured = Measured({"checkout": None, "cpu": {"model": HOSTILE}}, "2026-01-01", {HOSTILE: [1.0, 2.0]})
    return judge(HOSTILE, HOSTILE, findings, [HOSTILE], measured)


def text(report: Report, **how: Any) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100, highlight=False)
    print_report(report, console=console, **how)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_verdict_line_is_first(report: Report) -> None:
    assert report.verdict == "regression"
    lines = text(report).splitlines()
    assert lines[0] == report.headline
    assert lines[0].startswith("FAIL: 12 cases (*): decode_tokens_per_s: slower by +")
    assert "(and 1 more)" in lines[0]
    assert any("aten_ops_per_decode_step" in line and "765 -> 766" in line for line in lines)
    assert max(map(len, text(report, every=True).splitlines()[4:])) < 200
    assert written(report, "markdown").splitlines()[0].startswith("### FAIL: 12 cases")


def test_a_terminal_shows_no_control_characters(hostile: Report) -> None:
    shown = text(hostile)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e\u2028\ud800]", shown)
    assert not [line for line in shown.splitlines() if line.lstrip().startswith("::")]
    assert "##[" not in shown
    shown.encode()


def test_one_line_leaves_names_alone() -> None:
    for name in (runs.LORA, "Größe ± 3 µs", "模型/lora"):
        assert one_line(name) == name
    assert one_line(" ::error::x") == ": :error::x"


def test_the_shared_prefix_ends_at_a_slash() -> None:
    assert shared_prefix(["a/b/cd", "a/b/ce"]) == "a/b/"
    assert shared_prefix(["a/b", "a/b"]) == ""
    assert shared_prefix(["a", "b"]) == ""


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)


def test_markdown_has_only_our_own_markup(hostile: Report) -> None:
    """Read by a CommonMark parser with GitHub's tables: no tag, link or mention comes from a name."""
    from markdown_it import MarkdownIt

    source = written(hostile, "markdown")
    source.encode()
    rendered = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(source)
    tags = _Tags()
    tags.feed(rendered)
    ours = {"h3", "ul", "li", "p", "code", "table", "thead", "tbody", "tr", "th", "td", "details", "summary"}
    assert set(tags.tags) <= ours
    rows = [row for row in source.splitlines() if row.startswith("| ")]
    assert {row.count("|") for row in rows} == {7}
    outside_code = re.sub(r"`[^`]*`", "", source)
    assert not re.search(r"@\w|://|www\.", outside_code)


def test_junit_is_what_a_test_reporter_reads(report: Report, hostile: Report) -> None:
    root = ElementTree.fromstring(written(report, "junit"))
    cases = root.findall("testsuite/testcase")
    assert root.tag == "testsuites"
    assert int(root.attrib["tests"]) == len(cases) == len(report.findings) + 1
    assert int(root.attrib["failures"]) == len(root.findall(".//failure")) == 3
    assert all(case.get("classname") and case.get("name") for case in cases)
    failed = {case.get("name") for case in cases if case.find("failure") is not None}
    assert failed == {"verdict", "decode_tokens_per_s", "aten_ops_per_decode_step"}
    names = [case.get("classname") for case in ElementTree.fromstring(written(hostile, "junit")).iter("testcase")]
    assert any("<script>" in str(name) for name in names), "escaped, not lost"


@pytest.mark.parametrize("verdict", ["invalid", "fault", "inconclusive"])
def test_junit_of_what_is_no_pass_has_an_error(verdict: str) -> None:
    root = ElementTree.fromstring(written(Report(verdict, "why"), "junit"))
    assert root.attrib["errors"] == "1"
    assert written(Report(verdict, "why"), "annotations").startswith(
        "::warning " if verdict == "inconclusive" else "::error "
    )


def test_annotations_are_one_command_a_line(hostile: Report) -> None:
    lines = written(hostile, "annotations").splitlines()
    assert len(lines) == MAX_ANNOTATIONS
    for line in lines:
        command = re.fullmatch(r"::(error|warning|notice) title=([^:,]*)::(.*)", line)
        assert command, line
        assert "##[" not in line
        # What the runner decodes is one line again.
        decoded = command[3].replace("%0D", "\r").replace("%0A", "\n").replace("%25", "%")
        assert "\n" not in decoded
        assert "\r" not in decoded


def test_github_action_benchmark_reads_its_two_formats(report: Report) -> None:
    """Its reader takes a list of objects with name, unit, a number as value, and optional texts range and extra."""
    entry = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1},
            "unit": {"type": "string"},
            "value": {"type": "number"},
            "range": {"type": "string"},
            "extra": {"type": "string"},
        },
        "required": ["name", "unit", "value"],
        "additionalProperties": False,
    }
    bigger, smaller = (json.loads(written(report, f"github-benchmark-{which}")) for which in ("bigger", "smaller"))
    for entries, better in ((bigger, ("higher",)), (smaller, ("lower", None))):
        jsonschema.validate(entries, {"type": "array", "items": entry, "minItems": 1})
        assert {METRICS[one["name"].rsplit(" ", 1)[1]].better for one in entries} <= set(better)
    names = [one["name"] for one in bigger + smaller]
    assert len(names) == len(set(names)), "a name twice would be one chart of two figures"
    (ops,) = [one for one in smaller if one["name"] == f"{runs.LORA} aten_ops_per_decode_step"]
    assert (ops["value"], ops["unit"]) == (766, "operations")


def test_bencher_reads_its_metric_format(report: Report, hostile: Report) -> None:
    """The published JSON Schema of BMF, and the published limits of names: 1024 and 64 characters."""
    metric = {
        "type": "object",
        "properties": {key: {"type": "number"} for key in ("value", "lower_value", "upper_value")},
        "required": ["value"],
    }
    schema = {
        "type": "object",
        "patternProperties": {".+": {"type": "object", "patternProperties": {".+": metric}}},
    }
    for one in (report, hostile):
        found = json.loads(written(one, "bencher"))
        jsonschema.validate(found, schema)
        assert found
        assert all(0 < len(name) <= 1024 for name in found)
        assert all(0 < len(measure) <= 64 for measures in found.values() for measure in measures)
    assert json.loads(written(report, "bencher"))[runs.LORA]["aten_ops_per_decode_step"] == {"value": 766}


def test_names_too_long_for_bencher_stay_apart() -> None:
    findings = [Finding("exact", "x" * 2000 + end, "bytes_per_tenant", "pass", 1, 1, 0.0) for end in "ab"]
    assert len(json.loads(written(judge("", "", findings), "bencher"))) == 2


@pytest.mark.parametrize("verdict", list(EXIT_CODES))
def test_a_badge_says_the_verdict(verdict: str) -> None:
    """With the fields that shields.io's endpoint badge asks for."""
    found = json.loads(written(Report(verdict, "why"), "badge"))
    assert found["schemaVersion"] == 1
    assert (found["label"], found["message"]) == ("perfbench", WORDS[verdict].lower())
    assert (found["color"] == "brightgreen") == (verdict == "pass")


def test_pytest_benchmark_itself_reads_its_format(tmp_path: Path, report: Report) -> None:
    saved = tmp_path / "0001_candidate.json"
    saved.write_text(written(report, "pytest-benchmark"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(saved), "--columns=median,iqr,ops,rounds,outliers"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("-eager") == 12
    # What github-action-benchmark's `pytest` tool reads of the same file.
    for one in json.loads(saved.read_text())["benchmarks"]:
        assert one["fullname"] == f"{one['group']}/{one['name']}"
        stats = one["stats"]
        assert stats["ops"] == pytest.approx(1 / stats["mean"])
        assert (stats["rounds"], stats["iterations"]) == (50, 1)
        assert stats["min"] <= stats["ld15iqr"] <= stats["q1"] <= stats["median"] <= stats["hd15iqr"] <= stats["max"]


def test_pytest_benchmark_needs_samples() -> None:
    with pytest.raises(PerfbenchError, match="no timed samples"):
        written(Report("pass", ""), "pytest-benchmark")


def test_json_has_every_finding(report: Report, hostile: Report) -> None:
    found = json.loads(written(report, "json"))
    assert (found["verdict"], found["exit_code"], len(found["findings"])) == ("regression", 1, len(report.findings))
    assert json.loads(written(hostile, "json"))["notes"] == [HOSTILE]


@pytest.mark.parametrize("name", names())
def test_every_format_survives_hostile_names(name: str, hostile: Report) -> None:
    if name == "parquet":
        pytest.importorskip("pyarrow")
    content = written(hostile, name)
    assert content.encode() if isinstance(content, str) else content
