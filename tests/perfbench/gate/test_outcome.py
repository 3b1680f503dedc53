"""`perfbench gate` and `perfbench compare` as CI calls them: exit codes, files, summaries, and no torch."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from perfbench.cli import main
from perfbench.gate import stored
from perfbench.gate.formats import FORMATS, names
from perfbench.gate.gate_report import Report
from tests.perfbench.gate import runs

BASELINE = str(runs.COMMITTED)


def gate(*arguments: str | Path, baseline: str | Path = BASELINE) -> int:
    return main(["gate", "--baseline", str(baseline), *map(str, arguments)])


def one_operation_more(manifest: dict[str, Any]) -> None:
    manifest["cases"][runs.LORA]["exact"]["aten_ops_per_decode_step"] += 1


@pytest.fixture(autouse=True)
def outside_of_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)


def test_the_five_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = runs.copy_of(tmp_path / "worse", manifest=one_operation_more)
    assert gate("--candidate", BASELINE) == 0
    assert capsys.readouterr().out.startswith("PASS: 92 exact figures hold; no timed figure was gated\n")
    assert gate("--candidate", worse) == 1
    assert capsys.readouterr().out.startswith(f"FAIL: {runs.LORA}: aten_ops_per_decode_step: 765 -> 766\n")
    assert gate("--candidate", tmp_path / "none") == 2
    said = capsys.readouterr()
    assert said.out.startswith("INVALID INPUT: ")
    assert "Traceback" not in said.err
    halves = [runs.half_of(tmp_path / f"half{rest}", rest) for rest in (0, 1)]
    assert gate("--candidate", halves[1], baseline=halves[0]) == 3
    assert capsys.readouterr().out.startswith("INCONCLUSIVE: ")

    def fault(*_: Any, **__: Any) -> None:
        raise TypeError("planted")

    monkeypatch.setattr(stored, "compare", fault)
    assert gate("--candidate", BASELINE) == 4
    assert capsys.readouterr().out.startswith("HARNESS FAULT: TypeError: planted")


def test_a_format_that_fails_is_a_fault_and_no_regression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def infinite(report: Report) -> str:
        if report.findings:
            raise ValueError("Out of range float values are not JSON compliant")
        return "written\n"

    monkeypatch.setitem(FORMATS, "json", infinite)
    assert gate("--candidate", BASELINE, *(f"--write={name}={tmp_path / name}" for name in ("json", "junit"))) == 4
    assert capsys.readouterr().out.startswith("HARNESS FAULT: ValueError: Out of range")
    assert (tmp_path / "json").read_text() == "written\n"
    assert ElementTree.parse(tmp_path / "junit").getroot().attrib["errors"] == "1"


def test_every_format_is_written(tmp_path: Path) -> None:
    there = [name for name in names() if name != "parquet" or importlib.util.find_spec("pyarrow")]
    writes = [f"--write={name}={tmp_path / name}" for name in there]
    assert gate("--candidate", BASELINE, *writes) == 0
    assert all((tmp_path / name).stat().st_size for name in there)


def test_bad_input_replaces_the_files_of_an_earlier_run(tmp_path: Path) -> None:
    writes = [f"--write={name}={tmp_path / name}" for name in ("junit", "json", "pytest-benchmark")]
    assert gate("--candidate", BASELINE, *writes) == 0
    assert gate("--candidate", tmp_path / "none", *writes) == 2
    assert ElementTree.parse(tmp_path / "junit").getroot().attrib["errors"] == "1"
    assert json.loads((tmp_path / "json").read_text())["verdict"] == "invalid"
    assert not (tmp_path / "pytest-benchmark").exists()


@pytest.mark.parametrize(
    ("write", "words"),
    [
        ("junit", "expected FORMAT=FILE"),
        ("juni=x", "did you mean 'junit'?"),
        ("junit=no/such/folder/x", "no folder no/such/folder"),
    ],
)
def test_a_write_that_can_not_be_is_refused(write: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate("--candidate", BASELINE, "--write", write) == 2
    assert words in capsys.readouterr().err


def test_a_pass_that_could_not_be_written_is_no_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate("--candidate", BASELINE, "--write", f"junit={tmp_path}") == 2
    assert "can't be written" in capsys.readouterr().err


def test_a_format_of_timed_samples_is_refused_before_a_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It printed PASS first, and then left with 2."""
    assert gate("--candidate", BASELINE, "--exact-only", "--write", f"pytest-benchmark={tmp_path / 'x'}") == 2
    said = capsys.readouterr()
    assert "pytest-benchmark holds timed samples" in said.err
    assert said.out == ""


def test_on_github_the_summary_grows_and_annotations_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("of an earlier step\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    worse = runs.copy_of(tmp_path / "worse", manifest=one_operation_more)
    assert gate("--candidate", worse) == 1
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("::")]
    assert commands[0].startswith("::error title=perfbench::FAIL")
    assert len(commands) == 2
    assert summary.read_text().startswith("of an earlier step\n### FAIL: ")


def test_a_reader_that_leaves_early_changes_no_exit_code(tmp_path: Path) -> None:
    worse = runs.copy_of(tmp_path / "worse", manifest=one_operation_more)
    for candidate, code in ((worse, 1), (runs.COMMITTED, 0), (tmp_path / "none", 2)):
        junit = tmp_path / f"{code}.xml"
        arguments = ["gate", "--baseline", BASELINE, "--candidate", str(candidate), "--write", f"junit={junit}"]
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "wb") as gone:
            done = subprocess.run([sys.executable, "-m", "perfbench", *arguments], stdout=gone, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (code, b"")
        assert junit.stat().st_size


def test_compare_shows_and_never_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worse = runs.copy_of(tmp_path / "worse", manifest=one_operation_more)
    assert main(["compare", BASELINE, str(worse)]) == 0
    shown = capsys.readouterr().out
    assert "765 -> 766" in shown
    assert "FAIL:" not in shown
    assert main(["compare", BASELINE, str(worse), "--all"]) == 0
    assert capsys.readouterr().out.count("ttft_ms") >= 12
    assert main(["compare", BASELINE, str(tmp_path)]) == 2


BLOCK = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "peft", "triton", "safetensors", "numpy"}:
            raise ModuleNotFoundError(f"No module named {name!r}: blocked")

sys.meta_path.insert(0, Blocked())
from perfbench.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_gate_runs_where_no_torch_is(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(runs.ROOT)}
        command = [sys.executable, "-c", BLOCK, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    done = run("gate", "--baseline", BASELINE, "--candidate", BASELINE, "--write", "junit=junit.xml")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("PASS: ")
    # The block itself works: what needs torch can't be imported.
    done = run("roof", "--device", "here")
    assert "blocked" in done.stderr
