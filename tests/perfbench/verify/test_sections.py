"""The sections of `perfbench verify`: their order, their processes and their time, with planted faults."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from perfbench.cli import main
from perfbench.measure.children import Children
from perfbench.measure.on_device.kept_worker import KeptBackbone
from perfbench.verify import grid, sections, verification, verify_report, worker
from perfbench.verify.on_device import tuning
from perfbench.verify.verify_report import FAIL, PASS, SKIPPED, Finding

QUIET = Console(file=io.StringIO())
LATE = Finding("the rest", FAIL, "of a test: too late")

# A child process whose sections do what their names say.
PLANTED = """
import os, sys, time
from perfbench.verify import worker
from perfbench.verify.verify_report import Finding

def run(section, device):
    yield Finding("pid", "FAIL" if section == "fails" else "pass", str(os.getpid()))
    if section == "crashes":
        os.kill(os.getpid(), 9)
    if section == "raises":
        raise RuntimeError("no such image")
    if section == "hangs":
        time.sleep(600)
    yield Finding("interpreted", "pass", os.environ.get("TRITON_INTERPRET", "no"))

worker.findings = run
worker.import_module = str  # nothing needs torch here
sys.exit(worker.main())
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    monkeypatch.setattr(sections, "COMMAND", (sys.executable, str(script)))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def running(planted: None) -> Iterator[sections.Sections]:
    made = sections.Sections("cuda")
    yield made
    made.close_all()


def pid_of(running: sections.Sections, section: str) -> str:
    findings = list(running.findings(section, 60.0, LATE))
    assert findings[0].what == "pid"
    return findings[0].finding


def test_sections_that_go_well_share_a_process(running: sections.Sections) -> None:
    first = pid_of(running, "one")
    assert pid_of(running, "two") == first
    running.close()
    assert pid_of(running, "three") != first


@pytest.mark.parametrize(
    ("section", "said"),
    [("crashes", "the child process ended with -9: no word"), ("raises", "ended with 1: RuntimeError: no such image")],
)
def test_a_section_that_dies_leaves_the_others(running: sections.Sections, section: str, said: str) -> None:
    before = pid_of(running, "one")
    found = list(running.findings(section, 60.0, LATE))
    assert [(one.what, one.status) for one in found] == [("pid", PASS), ("the rest", FAIL)]
    assert said in found[1].finding
    assert pid_of(running, "two") != before


def test_a_section_that_hangs_is_ended(running: sections.Sections) -> None:
    before = pid_of(running, "one")
    found = list(running.findings("hangs", 0.5, LATE))
    assert found[-1] == LATE
    assert pid_of(running, "two") != before


def test_after_a_failure_there_is_a_new_process(running: sections.Sections) -> None:
    """An error on a GPU stays in its process: what came after it would fail too."""
    before = pid_of(running, "fails")
    assert pid_of(running, "one") != before


def test_processes_that_were_begun_ahead_are_taken_first(planted: None) -> None:
    made = sections.Sections("cuda", ahead=2)
    begun = {str(process._process.pid) for process in made._ahead}
    taken = set()
    for section in ("one", "two"):
        taken.add(pid_of(made, section))
        made.close()
    assert taken == begun
    assert pid_of(made, "three") not in begun
    made.close_all()


def test_on_a_cpu_only_the_kernels_are_interpreted(planted: None) -> None:
    made = sections.Sections("cpu")
    said = [list(made.findings(section, 60.0, LATE))[-1].finding for section in ("kernels", "replay", "peers")]
    assert said == ["1", "no", "no"]
    made.close_all()


def test_the_worker_knows_every_section_that_needs_it() -> None:
    assert {*worker.SECTIONS, *verification.MEASURED} == set(verification.ABOUT)


# The order and the time.


class Played:
    """Sections and speeds of a test, and the clock: each takes `seconds`, or what it is allowed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float):
        self.now, self.seconds = 0.0, seconds
        self.begun: list[str] = []
        played = self

        class Sections:
            def __init__(self, device: str, *, ahead: int):
                played.begun.append(f"{ahead} ahead")

            def findings(self, section: str, seconds: float, late: Finding) -> Iterator[Finding]:
                played.begun.append(section)
                played.now += min(seconds, played.seconds)
                yield Finding("a", PASS, "") if seconds >= played.seconds else late

            def close(self) -> None:
                pass

            close_all = close

        def speeds(
            names: Any, device: str, out: Path, left: float | None, part: str, children: Children
        ) -> Iterator[Finding]:
            played.begun.append(part)
            played.now += played.seconds
            yield Finding("speed", PASS, "")

        monkeypatch.setattr(verification, "Sections", Sections)
        monkeypatch.setattr(grid, "findings", speeds)
        monkeypatch.setattr(verification.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(Children, "start", lambda self: played.begun.append("child ahead"))

    def verify(self, out: Path, *, names: list[str] | None = None, tune: bool = False, **options: Any) -> Any:
        chosen = verification.choose(names, tune=tune)
        settings = {"full": False, "minutes": None, "resume": False, **options}
        return verification.verify("cuda", "a card", out, notes=QUIET, sections=chosen, **settings)


def statuses(found: dict[str, Any]) -> dict[str, str]:
    return {name: section["status"] for name, section in found["sections"].items()}


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("no_interpreter")
def test_what_is_worth_most_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(monkeypatch, 10.0)
    found = played.verify(tmp_path / "out", tune=True)
    assert played.begun == [
        "2 ahead", "child ahead", "kernels", "foremost", "replay", "generate", "isolation", "rest", "peers", "tune",
    ]  # fmt: skip
    assert set(statuses(found).values()) == {PASS}
    assert list(found["sections"]) == list(verification.ABOUT)


@pytest.mark.usefixtures("no_interpreter")
def test_the_budget_ends_and_a_second_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(monkeypatch, 100.0)
    found = played.verify(tmp_path / "out")
    assert statuses(found) == dict.fromkeys(("kernels", "q8", "replay", "generate"), PASS) | dict.fromkeys(
        ("isolation", "grid", "peers"), SKIPPED
    )
    assert [one["finding"] for name in ("isolation", "peers") for one in found["sections"][name]["findings"]] == [
        "not done in its 80 s; go on with --resume", "the time is over; go on with --resume",
    ]  # fmt: skip
    assert verify_report.exit_code(found) == 0
    played.begun.clear()
    found = played.verify(tmp_path / "out", resume=True)
    assert played.begun[2:] == ["foremost", "isolation", "rest", "peers"], "what is done is not done again"
    assert set(statuses(found).values()) == {PASS}


@pytest.mark.usefixtures("no_interpreter")
def test_a_hang_is_a_failure_and_a_late_speed_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(monkeypatch, 10_000.0)
    monkeypatch.setitem(verification.BUDGET_S, "cuda", 50_000.0)
    found = played.verify(tmp_path / "out", names=["replay", "peers"])
    assert statuses(found) == {"replay": FAIL, "peers": SKIPPED}
    assert found["sections"]["replay"]["findings"][0]["finding"] == "not done after 300 s"


@pytest.mark.usefixtures("no_interpreter")
def test_what_was_found_stays_where_there_is_no_time_to_do_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = Played(monkeypatch, 100.0)
    played.verify(tmp_path / "out", names=["q8"])
    played.seconds = 480.0
    found = played.verify(tmp_path / "out", resume=True, names=["kernels", "q8", "tune"])
    assert statuses(found) == {"kernels": FAIL, "q8": PASS, "tune": SKIPPED}


def test_sections_are_chosen_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verification.choose(["peers", "kernels", "kernels"], tune=True) == ("kernels", "peers", "tune")
    assert main(["verify", "--section", "grid", "kernal", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said == "perfbench: --section: expected the name of a section, got 'kernal'; did you mean 'kernels'?\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_interpreter")
def test_the_page_names_what_was_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(monkeypatch, 1.0)
    played.verify(tmp_path, names=["kernels", "grid"])
    assert "grid" in played.begun or "all" in played.begun, "without q8, the grid is all of it"
    assert "left out: q8, replay, generate, isolation, peers" in (tmp_path / verify_report.MARKDOWN).read_text()
    played.verify(tmp_path, resume=True)
    assert "left out" not in (tmp_path / verify_report.MARKDOWN).read_text()


# Tuning.


def test_launch_settings_are_for_a_gpu() -> None:
    (found,) = tuning.findings("cpu")
    assert (found.status, found.what) == (SKIPPED, "launch settings")


@pytest.mark.parametrize(("code", "status"), [(0, PASS), (2, FAIL)])
def test_what_was_tuned_is_said(code: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not there for this platform")
    from perfbench.kernels import tune

    def main(arguments: list[str]) -> int:
        assert arguments == ["--write"]
        print("A Card; us at 1, 8 requests")
        print("row_scale          2.0 -> 1.5     {'BLOCK': 512}")
        return code

    monkeypatch.setattr(tune, "main", main)
    found = list(tuning.findings("cuda"))
    assert [(one.what, one.status) for one in found] == [("row_scale", PASS), ("launch settings", status)]
    assert found[0].finding == "us 2.0 -> 1.5 {'BLOCK': 512}"


# The grid's one child.


def test_the_foremost_comparison() -> None:
    from perfbench.spec import cases, scenario

    def foremost(name: str) -> list[str]:
        resolved = scenario.resolve(scenario.load(grid.SCENARIOS / f"{name}.yaml"), "cuda")
        return [one.id.split("/", 1)[1] for one in grid.foremost(cases.expand(resolved))]

    assert foremost("verify_7b") == ["static/p274-n32-b1-q8-t8-r8-distinct"]
    assert foremost("verify_full") == [
        "static/p274-n32-b1-q8-t8-r8-distinct", "transformers/p274-n32-b1-q8-t8-r8-distinct",
    ]  # fmt: skip


def test_one_child_measures_all_of_it_and_one_that_died_is_replaced(tmp_path: Path) -> None:
    children = Children(tmp_path / "worker.log")

    def measured(names: tuple[str, ...], part: grid.Part) -> list[str]:
        return [one.status for one in grid.findings(names, "cpu", tmp_path, None, part, children)]

    try:
        assert measured(("verify_7b", "verify_corners"), "foremost") == [SKIPPED] + [PASS] * 6
        child = children._waiting
        assert child is not None
        assert measured(("verify_7b", "verify_corners"), "rest") == [SKIPPED] + [PASS] * 6
        assert children._waiting is child
        child._process.kill()
        child._process.wait()
        assert measured(("verify_7b",), "all") == [SKIPPED] + [PASS] * 6, "nothing is left to measure"
        (tmp_path / "verify_7b").rename(tmp_path / "before")
        assert measured(("verify_7b",), "all") == [SKIPPED] + [PASS] * 6
        assert children._waiting is not child
    finally:
        children.close()
    for name in ("before", "verify_7b", "verify_corners"):
        assert json.loads((tmp_path / name / "run.json").read_text())["processes"] == 1


def test_a_backbone_is_loaded_once_and_only_one_is_held() -> None:
    class Backbone:
        fused: object = "what the last arms left"

    loaded = []

    def load(*asked: Any) -> Backbone:
        loaded.append(asked)
        return Backbone()

    kept = KeptBackbone(load)
    first = kept.load("a", "fp32", "cpu", 0)
    kept.tidy()
    assert first.fused is None
    assert kept.load("a", "fp32", "cpu", 0) is first
    assert kept.load("b", "fp32", "cpu", 0) is not first
    assert [name for name, *_ in loaded] == ["a", "b"]
