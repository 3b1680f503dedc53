"""What stands in a traffic run's files is believed only where perfbench can have written it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perfbench.cli import main
from perfbench.errors import RunDirectoryError
from perfbench.traffic import traffic_folder
from perfbench.traffic.folder_schema import COLUMNS, problem_of_manifest, problem_of_measurement, problem_of_verdicts

LENGTHS = {"median": 8, "sigma": 0.0, "most": 8}
POINT: dict[str, Any] = {
    "tenants": 3, "rate_per_s": 2.0, "held": True,
    "figures": {"counted": 16, "kept_share": 1.0, "ttft_ms": {"median": 5.0, "p95": None, "p99": None}},
}  # fmt: skip
MANIFEST: dict[str, Any] = {
    "schema_version": traffic_folder.SCHEMA_VERSION, "started_at": "2026-01-01T00:00:00+00:00", "finished_at": None,
    "scenario": {
        **dict.fromkeys(("name", "question", "device", "backbone", "dtype", "kernels"), "x"), "repetitions": 1,
        "traffic": {"prompt_tokens": LENGTHS, "new_tokens": LENGTHS, "tenants": [3], "rate_per_tenant": None,
                    "zipf_exponent": None, "arrivals": "poisson", "requests": 20},
        "server": {"rows": 4, "resident": 3}, "targets": {"ttft_ms": 1.0, "itl_ms": 1.0, "share": 0.99},
    },
    "environment": {"cpu": {"model": "x"}},
    "arms": {"lora": {"method": "lora", "status": "ok", "points": [POINT], "throughput_per_s": 3.0,
                      "proof": {"status": "ok", "reason": None}}},
}  # fmt: skip
LINE: dict[str, Any] = {
    "arm": "lora", "tenants": 3, "rate": 2.0, "repetition": 0, "sent": 1, "loaded_bytes": 5, "columns": list(COLUMNS),
    "rows": [[0.0, 2, 1.0, 2.0, 4.0, [1.0, 1.0], True]],
}  # fmt: skip


def changed(value: dict[str, Any], change: Callable[[Any], object]) -> dict[str, Any]:
    made = copy.deepcopy(value)
    change(made)
    return made


def test_what_perfbench_writes_has_no_problem() -> None:
    assert problem_of_manifest(MANIFEST) is None
    assert problem_of_verdicts(MANIFEST) is None
    assert problem_of_measurement(LINE) is None
    assert problem_of_measurement(LINE | {"rows": None, "loaded_bytes": None}) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["arms"]["lora"]["proof"].update(status="check_failed"), "expected a proof that is ok"),
        (lambda m: m["arms"]["lora"].pop("proof"), "expected a proof that is ok"),
        (lambda m: m["arms"]["lora"].update(points=[]), "arms.lora.status: expected points that were measured"),
        (lambda m: m["arms"]["lora"].update(status={}), "arms.lora.status: expected one of pending, ok"),
        (lambda m: m["arms"].clear(), "arms: expected one at least"),
        (lambda m: m["arms"]["lora"].update(throughput_per_s=-1), "arms.lora.throughput_per_s"),
        (lambda m: m["arms"]["lora"]["points"][0].update(held="yes"), "arms.lora.points.0.held"),
        (lambda m: m["arms"]["lora"]["points"][0]["figures"]["ttft_ms"].update(p95="5"), "figures.ttft_ms.p95"),
        (lambda m: m["scenario"]["traffic"].update(tenants=None), "scenario.traffic.rate_per_tenant"),
        (lambda m: m["scenario"].pop("targets"), "scenario.targets: is missing"),
        (lambda m: m["environment"].update(cpu=5), "environment.cpu"),
    ],
)
def test_a_manifest_that_no_perfbench_wrote_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Any], object], words: str
) -> None:
    (tmp_path / traffic_folder.MANIFEST).write_text(json.dumps(changed(MANIFEST, change)))
    (tmp_path / traffic_folder.MEASUREMENTS).touch()
    for command in (["show", str(tmp_path)], ["report", str(tmp_path), "--out", str(tmp_path / "page.html")]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
        assert str(tmp_path / traffic_folder.MANIFEST) in line
    if "expected a proof" in words or "expected points" in words:
        traffic_folder.TrafficFolder.open(tmp_path)  # a run that goes on makes its statuses anew
        return
    with pytest.raises(RunDirectoryError, match="restore the file, or measure anew"):
        traffic_folder.TrafficFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda line: line.pop("rows"), "rows: expected a list of the 1 requests"),
        (lambda line: line.update(sent=2), "rows: expected a list of the 2 requests"),
        (lambda line: line.update(rows=[], sent=0), "one at least"),
        (lambda line: line.update(columns=list(reversed(COLUMNS))), "columns: expected due_s"),
        (lambda line: line["rows"][0].__setitem__(3, 5.0), "rows.0"),  # the first token after the last
        (lambda line: line["rows"][0].__setitem__(3, 0), "rows.0"),
        (lambda line: line["rows"][0].__setitem__(2, -1.0), "rows.0"),
        (lambda line: line["rows"][0].__setitem__(5, ["x"]), "rows.0"),
        (lambda line: line["rows"][0].__setitem__(6, 1), "rows.0"),
        (lambda line: line["rows"][0].pop(), "rows.0"),
        (lambda line: line.update(tenants=True), "tenants: expected an integer"),
        (lambda line: line.update(arm=None), "arm: expected a string"),
        (lambda line: line.update(loaded_bytes="5"), "loaded_bytes"),
        (lambda line: line.update(rate=-1), "rate"),
    ],
)
def test_a_measurement_that_no_perfbench_wrote_is_refused_with_its_line(
    tmp_path: Path, change: Callable[[Any], object], words: str
) -> None:
    (tmp_path / traffic_folder.MANIFEST).write_text(json.dumps(MANIFEST))
    file = tmp_path / traffic_folder.MEASUREMENTS
    other = LINE | {"repetition": 1}
    file.write_text(f"{json.dumps(other)}\n{json.dumps(changed(LINE, change))}\n")
    with pytest.raises(RunDirectoryError) as refused:
        traffic_folder.TrafficFolder.open(tmp_path)
    assert str(refused.value).startswith(f"{file}:2: is damaged (")
    assert words in str(refused.value)


def test_a_measurement_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    """The last one would have counted, without a word."""
    (tmp_path / traffic_folder.MANIFEST).write_text(json.dumps(MANIFEST))
    (tmp_path / traffic_folder.MEASUREMENTS).write_text(f"{json.dumps(LINE)}\n{json.dumps(LINE)}\n")
    with pytest.raises(RunDirectoryError, match=r":2: is damaged .the same measurement stands there twice"):
        traffic_folder.TrafficFolder.open(tmp_path)
