"""`perfbench traffic` from end to end on a tiny shape: its table, its folder, what goes on and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from perfbench.cli import main
from perfbench.errors import RunDirectoryError
from perfbench.traffic import traffic_run
from perfbench.traffic.traffic_folder import COLUMNS, Key, Measured, TrafficFolder

SCENARIO: dict[str, Any] = {
    "question": "How many?",
    "backbone": "llama-tiny",
    "dtype": "fp32",
    "device": "cpu",
    "methods": ["lora", "para"],
    "traffic": {
        "prompt_tokens": {"median": 8, "sigma": 0.5, "most": 16}, "new_tokens": 4, "tenants": [3, 9], "rate": 200,
        "requests": 30,
    },
    "server": {"rows": 4, "resident": 3, "chunk_tokens": 5},
    "targets": {"ttft_ms": 60000, "itl_ms": 60000},
    "repetitions": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("scenario") / "tiny.yaml"
    file.write_text(yaml.safe_dump(SCENARIO))
    return file


@pytest.fixture(scope="module")
def done(scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "done"
    assert main(["traffic", str(scenario), "--out", str(out)]) == 0
    return out


def manifest(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "traffic.json").read_text())
    return found


def test_every_arm_is_measured_at_every_point_and_proved(done: Path) -> None:
    found = manifest(done)
    assert list(found["arms"]) == ["none", "lora", "para"]
    for arm, entry in found["arms"].items():
        assert (entry["status"], entry["proof"]["reason"]) == ("ok", None)
        assert [(point["tenants"], point["rate_per_s"]) for point in entry["points"]] == [(3, 200.0), (9, 200.0)]
        for point in entry["points"]:
            assert point["held"] is True
            assert point["figures"]["counted"] == 48
            assert len(point["repetitions"]) == 2
        assert (entry["points"][1]["figures"]["loaded_share"] > 0) == (arm != "none")
        assert entry["throughput_per_s"] > 0
    assert found["finished_at"]


def test_every_request_stands_in_the_folder(done: Path) -> None:
    lines = [json.loads(line) for line in (done / "measurements.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * (1 + 2 * 2)
    assert {tuple(line["columns"]) for line in lines} == {COLUMNS}
    timed = [line for line in lines if line["rate"]]
    assert {len(line["rows"]) for line in timed} == {30}
    # The same requests for every arm.
    due = {(line["tenants"], line["repetition"], tuple(row[0] for row in line["rows"])) for line in timed}
    assert len(due) == 4


def test_show_and_report_give_it_again(done: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["show", str(done)]) == 0
    shown = capsys.readouterr().out
    assert "The targets were held everywhere." in shown
    assert main(["show", str(done), "--format", "csv"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("arm,method,status,tenants,in_flight,rate_per_s,held,counted,kept_share")
    assert len(rows) == 6
    page = tmp_path / "page.html"
    assert main(["report", str(done), "--out", str(page)]) == 0
    assert "The targets were held everywhere." in page.read_text()
    for refused, why in (
        (["report", str(done), str(done)], "a run of traffic, whose page is its own; give it alone"),
        (["report", str(done), "--samples"], "whose requests are in measurements.jsonl"),
        (["show", str(done), "--columns", "tails"], "which has one table; leave it out"),
    ):
        assert main(refused) == 2
        assert why in capsys.readouterr().err


def test_what_was_measured_is_not_measured_again(
    done: Path, scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was stopped in the middle of a line goes on from the line before it."""
    begun = tmp_path / "begun"
    shutil.copytree(done, begun)
    kept = (done / "measurements.jsonl").read_bytes().splitlines(keepends=True)
    (begun / "measurements.jsonl").write_bytes(b"".join(kept[:8]) + kept[8][:50])
    asked: list[Key] = []
    real = traffic_run.Session._measure
    monkeypatch.setattr(traffic_run.Session, "_measure", lambda self, key: asked.append(key) or real(self, key))
    assert main(["traffic", str(scenario), "--out", str(begun), "--resume"]) == 0
    assert len(asked) == 15 - 8
    assert manifest(begun)["finished_at"]
    assert (begun / "measurements.jsonl").read_bytes().splitlines(keepends=True)[:8] == kept[:8]
    assert manifest(begun)["arms"]["none"]["points"][0] == manifest(done)["arms"]["none"]["points"][0]
    assert main(["traffic", str(scenario), "--out", str(begun), "--resume", "--set", "server.rows=2"]) == 2
    assert "holds a run with other server; measure with another --out" in capsys.readouterr().err


def test_a_run_that_lacks_its_proof_alone_gets_it(done: Path, scenario: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    shutil.copytree(done, begun)
    found = manifest(begun)
    del found["arms"]["lora"]["proof"]
    (begun / "traffic.json").write_text(json.dumps(found))
    assert main(["traffic", str(scenario), "--out", str(begun), "--resume"]) == 0
    assert manifest(begun)["arms"]["lora"]["proof"]["status"] == "ok"


def test_a_used_folder_is_left_alone(
    done: Path, scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (done / "traffic.json").read_bytes()
    assert main(["traffic", str(scenario), "--out", str(done)]) == 2
    assert (done / "traffic.json").read_bytes() == before
    assert "\n" not in capsys.readouterr().err.strip().splitlines()[-1]
    assert main(["traffic", str(scenario), "--out", str(tmp_path / "none"), "--resume"]) == 2


def test_a_search_brackets_what_it_finds(scenario: Path, tmp_path: Path) -> None:
    """With targets that everything keeps up to some load, the largest number that held and the next that did not."""
    out = tmp_path / "found"
    sets = [
        "traffic={prompt_tokens: 4, new_tokens: 3, tenants: search, rate_per_tenant: 20, requests: 40}",
        "methods=[lora]", "targets={ttft_ms: 80, itl_ms: 80}", "repetitions=1",
    ]  # fmt: skip
    code = main(["traffic", str(scenario), "--out", str(out), *(word for one in sets for word in ("--set", one))])
    assert code == 0
    for entry in manifest(out)["arms"].values():
        found, tried = entry["most_tenants"], {point["tenants"]: point["held"] for point in entry["points"]}
        assert all(tenants <= found["held"] for tenants, held in tried.items() if held)
        if found["failed"] is not None:
            assert tried[found["failed"]] is False
        if found["held"]:
            assert tried[found["held"]] is True


def test_an_arm_whose_process_dies_is_named_and_the_others_go_on(
    scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = traffic_run.Session._job

    def job(self: traffic_run.Session, arm: str, what: dict[str, Any]) -> dict[str, Any]:
        if arm == "lora" and self._child is not None:
            self._child._process.kill()
            self._child._process.wait()
        return real(self, arm, what)

    monkeypatch.setattr(traffic_run.Session, "_job", job)
    out = tmp_path / "died"
    assert main(["traffic", str(scenario), "--out", str(out)]) == 4
    arms = manifest(out)["arms"]
    assert arms["lora"]["status"] == "crashed"
    assert "SIGKILL" in arms["lora"]["reason"]
    assert (arms["none"]["status"], arms["para"]["status"]) == ("ok", "ok")
    assert "lora: crashed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace('"rows":', '"row":'),
        lambda line: line.replace('"ttft_ms"', '"ttft"'),
        lambda line: line[: len(line) // 2],
        lambda line: json.dumps({**json.loads(line), "rows": [[0.0, 0, 1.0, -1.0, 2.0, [], False]]}),
        lambda line: "[]",
    ],
)
def test_a_damaged_line_is_named(damage: Any, done: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(done, copy)
    lines = (copy / "measurements.jsonl").read_text().splitlines()
    lines[2] = damage(lines[2])
    (copy / "measurements.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(RunDirectoryError, match=r"measurements.jsonl:3: is damaged"):
        TrafficFolder.open(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 9}', '{"schema_version": 1, "arms": []}'])
def test_a_damaged_manifest_is_refused(content: str, done: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(done, copy)
    (copy / "traffic.json").write_text(content)
    assert main(["show", str(copy)]) == 2


def test_a_measurement_that_was_given_up_is_kept_as_such(done: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(done, copy)
    folder, key = TrafficFolder.open(copy), Key("lora", 5, 1.5, 0)
    folder.add(key, Measured(None, 12, None))
    assert TrafficFolder.open(copy).measured[key] == Measured(None, 12, None)


CLOSED = {"arrivals": "closed", "in_flight": [2, 4], "tenant_mix": "in-turn", "tenants": 4, "requests": 20}


def test_a_closed_loop_says_what_adapters_leave(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traffic = {name: value for name, value in SCENARIO["traffic"].items() if name != "rate"} | CLOSED
    file, out = tmp_path / "closed.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({**SCENARIO, "methods": ["lora"], "traffic": traffic, "repetitions": 1}))
    assert main(["traffic", str(file), "--out", str(out)]) == 0
    for entry in manifest(out)["arms"].values():
        assert (entry["status"], entry.get("throughput_per_s")) == ("ok", None)
        assert [point["in_flight"] for point in entry["points"]] == [2, 4]
        assert all(point["rate_per_s"] == point["figures"]["requests_per_s"] > 0 for point in entry["points"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "lora: " in printed
    assert "tokens/s with 4 requests in flight of 4 tenants" in printed
    assert "one after the other of the tenants" in printed
    before = (out / "measurements.jsonl").read_bytes()
    assert main(["traffic", str(file), "--out", str(out), "--resume"]) == 0
    assert (out / "measurements.jsonl").read_bytes() == before, "all of it was known"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"in_flight": 2}, "traffic.in_flight: expected rate_per_tenant or rate with these arrivals, got in_flight"),
        ({"arrivals": "closed"}, "traffic.rate: expected in_flight with these arrivals, got rate"),
        ({"arrivals": "closed", "rate": None}, "expected in_flight with arrivals closed, got none"),
        ({**CLOSED, "rate": None, "tenants": "search"}, "traffic.tenants: the number of tenants can be searched only"),
    ],
)
def test_a_loop_that_is_neither_open_nor_closed_is_refused(
    changes: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traffic = {name: value for name, value in (SCENARIO["traffic"] | changes).items() if value is not None}
    file = tmp_path / "odd.yaml"
    file.write_text(yaml.safe_dump({**SCENARIO, "traffic": traffic}))
    assert main(["traffic", str(file), "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
