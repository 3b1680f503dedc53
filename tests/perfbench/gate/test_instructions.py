"""`perfbench ab --instructions`: on stand-in revisions that say how many they take, and once on the real code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from perfbench.cli import main
from perfbench.errors import PerfbenchError
from perfbench.gate import policy
from perfbench.machine import instructions
from tests.perfbench.gate.test_ab import SAME, SPEED, TINY, WORKER, commit, new_repository, planted

FIGURE = "instructions_per_decode_step"
# The stand-in of test_ab that can count too.
COUNTING = WORKER.replace(
    "code = {}\n",
    """
for case in CASES if job.get("instructions") else []:
    from perfbench.taken import TAKEN
    assert (job["threads"], job["prepare"]) == (1, False)
    emit("counted", case=case, exact={"instructions_per_decode_step": TAKEN})
code = {}
""",
    1,
)
TAKEN = 10_000_000
TOLERANCE = policy.load(None).tolerances[FIGURE]
WITHIN, MORE = round(TAKEN * (1 + TOLERANCE / 2)), round(TAKEN * (1 + 2 * TOLERANCE))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = new_repository(tmp_path_factory.mktemp("repository"))
    files = {"__init__": "", "cli": "", "worker": "", "speed": SPEED.format(SAME)}
    commit(folder, "older", ab_worker=WORKER, **files)
    commit(folder, "base", ab_worker=COUNTING, taken=f"TAKEN = {TAKEN}\n")
    commit(folder, "noise", taken=f"TAKEN = {WITHIN}\n")
    commit(folder, "more", taken=f"TAKEN = {MORE}\n")
    return folder


def ab(folder: Path, out: Path, candidate: str, *more: str, baseline: str = "base") -> dict[str, Any]:
    """The report of a session, with its exit code as `code`."""
    written = out.with_suffix(".json")
    sides = ["--baseline", baseline, "--candidate", candidate]
    arguments = [*sides, str(folder / "scenario.yaml"), "--out", str(out), "--write", f"json={written}"]
    code = main(["ab", *arguments, "--record", "--pairs", "1", "--blocks", "1", *more])
    return {"code": code, **json.loads(written.read_text())}


def of(report: dict[str, Any], *fields: str) -> list[tuple[Any, ...]]:
    """What it says of the figure in each case: status and both values, or these fields."""
    fields = fields or ("status", "baseline", "candidate")
    return [tuple(one[field] for field in fields) for one in report["findings"] if one["figure"] == FIGURE]


@pytest.mark.parametrize(
    ("candidate", "code", "found"),
    [
        ("noise", 0, ("pass", TAKEN, WITHIN)),
        ("more", 1, ("fail", TAKEN, MORE)),
    ],
)
def test_what_becomes_of_a_candidate(
    tmp_path: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    candidate: str,
    code: int,
    found: tuple[str, float, float],
) -> None:
    monkeypatch.chdir(repository)
    monkeypatch.setattr(instructions, "counter", lambda: "perf")
    report = ab(repository, tmp_path / "out", candidate, "--instructions")
    assert (report["code"], of(report)) == (code, [found, found])
    assert of(ab(repository, tmp_path / "without", candidate)) == [], "nothing is counted where nobody asks"


def test_as_much_less_as_two_runs_may_differ_is_no_gain(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    monkeypatch.setattr(instructions, "counter", lambda: "perf")
    for baseline, words in (("noise", ""), ("more", f"better: {MORE:,} -> {TAKEN:,}; renew the baseline")):
        report = ab(repository, tmp_path / baseline, "base", "--instructions", baseline=baseline)
        assert of(report, "note") == [(words,)] * 2


def test_a_baseline_that_can_not_count_yet(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    monkeypatch.setattr(instructions, "counter", lambda: "perf")
    report = ab(repository, tmp_path / "out", "more", "--instructions", baseline="older")
    assert of(report) == [("shown", None, MORE)] * 2


def test_where_nothing_can_count(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is measured, in one line."""

    def none() -> str:
        raise PerfbenchError("instructions can't be counted: install valgrind")

    monkeypatch.chdir(repository)
    monkeypatch.setattr(instructions, "counter", none)
    sides = ["--baseline", "base", "--candidate", "more"]
    assert main(["ab", *sides, "scenario.yaml", "--out", str(tmp_path / "out"), "--instructions"]) == 2
    assert "instructions can't be counted: install valgrind" in capsys.readouterr().out.splitlines()[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_a_loop_planted_in_the_decode_step_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real code, counted by callgrind: the commit adds Python work of which ATen's operations say nothing."""
    (tmp_path / "real").mkdir()
    folder = planted(tmp_path / "real", "loop", "for _ in range(10_000): pass")
    (folder / "scenario.yaml").write_text(TINY)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(instructions, "counter", lambda: "callgrind")
    report = ab(folder, tmp_path / "out", "loop", "--instructions", "--case", "*/static/*")
    assert report["code"] == 1
    failed = {one["figure"] for one in report["findings"] if one["status"] == "fail"}
    assert failed == {FIGURE}
