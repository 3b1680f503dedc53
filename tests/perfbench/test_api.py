"""`import perfbench`: its surface, a run from Python, and that the command line calls the same functions."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import perfbench
from perfbench import api
from perfbench.cli import main
from perfbench.errors import PerfbenchError, RunDirectoryError, ScenarioError
from perfbench.report.rows import rows

ROOT = Path(__file__).parents[2]
STORED = ROOT / "results" / "cpu-256x8" / "q8-none-1"


def test_the_public_surface_is_this() -> None:
    surface = ["Accuracy", "PerfbenchError", "Run", "Search", "__version__", "accuracy", "load", "run", "search"]
    assert perfbench.__all__ == surface
    common = "set, out, resume, say"
    for function, parameters in (
        (perfbench.run, "scenario, set, case, out, resume, retry_failed, large, plugins, say"),
        (perfbench.load, "path"),
        (perfbench.accuracy, "config, set, out, resume, run, say"),
        (perfbench.search, f"config, {common}"),
        (perfbench.Run.rows, "self, samples"),
        (perfbench.Run.to_pandas, "self, samples"),
        (perfbench.Run.to_html, "self, out"),
    ):
        assert ", ".join(inspect.signature(function).parameters) == parameters
        assert inspect.getdoc(function)
    properties = {name for name, value in vars(perfbench.Run).items() if isinstance(value, property)}
    assert properties == {"manifest", "notices", "exit_code"}


def test_no_module_takes_the_place_of_a_function() -> None:
    """`import perfbench.run` would put the module where the function was."""
    for name in perfbench.__all__:
        assert not (ROOT / "perfbench" / name).exists()
        assert not (ROOT / "perfbench" / f"{name}.py").exists()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[perfbench.Run, list[str]]:
    """(a run of one arm from values, what it said)."""
    said: list[str] = []
    load = {"prompt_tokens": 8, "new_tokens": 4, "requests": 2, "tenants": 2}
    values = {"backbone": "llama-tiny", "dtype": "fp32", "methods": ["lora"], "workload": load, "device": "cpu"}
    out = tmp_path_factory.mktemp("api") / "run"
    settings = {"repetitions": 2, "workload.new_tokens": 5}
    return perfbench.run(values, set=settings, out=out, say=said.append), said


def test_a_run_from_values(measured: tuple[perfbench.Run, list[str]]) -> None:
    run, said = measured
    assert run.exit_code == 0
    found = [(row["arm"], row["new_tokens"], row["check"]) for row in run.rows()]
    assert found == [("none", 5, "ok"), ("lora", 5, "ok")]
    assert run.rows() == perfbench.load(run.path).rows()
    for row, shown in zip(run.rows(), rows(run.manifest), strict=True):
        assert row.items() >= shown.items()
    samples = sorted((row["arm"], row["round"]) for row in run.rows(samples=True))
    assert samples == [("lora", 0), ("lora", 1), ("none", 0), ("none", 1)]
    assert any(line.endswith(f"-> {run.path}") for line in said)
    assert json.loads((run.path / "run.json").read_text())["cases"].keys() == run.manifest["cases"].keys()


def test_the_page_is_that_of_report(measured: tuple[perfbench.Run, list[str]], tmp_path: Path) -> None:
    run, _ = measured
    page = run.to_html(tmp_path / "mine.html")
    assert main(["report", str(run.path), "--out", str(tmp_path / "theirs.html")]) == 0
    assert page.encode() == (tmp_path / "mine.html").read_bytes() == (tmp_path / "theirs.html").read_bytes()


def test_pandas_gets_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made = types.ModuleType("pandas")
    made.DataFrame = lambda data: ("frame", data)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", made)
    run = perfbench.load(STORED)
    assert run.to_pandas() == ("frame", run.rows())
    assert run.to_pandas(samples=True) == ("frame", run.rows(samples=True))


def test_pandas_itself() -> None:
    pandas = pytest.importorskip("pandas", reason="needs pandas, the extra [pandas]")
    run = perfbench.load(STORED)
    frame = run.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["arm"]) == [row["arm"] for row in run.rows()]
    assert list(frame.columns) == list(run.rows()[0])


def test_without_pandas_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(PerfbenchError, match=r"^to_pandas: needs pandas.*adapter-perfbench\[pandas\]") as refused:
        perfbench.load(STORED).to_pandas()
    assert "\n" not in str(refused.value)


def test_what_can_be_mended_is_one_line(tmp_path: Path) -> None:
    for call, kind, said in (
        (lambda: perfbench.load(tmp_path), RunDirectoryError, "not a run directory"),
        (lambda: perfbench.run("smokes", out=tmp_path), ScenarioError, "did you mean 'smoke'?"),
        (lambda: perfbench.run("smoke", set={"repetitions": 0}, say=str), ScenarioError, "--set repetitions=0"),
        (lambda: perfbench.run("smoke", set="repetitions=0"), PerfbenchError, "set: expected a list"),
        (lambda: perfbench.run("smoke", resume=True, say=str), PerfbenchError, "resume: say with out"),
        (lambda: perfbench.accuracy("accuracy/cpu", set=["margin=9"]), PerfbenchError, "margin"),
        (lambda: perfbench.search("fanlora/skills_cpu", set=["k_max=0"]), PerfbenchError, "k_max"),
    ):
        with pytest.raises(kind) as refused:
            call()
        assert said in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["run", "smoke"], "prepare"),
        (["accuracy", "accuracy/cpu"], "accuracy"),
        (["fanlora", "search", "fanlora/skills_cpu"], "search"),
    ],
)
def test_the_command_line_calls_the_same(command: list[str], name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    def planted(*_: object, **__: object) -> None:
        raise PerfbenchError("it was called")

    monkeypatch.setattr(api, name, planted)
    assert main([*command, "--out", "nowhere"]) == 2
    assert capsys.readouterr().err == "perfbench: it was called\n"


EXAMPLE = ROOT / "docs" / "examples" / "one_run.ipynb"


def test_the_example_notebook_runs(tmp_path: Path) -> None:
    """Its code cells, one after the other in one process; the outputs that are committed name no machine's folder."""
    notebook = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    text = json.dumps([cell.get("outputs") for cell in notebook["cells"]])
    assert not any(word in text for word in ("/home/", "/work", "/tmp", "/root", "/usr"))
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        **{"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 300},
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    printed = [text for cell in notebook["cells"] for out in cell.get("outputs", ()) for text in out.get("text", ())]
    assert done.stdout.splitlines()[:8] == "".join(printed).splitlines()[:8]  # exact figures, the same on every machine
    assert (tmp_path / "report.html").stat().st_size > 10_000
