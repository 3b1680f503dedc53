"""A metric is one entry of METRICS: a made-up one is seen by everything that shows or judges figures."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from perfbench.cli import main
from perfbench.commands import listing
from perfbench.figures.metrics import KINDS, METRICS, SOURCES, Metric
from perfbench.gate import policy, stored
from perfbench.history.store import open_store
from perfbench.report.read import read_runs
from perfbench.report.rows import rows
from perfbench.report.write import sample_rows
from perfbench.run_folder.run_directory import RunDirectory
from tests.perfbench.gate import runs

COUNTED = Metric("widgets", "lower", "widgets turned in a decode step", "exact", "exact")
SAMPLED = Metric("ms", "lower", "the time that a widget takes", "sample", "timed", optional=True)
TAIL = Metric("ms", "lower", "95% of the widgets take at most this", "tail", "timed", tail=("widget_ms", "p95"))


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, metric in (("widgets", COUNTED), ("widget_ms", SAMPLED), ("widget_p95_ms", TAIL)):
        monkeypatch.setitem(METRICS, name, metric)


def run_with_widgets(folder: Path, *, widgets: int = 7) -> Path:
    """The committed run as a perfbench that counts and times widgets would have written it."""
    run = runs.copy_of(folder)
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(line | {"widget_ms": 1.0 + line["round"]}) + "\n" for line in lines)
    (run / "samples.jsonl").write_text(text)
    directory = RunDirectory.open(run)
    for case in directory.manifest["cases"].values():
        case["exact"] = (case["exact"] or {}) | {"widgets": widgets}
    directory.summarise()
    directory.write_manifest()
    return run


def shown(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def test_a_metric_of_one_entry_is_seen_everywhere(
    tmp_path: Path, declared: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with_widgets(tmp_path / "run")
    row = next(row for row in rows(RunDirectory.open(run).manifest) if row["case"] == runs.LORA)
    assert (row["widgets"], row["widget_ms"], row["widget_p95_ms"]) == (7, 50.5, pytest.approx(95.05))

    table = list(csv.DictReader(io.StringIO(shown(capsys, "show", run, "--format", "csv"))))
    assert {(one["widgets"], one["widget_ms"]) for one in table} == {("7", "50.5")}
    text = " ".join(shown(capsys, "show", run, "--columns", "widgets,widget_p95_ms").split())
    assert "lora 7 95.0 ok" in text
    assert "widgets (widgets): widgets turned in a decode step." in text
    assert {one["widget_ms"] for one in sample_rows(read_runs([run]))} == {1.0 + number for number in range(100)}

    with open_store(tmp_path / "store", create=True) as store:
        store.add(run)
        (counted,), (timed,) = (store.series(name, runs.LORA) for name in ("widgets", "widget_ms"))
    assert counted.points[0].value == 7
    assert (timed.points[0].low, timed.points[0].value, timed.points[0].high) == (40.0, 50.5, 61.0)
    assert "widgets turned" in shown(capsys, "history", "--store", tmp_path / "store", "--figure", "widgets")

    console = Console(file=io.StringIO(), width=200)
    listing.render(console=console)
    assert "widgets turned in a decode step [widgets]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_made_up_exact_metric_is_gated_and_a_timed_one_judged_where_it_is_named(
    tmp_path: Path, declared: None
) -> None:
    one, more = (run_with_widgets(tmp_path / str(count), widgets=count) for count in (7, 8))
    sides = [stored.load(path, exact_only=False) for path in (one, more)]
    report = stored.compare(policy.load(None), *sides)
    assert {finding.figure for finding in report.of("fail")} == {"widgets"}
    found = {finding.figure for finding in report.findings if finding.case == runs.LORA and finding.kind == "timed"}
    assert {"widget_ms", "widget_p95_ms", "itl_p95_ms"} <= found
    (tmp_path / "policy.yaml").write_text("timed: {primary: [{figure: widget_ms}]}\nexact: {widgets: {tolerance: 0.2}}")
    rules = policy.load(tmp_path / "policy.yaml")
    assert (rules.primary[0].figure, rules.tolerance("widgets", "x")[0]) == ("widget_ms", 0.2)


def test_a_run_from_before_the_metric_is_shown_with_a_dash(declared: None, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "show", runs.COMMITTED, "--columns", "widgets,widget_ms,widget_p95_ms")
    assert "lora - - - ok" in " ".join(text.split())


def test_every_entry_says_where_it_is_found_and_of_what_kind_it_is() -> None:
    for name, metric in METRICS.items():
        assert metric.source in SOURCES, name
        assert metric.kind in KINDS, name
        assert (metric.tail is not None) == (metric.source == "tail"), name
        assert metric.source == "sample" or not (metric.optional or metric.take), name
        assert metric.kind == "exact" or not metric.one_machine, name
        if metric.tail:
            assert METRICS[metric.tail[0]].source == "sample", name
