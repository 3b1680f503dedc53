"""`perfbench history`: importing twice changes nothing, a planted slow-down is marked, what is bad is named."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from perfbench.cli import main
from perfbench.errors import PerfbenchError
from perfbench.figures.metrics import METRICS
from perfbench.history.store import find_runs, open_store

ROOT = Path(__file__).parents[3]
REAL = ROOT / "results" / "cpu-256x8" / "q8-none-1"
STATIC = "llama-256x8-fp32-cpu/static/p32-n16-b1-q8-t8-r8-distinct/none-eager"


def run_of(folder: Path, number: int, *, speed: float = 1.0, **changes: Any) -> Path:
    """A copy of the real run, measured `number` minutes later on another commit, `speed` times as fast."""
    path = folder / f"run-{number:02}"
    shutil.copytree(REAL, path)
    manifest = json.loads((path / "run.json").read_text()) | {"started_at": f"2026-11-22T08:{number:02}:00+00:00"}
    manifest["environment"]["checkout"] = {"commit": f"{number:040x}", "dirty": False}
    for case in manifest["cases"].values():
        jitter = 1 + 0.004 * (number * 7 % 5 - 2)
        case["summary"]["decode_tokens_per_s"]["median"] *= speed * jitter
    (path / "run.json").write_text(json.dumps(manifest | changes))
    return path


@pytest.fixture
def slower(tmp_path: Path) -> Path:
    """16 runs, the last 8 of which are 10% slower."""
    folder = tmp_path / "runs"
    for number in range(16):
        run_of(folder, number, speed=1.0 if number < 8 else 0.9)
    return folder


def contents(store: Path) -> list[Any]:
    with sqlite3.connect(store) as connection:
        asked = (f"SELECT * FROM {name} ORDER BY 1, 2, 3, 5" for name in ("runs", "figures"))
        rows = [connection.execute(query).fetchall() for query in asked]
    connection.close()
    return rows


def test_importing_twice_changes_nothing(slower, tmp_path, capsys):
    store = tmp_path / "history.sqlite"
    assert main(["history", str(slower), "--store", str(store)]) == 0
    before = contents(store)
    assert len(before[0]) == 16
    # Again, one by one, and from another place.
    shutil.copytree(slower, tmp_path / "elsewhere")
    again = [str(slower / "run-03"), str(slower), str(tmp_path / "elsewhere")]
    capsys.readouterr()
    assert main(["history", *again, "--store", str(store)]) == 0
    assert "32 runs: 32 unchanged" in capsys.readouterr().err
    assert contents(store) == before


def test_a_resumed_run_takes_the_place_of_its_former_self(tmp_path):
    path = run_of(tmp_path, 1)
    with open_store(tmp_path / "s", create=True) as store:
        assert store.add(path) == "new"
        manifest = json.loads((path / "run.json").read_text()) | {"finished_at": "2026-11-23T00:00:00+00:00"}
        manifest["cases"][STATIC]["summary"]["decode_tokens_per_s"]["median"] = 1.5
        (path / "run.json").write_text(json.dumps(manifest))
        assert store.add(path) == "changed"
        (series,) = store.series("decode_tokens_per_s", STATIC)
        assert [point.value for point in series.points] == [1.5]


def test_a_metric_declared_since_is_imported_from_runs_that_are_there(tmp_path, monkeypatch):
    path = run_of(tmp_path, 1)
    with open_store(tmp_path / "s", create=True) as store:
        assert store.add(path) == "new"
        monkeypatch.setitem(METRICS, "slow_step_ms", METRICS["itl_p95_ms"])
        assert store.add(path) == "changed"
        (series,) = store.series("slow_step_ms", STATIC)
        samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
        steps = sorted(ms for one in samples if one["case"] == STATIC for ms in one["itl_ms"])
        assert len(steps) == 300
        assert steps[284] <= series.points[0].value <= steps[285]
        with pytest.raises(PerfbenchError, match="no run has itl_p99_ms"):
            store.series("itl_p99_ms", STATIC)


def test_a_planted_slow_down_is_marked_where_it_is(slower, tmp_path, capsys):
    arguments = ["history", str(slower), "--store", str(tmp_path / "s"), "--case", STATIC]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    marked = [line for line in lines if "(worse)" in line]
    assert len(marked) == 1
    assert f"{8:040x}"[:9] in marked[0]
    assert "-10" in marked[0] or "-9." in marked[0]
    assert main([*arguments, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["change"] != "" for row in rows] == [number == 8 for number in range(16)]


def test_no_change_is_marked_without_one(tmp_path, capsys):
    for number in range(16):
        run_of(tmp_path / "runs", number)
    assert main(["history", str(tmp_path / "runs"), "--store", str(tmp_path / "s"), "--case", STATIC]) == 0
    assert "worse" not in capsys.readouterr().out


def test_every_difference_of_an_exact_figure_is_a_change(tmp_path, capsys):
    paths = [run_of(tmp_path / "runs", number) for number in range(3)]
    manifest = json.loads((paths[2] / "run.json").read_text())
    manifest["cases"][STATIC]["exact"]["aten_ops_per_decode_step"] += 1
    (paths[2] / "run.json").write_text(json.dumps(manifest))
    arguments = ["history", str(tmp_path / "runs"), "--store", str(tmp_path / "s"), "--case", STATIC]
    assert main([*arguments, "--figure", "aten_ops_per_decode_step"]) == 0
    assert "(worse)" in capsys.readouterr().out


def test_machines_and_options_are_never_mixed(tmp_path):
    other = json.loads((REAL / "run.json").read_text())
    other["environment"]["cpu"]["model"] = "Another CPU"
    options = json.loads((REAL / "run.json").read_text())["cases"]
    options[STATIC]["options"] = {"rank": 8}
    paths = [
        run_of(tmp_path, 1), run_of(tmp_path, 2, environment=other["environment"]), run_of(tmp_path, 3, cases=options),
    ]  # fmt: skip
    with open_store(tmp_path / "s", create=True) as store:
        for path in paths:
            store.add(path)
        assert len(store.series("decode_tokens_per_s", STATIC)) == 3
        (only,) = store.series("decode_tokens_per_s", STATIC, machine="another")
        assert only.machine == "Another CPU, 2 threads"
        with pytest.raises(PerfbenchError, match="no run on a machine like 'H200'"):
            store.series("decode_tokens_per_s", machine="H200")
        with pytest.raises(PerfbenchError, match="did you mean 'kept'"):
            store.series("kpt")
        with pytest.raises(PerfbenchError, match="no run has decode_tokens_per_s of a case that matches 'nothing'"):
            store.series("decode_tokens_per_s", "nothing")


def test_bad_and_unfinished_runs_are_named_and_the_rest_is_imported(tmp_path, capsys):
    run_of(tmp_path / "runs", 1)
    run_of(tmp_path / "runs", 2, finished_at=None)
    run_of(tmp_path / "runs", 3, schema_version=1)
    assert main(["history", str(tmp_path / "runs"), "--store", str(tmp_path / "s"), "--case", STATIC]) == 2
    said = capsys.readouterr()
    assert "run-02: still being written, or stopped" in said.err
    assert "schema_version: expected 2, got 1" in said.err
    assert "3 runs: 1 new, 1 unfinished, 1 refused" in said.err
    assert len(contents(tmp_path / "s")[0]) == 1


def test_where_all_was_refused_nothing_more_is_said(tmp_path, capsys):
    (run_of(tmp_path, 1) / "run.json").write_text("{")
    assert main(["history", str(tmp_path / "run-01"), "--store", str(tmp_path / "history.sqlite")]) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["perfbench", "1 runs"]


def test_what_is_no_run_is_skipped_and_counted(tmp_path, capsys):
    run_of(tmp_path / "runs", 1)
    for name, content in (("training", {"schema_version": 2, "kind": "finetune"}), ("other", {"run": 3}), ("list", [])):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps(content))
    assert main(["history", str(tmp_path / "runs"), "--store", str(tmp_path / "s"), "--case", STATIC]) == 0
    assert capsys.readouterr().err == "1 runs: 1 new; skipped 3 that are no runs of perfbench run\n"
    # Given by itself it was meant; one that can't be read may be a damaged run.
    given = [str(tmp_path / "runs"), str(tmp_path / "runs" / "training")]
    assert main(["history", *given, "--store", str(tmp_path / "s"), "--case", STATIC]) == 2
    assert "a run of `perfbench finetune`" in capsys.readouterr().err
    (tmp_path / "runs" / "list" / "run.json").write_text("[")
    assert main(["history", given[0], "--store", str(tmp_path / "s"), "--case", STATIC]) == 2
    assert "not valid JSON" in capsys.readouterr().err


def test_a_bad_store_is_one_line(tmp_path, capsys):
    (tmp_path / "text").write_text("this is no database, and long enough to be looked at as one" * 20)
    with sqlite3.connect(tmp_path / "newer") as connection:
        connection.execute("PRAGMA user_version = 7")
        connection.execute("CREATE TABLE other (x)")
    connection.close()
    for store, said in (
        (tmp_path / "none", "there is no store yet"),
        (tmp_path / "text", "can't be used (file is not a database)"),
        (tmp_path / "newer", "expected a store of version 1, got 7"),
        (tmp_path / "text" / "below", "can't be used"),
    ):
        runs = [] if store.name == "none" else [str(REAL)]
        assert main(["history", *runs, "--store", str(store)]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    with pytest.raises(PerfbenchError, match="found none"):
        find_runs([tmp_path / "nowhere"])


def test_the_page_marks_the_change_in_a_browser(slower, tmp_path, browser, capsys):
    page = tmp_path / "history.html"
    assert main(["history", str(slower), "--store", str(tmp_path / "s"), "--html", str(page)]) == 0
    tab = browser.open(page, height=5000)
    tab.wait_for("document.querySelectorAll('figure svg').length === 2")
    assert tab.complaints() == []
    assert tab.requests() == [page.as_uri()]
    marks = "[...document.querySelectorAll('svg text')].filter(text => text.textContent.includes('worse')).length"
    assert tab.ask(marks) == 2
