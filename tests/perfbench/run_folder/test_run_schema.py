"""Whatever stands inside a run's files: every command opens a real run, and refuses a damaged one in one line."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perfbench.cli import main
from perfbench.run_folder.run_directory import MANIFEST, SAMPLES, RunDirectory
from perfbench.run_folder.run_schema import problem_of_run

RESULTS = Path(__file__).parents[3] / "results"
REAL = RESULTS / "cpu-chat-turns"
RUNS = [file.parent for file in sorted(RESULTS.rglob(MANIFEST)) if "kind" not in json.loads(file.read_text())]
# What a foreign, torn or hostile file may have in the place of anything.
WRONG: list[Any] = [None, "x", -1, 0.5, 1e300, True, [], {}, [1], {"a": 1}, "\x1b[31m", "</script>"]


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: str(folder.relative_to(RESULTS)))
def test_every_committed_run_opens(folder: Path) -> None:
    run = RunDirectory.open(folder)
    assert len(run.samples()) > 0


def test_a_run_of_an_older_or_newer_perfbench_opens() -> None:
    """Fields that not every version has may be missing, and others stand beside those that we know."""
    manifest = json.loads((REAL / MANIFEST).read_text())
    older, newer = copy.deepcopy(manifest), copy.deepcopy(manifest)
    for comparison in older["comparisons"]:
        for field in ("roof", "backbone_bytes", "backbone_parameters"):
            del comparison[field]
        del comparison["workload"]["follow_up_tokens"]
    for field in ("load_average", "limits", "variables"):
        older["environment"].pop(field, None)
    for case in older["cases"].values():
        case["check"].pop("ties", None)
        del case["exact"]["least_flops_per_decode_step"]
    for mapping in (newer, newer["environment"], newer["scenario"], *newer["comparisons"], *newer["cases"].values()):
        mapping["a_later_field"] = {"anything": [1, None]}
    for case in newer["cases"].values():
        case["check"]["a_later_field"] = case["memory"]["a_later_field"] = 1.5
    for changed in (older, newer):
        assert problem_of_run(changed) is None


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        yield (*place, key)
        yield from _places(member, (*place, key))


def _planted(manifest: Any, place: tuple[Any, ...], wrong: Any) -> Any:
    changed = copy.deepcopy(manifest)
    inside = changed
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = wrong
    return changed


def _commands(run: Path, scratch: Path) -> list[list[str]]:
    return [
        *(["show", str(run), "--format", format] for format in ("table", "markdown", "csv", "json")),
        ["compare", str(REAL), str(run), "--exact-only"],
        ["report", str(run), "--format", "markdown"],
        ["report", str(run), "--out", str(scratch / "report.html")],
        ["history", str(run), "--store", str(scratch / "store.sqlite")],
    ]


def _check(
    commands: list[list[str]], scratch: Path, capsys: pytest.CaptureFixture[str], *, refused: bool | None = None
) -> None:
    for command in commands:
        (scratch / "store.sqlite").unlink(missing_ok=True)
        code = main(command)
        said = capsys.readouterr()
        assert code in ((2,) if refused else (0, 1, 2, 4)), command
        assert "Traceback" not in said.err
        assert "this is a fault of perfbench" not in said.err, (command, said.err)
        if refused:
            errors = [line for line in said.err.splitlines() if line.startswith("perfbench: ")]
            assert errors
            assert all(line.isprintable() for line in errors)


def _sparse(places: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Places of each kind once: those of the first case stand for those of the others."""
    kinds = {}
    for place in places:
        kinds[tuple("*" if at == 1 or isinstance(key, int) else key for at, key in enumerate(place))] = place
    return list(kinds.values())


@pytest.mark.parametrize("shift", range(len(WRONG)))
def test_anything_in_the_place_of_anything_ends_in_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shift: int
) -> None:
    """Each place of run.json gets a wrong value, over all the parametrised tests, and two of the commands see it."""
    manifest = json.loads((REAL / MANIFEST).read_text())
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(REAL / SAMPLES, run / SAMPLES)
    places = _sparse(list(_places(manifest)))
    for number, place in enumerate(places):
        if number % len(WRONG) == shift:
            wrong = WRONG[(number // len(WRONG) + shift) % len(WRONG)]
            (run / MANIFEST).write_text(json.dumps(_planted(manifest, place, wrong)))
            commands = _commands(run, tmp_path)
            at = number // len(WRONG) % 4
            _check([commands[at], commands[at + 4]], tmp_path, capsys)


CASE = "cases.*."
REFUSED: dict[str, Any] = {
    "environment.cpu": 3,
    "environment.gpus": [3],
    "environment.load_average": [],
    "environment.checkout": "x",
    "scenario.repetitions": "many",
    "scenario.processes": 0,
    "scenario.notes": "x",
    "comparisons.0.device": None,
    "comparisons.0.workload": [],
    "comparisons.0.workload.requests": 0,
    "comparisons.0.roof": {"name": "x"},
    "comparisons.0.roof.bytes_per_s": 0,
    "comparisons.0.roof.flops_per_s": 5,
    CASE + "check": 10**18,
    CASE + "check.passed": "yes",
    CASE + "memory": "x",
    CASE + "memory.peak_allocated_bytes": -5,
    CASE + "exact.flops_per_decode_step": "many",
    CASE + "summary": {"total_ms": {}},
    CASE + "summary.total_ms.median": None,
    CASE + "summary.itl_ms": 4,
    CASE + "kept": 0.5,
    CASE + "options": [],
    CASE + "reason": {},
    CASE + "id": "another",
    "finished_at": 5,
}


@pytest.mark.parametrize("field", list(REFUSED))
def test_what_no_perfbench_wrote_is_refused_by_name(field: str) -> None:
    manifest = json.loads((REAL / MANIFEST).read_text())
    first = list(manifest["cases"])[1]
    place = tuple(int(key) if key.isdecimal() else first if key == "*" else key for key in field.split("."))
    problem = problem_of_run(_planted(manifest, place, REFUSED[field]))
    assert problem is not None
    assert problem[0].startswith(".".join(map(str, place)))
    assert "expected" in problem[1]


def test_a_case_in_two_comparisons_is_refused() -> None:
    manifest = json.loads((REAL / MANIFEST).read_text())
    manifest["comparisons"].append(copy.deepcopy(manifest["comparisons"][0]))
    problem = problem_of_run(manifest)
    assert problem is not None
    assert "expected each case in one comparison" in problem[1]


@pytest.mark.parametrize(
    "plant",
    [
        {"total_ms": -1.0},
        {"total_ms": 0},
        {"total_ms": 1e300},
        {"ttft_ms": 1e9},
        {"ttft_ms": None},
        {"itl_ms": []},
        {"itl_ms": [-1.0]},
        {"itl_ms": "x"},
        {"itl_ms": [[1]]},
        {"tokens_per_s": True},
        {"decode_tokens_per_s": "1"},
        {"round": -1},
        {"round": 0.5},
        {"process": "x"},
        {"case": 3},
        {"void": 1},
        {"energy_mj": -1},
        {"sm_clock_mhz": "fast"},
        {"follow_up_ttft_ms": []},
    ],
    ids=str,
)
def test_a_sample_that_can_not_be_is_refused_by_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plant: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(REAL, run)
    first, second, *rest = (run / SAMPLES).read_text().splitlines()
    (run / SAMPLES).write_text("\n".join([first, json.dumps(json.loads(second) | plant), *rest]) + "\n")
    for command in _commands(run, tmp_path):
        (tmp_path / "store.sqlite").unlink(missing_ok=True)
        assert main(command) == 2
        assert f"{SAMPLES}:2: {next(iter(plant))}: expected" in capsys.readouterr().err


@pytest.mark.parametrize("name", [MANIFEST, SAMPLES])
@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 99, b"[" * 99_999, b'{"a":' * 9_999, b"null", b"\xff\xfe\n", b"1e999\n"]
)
def test_a_file_of_another_kind_is_refused_by_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    run = tmp_path / "run"
    shutil.copytree(REAL, run)
    if name == SAMPLES and not content.endswith(b"\n"):
        content += b"\n"
    (run / name).write_bytes(content)
    _check(_commands(run, tmp_path), tmp_path, capsys, refused=True)
