"""`perfbench run` as a user runs it: whole runs in their own processes, killed, resumed and starved of memory."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from perfbench.measure.run import cause
from perfbench.run_folder import run_directory

SCENARIO = """\
question: Does a small run come out whole?
backbone: llama-tiny
dtype: fp32
device: cpu
methods: [lora, ia3]
workload: {prompt_tokens: 6, new_tokens: 3, requests: 3, tenants: 2, resident: 3}
warmup: 1
repetitions: 3
seed: 5
"""
LONG = 40  # repetitions of a run that is to be killed: long enough to be caught in its rounds
DEADLINE_S = 120


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "perfbench", *map(str, arguments)]


def perfbench(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "240"}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment, timeout=DEADLINE_S, **options
    )


def samples_of(out: Path) -> list[dict[str, Any]]:
    lines = (out / run_directory.SAMPLES).read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


def manifest_of(out: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((out / run_directory.MANIFEST).read_text())
    return manifest


def by_arm(out: Path) -> dict[str, dict[str, Any]]:
    return {case["arm"]: case for case in manifest_of(out)["cases"].values()}


def orders(samples: list[dict[str, Any]]) -> dict[int, list[str]]:
    """Round -> the arms in the order in which they were timed."""
    found: dict[int, list[str]] = {}
    for sample in samples:
        found.setdefault(sample["round"], []).append(sample["case"].rsplit("/", 1)[-1])
    return found


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes]) -> None:
    """Until `condition` holds; the run must still be going on then."""
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < until, "timed out"
        time.sleep(0.005)


@contextlib.contextmanager
def running(scenario: Path, out: Path, repetitions: int, *extra: str, samples: int = 4) -> Any:
    """A run in flight, of which so many samples are on disk already (0: some case is prepared): (its process, its one
    worker). What it says goes to `said` beside `out`."""
    with (out.parent / "said").open("wb") as said:
        process = subprocess.Popen(
            command("run", scenario, "--out", out, "--set", f"repetitions={repetitions}", *extra),
            stdout=subprocess.DEVNULL,
            stderr=said,
        )

    def far_enough() -> bool:
        if samples:
            file = out / run_directory.SAMPLES
            return file.exists() and file.read_bytes().count(b"\n") >= samples
        return (out / run_directory.MANIFEST).exists() and any(
            case["check"] for case in manifest_of(out)["cases"].values()
        )

    try:
        wait_for(far_enough, process)
        (worker,) = psutil.Process(process.pid).children()
        assert "perfbench.measure.on_device.worker" in worker.cmdline()
        yield process, worker
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenario") / "small.yaml"
    path.write_text(SCENARIO)
    return path


@pytest.fixture(scope="module")
def full(scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A whole run: (its directory, the finished process)."""
    out = tmp_path_factory.mktemp("full") / "run"
    return out, perfbench("run", scenario, "--out", out)


@pytest.fixture(scope="module")
def killed(scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run whose parent got SIGKILL in its rounds, and that was resumed."""
    out = tmp_path_factory.mktemp("killed") / "run"
    with running(scenario, out, LONG) as (process, worker):
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs([worker], timeout=20)
    at_kill = samples_of(out)
    manifest = manifest_of(out)
    resumed = perfbench("run", scenario, "--out", out, "--set", f"repetitions={LONG}", "--resume")
    return {"out": out, "alive": alive, "at_kill": at_kill, "manifest": manifest, "resumed": resumed}


def test_a_full_run_measures_every_case(full: tuple[Path, Any]) -> None:
    out, process = full
    assert process.returncode == 0, process.stderr
    manifest = manifest_of(out)
    assert manifest["finished_at"]
    assert manifest["processes"] == 1
    assert manifest["comparisons"][0]["backbone_parameters"] > 0
    assert set(by_arm(out)) == {"none", "lora", "ia3"}
    for arm, case in by_arm(out).items():
        assert case["status"] == "ok", case["reason"]
        assert case["check"]["passed"] is True
        assert case["check"]["tokens_equal"] is True
        assert case["check"]["relative_difference"] <= case["check"]["tolerance"]
        assert case["summary"]["decode_tokens_per_s"]["median"] > 0
        assert case["exact"]["flops_per_decode_step"] >= case["exact"]["least_flops_per_decode_step"] > 0
        if arm == "none":
            assert case["kept"] is None
            assert case["check"]["shifted_share"] is None
            assert case["exact"]["kept_bound"] == 1
        else:
            assert case["check"]["shifted_share"] == pytest.approx(1, abs=0.01)
            kept = case["kept"]["decode_tokens_per_s"]
            assert kept["ratio"] > 0
            assert kept["low"] is kept["high"] is None  # three rounds are too few for an interval
            assert 0 < case["exact"]["kept_bound"] < 1
            assert case["adapters"]["bytes_per_tenant"] > 0


def test_memory_is_five_figures_and_those_of_a_gpu_are_absent_on_a_cpu(full: tuple[Path, Any]) -> None:
    for case in by_arm(full[0]).values():
        peaks = {name: value for name, value in case["memory"].items() if name.startswith("peak_")}
        assert len(peaks) == 5
        assert peaks["peak_allocated_bytes"] > 0
        for name in ("peak_reserved_bytes", "peak_device_bytes", "peak_process_bytes"):
            assert peaks[name] is None
    figures = {arm: case["memory"]["peak_allocated_bytes"] for arm, case in by_arm(full[0]).items()}
    assert figures["none"] < figures["lora"]


def test_every_case_has_one_sample_in_every_round(full: tuple[Path, Any]) -> None:
    turns = Counter((sample["case"], sample["round"]) for sample in samples_of(full[0]))
    assert turns == {(case, number): 1 for case in manifest_of(full[0])["cases"] for number in range(3)}


def test_the_table_is_printed_and_the_progress_is_not_in_it(full: tuple[Path, Any]) -> None:
    _, process = full
    assert "lora" in process.stdout
    assert "admitting tenants" in process.stderr
    assert "admitting tenants" not in process.stdout


@pytest.mark.parametrize("layout", ["table", "markdown", "csv", "json"])
def test_a_run_is_shown_again(full: tuple[Path, Any], layout: str) -> None:
    shown = perfbench("show", full[0], "--format", layout)
    assert shown.returncode == 0, shown.stderr
    assert all(arm in shown.stdout for arm in ("none", "lora", "ia3"))
    if layout == "json":
        assert json.loads(shown.stdout)


def test_a_run_into_a_used_directory_is_refused_and_leaves_it_alone(scenario: Path, full: tuple[Path, Any]) -> None:
    before = {path.name: path.read_bytes() for path in full[0].iterdir()}
    again = perfbench("run", scenario, "--out", full[0])
    assert again.returncode == 2
    assert "--resume" in again.stderr
    assert {path.name: path.read_bytes() for path in full[0].iterdir()} == before


def test_a_finished_run_is_not_measured_again(scenario: Path, full: tuple[Path, Any]) -> None:
    before = (full[0] / run_directory.SAMPLES).read_bytes()
    again = perfbench("run", scenario, "--out", full[0], "--resume")
    assert again.returncode == 0, again.stderr
    assert (full[0] / run_directory.SAMPLES).read_bytes() == before
    assert manifest_of(full[0])["processes"] == 1


def test_no_worker_outlives_a_killed_run(killed: dict[str, Any]) -> None:
    assert killed["alive"] == []


def test_a_killed_run_keeps_what_it_had(killed: dict[str, Any]) -> None:
    # samples_of has parsed every whole line.
    assert 4 <= len(killed["at_kill"]) < 3 * LONG
    assert killed["manifest"]["finished_at"] is None
    assert all(case["check"]["passed"] for case in killed["manifest"]["cases"].values())


def test_a_resumed_run_takes_every_missing_sample_once(killed: dict[str, Any]) -> None:
    assert killed["resumed"].returncode == 0, killed["resumed"].stderr
    after = samples_of(killed["out"])
    assert after[: len(killed["at_kill"])] == killed["at_kill"]
    turns = Counter((sample["case"], sample["round"]) for sample in after)
    cases = manifest_of(killed["out"])["cases"]
    assert turns == {(case, number): 1 for case in cases for number in range(LONG)}
    assert {sample["process"] for sample in after} == {0, 1}
    assert all(case["kept"] for arm, case in by_arm(killed["out"]).items() if arm != "none")


def test_two_runs_of_one_scenario_agree_on_what_is_exact(full: tuple[Path, Any], killed: dict[str, Any]) -> None:
    one, other = by_arm(full[0]), by_arm(killed["out"])
    for arm in one:
        assert one[arm]["exact"] == other[arm]["exact"]
        # Which rounds were proved afterwards depends on how many there were.
        assert one[arm]["check"] | {"proved_rounds": []} == other[arm]["check"] | {"proved_rounds": []}
        assert one[arm]["memory"]["peak_allocated_bytes"] == other[arm]["memory"]["peak_allocated_bytes"]


def test_the_arms_take_turns_in_an_order_that_the_seed_draws(full: tuple[Path, Any], killed: dict[str, Any]) -> None:
    whole = orders(killed["at_kill"])
    complete = orders(samples_of(killed["out"]))
    assert len({tuple(order) for order in complete.values()}) > 1
    short = orders(samples_of(full[0]))
    shared = [number for number in short if len(whole.get(number, [])) == 3]
    assert shared
    assert all(short[number] == whole[number] for number in shared)


def test_a_run_of_something_else_is_not_resumed(scenario: Path, full: tuple[Path, Any]) -> None:
    before = (full[0] / run_directory.MANIFEST).read_bytes()
    for other in ("seed=6", "workload.new_tokens=4", "methods=[lora]"):
        process = perfbench("run", scenario, "--out", full[0], "--resume", "--set", other)
        assert process.returncode == 2
        assert "holds a run of other" in process.stderr
    assert (full[0] / run_directory.MANIFEST).read_bytes() == before


def test_every_process_takes_all_repetitions(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = perfbench("run", scenario, "--out", out, "--processes", "2")
    assert process.returncode == 0, process.stderr
    assert "3 repetitions each in each of 2 processes" in process.stderr
    turns = Counter((sample["case"], sample["process"], sample["round"]) for sample in samples_of(out))
    cases = manifest_of(out)["cases"]
    assert turns == {(case, number // 3, number): 1 for case in cases for number in range(6)}
    assert manifest_of(out)["processes"] == 2
    assert "medians of 6 rounds in 2 processes" in process.stdout
    assert all(case["summary"]["total_ms"]["rounds"] == 6 for case in cases.values())


def test_a_killed_run_of_several_processes_is_resumed(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with running(scenario, out, LONG, "--processes", "2") as (process, worker):
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        psutil.wait_procs([worker], timeout=20)
    again = ("--set", f"repetitions={LONG}", "--resume")
    assert perfbench("run", scenario, "--out", out, *again).returncode == 2, "a run of one process is another run"
    resumed = perfbench("run", scenario, "--out", out, "--processes", "2", *again)
    assert resumed.returncode == 0, resumed.stderr
    samples = samples_of(out)
    turns = Counter((sample["case"], sample["round"]) for sample in samples)
    assert turns == {(case, number): 1 for case in manifest_of(out)["cases"] for number in range(2 * LONG)}
    assert {sample["process"] for sample in samples if sample["round"] >= LONG} == {2}


def test_a_killed_worker_costs_only_the_case_in_flight(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with running(scenario, out, LONG) as (process, worker):
        worker.send_signal(signal.SIGKILL)
        assert process.wait(DEADLINE_S) == 4
    cases = manifest_of(out)["cases"]
    (crashed,) = [case for case in cases.values() if case["status"] == "crashed"]
    assert "SIGKILL" in crashed["reason"]
    assert crashed["summary"] is None
    turns = Counter(sample["case"] for sample in samples_of(out))
    for case_id, case in cases.items():
        if case is not crashed:
            assert case["status"] == "ok"
            assert case["summary"]
            assert turns[case_id] == LONG
    shown = perfbench("show", out)
    assert shown.returncode == 4
    assert "SIGKILL" in shown.stdout
    again = perfbench("run", scenario, "--out", out, "--set", f"repetitions={LONG}", "--resume")
    assert again.returncode == 4, "one stray kill is for good"
    again = perfbench("run", scenario, "--out", out, "--set", f"repetitions={LONG}", "--resume", "--retry-failed")
    assert again.returncode == 0, again.stderr
    assert {case["status"] for case in manifest_of(out)["cases"].values()} == {"ok"}
    assert set(Counter(sample["case"] for sample in samples_of(out)).values()) == {LONG}
    alone = perfbench("run", scenario, "--retry-failed")
    assert (alone.returncode, alone.stderr.count("\n")) == (2, 1)


def test_out_of_memory_is_a_row(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def little_memory() -> None:
        # The bank below asks for some 100 GB at once; with this the system refuses it however it overcommits.
        resource.setrlimit(resource.RLIMIT_AS, (32 << 30, 32 << 30))

    process = perfbench(
        "run", scenario, "--out", out, "--set", "methods=[{lora: {rank: 1024}}]",
        "--set", "workload.resident=2000000", "--large", preexec_fn=little_memory,
    )  # fmt: skip
    assert process.returncode == 4, process.stderr
    arms = by_arm(out)
    assert arms["lora"]["status"] == "out_of_memory"
    assert "DefaultCPUAllocator" in arms["lora"]["reason"]
    assert arms["lora"]["summary"] is None
    assert arms["none"]["status"] == "ok"
    assert arms["none"]["summary"]
    assert manifest_of(out)["processes"] == 2
    assert "Traceback" not in process.stderr


def test_isolated_arms_each_have_the_bare_backbone_beside_them(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = perfbench("run", scenario, "--out", out, "--set", "isolation=per-arm")
    assert process.returncode == 0, process.stderr
    seen: dict[int, set[str]] = {}
    for sample in samples_of(out):
        seen.setdefault(sample["process"], set()).add(sample["case"].rsplit("/", 1)[-1].split("-")[0])
    assert seen == {0: {"none", "lora"}, 1: {"none", "ia3"}}
    arms = by_arm(out)
    for arm in ("lora", "ia3"):
        assert arms[arm]["kept"]["decode_tokens_per_s"]["ratio"] > 0
    assert all(case["status"] == "ok" for case in arms.values())


def test_an_isolated_run_that_was_killed_is_resumed(scenario: Path, tmp_path: Path) -> None:
    """The bare backbone runs once beside each arm: of its rounds only those beside the same arm count as done."""
    out = tmp_path / "run"
    isolated = ("--set", "isolation=per-arm")
    with running(scenario, out, LONG, *isolated) as (process, worker):
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        psutil.wait_procs([worker], timeout=20)
    resumed = perfbench("run", scenario, "--out", out, "--set", f"repetitions={LONG}", *isolated, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    turns = Counter((sample["case"].rsplit("/", 1)[-1], sample["round"]) for sample in samples_of(out))
    for arm, times in (("lora-eager", 1), ("ia3-eager", 1), ("none-eager", 2)):
        counts = [turns[arm, number] for number in range(LONG)]
        # The kill may tear one round after the bare backbone's turn, which then takes it once more, beside the arm.
        torn = counts.count(times + 1) if arm == "none-eager" else 0
        assert torn <= 1
        assert counts.count(times) == LONG - torn
    # Or its arms were timed by two processes, and are never compared with each other.
    paired = [by_arm(out)[arm]["kept"]["decode_tokens_per_s"]["rounds"] for arm in ("lora", "ia3")]
    assert sum(paired) in (2 * LONG - 1, 2 * LONG)


def test_a_run_that_was_killed_while_it_prepared_is_resumed(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with running(scenario, out, LONG, samples=0) as (process, worker):
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        psutil.wait_procs([worker], timeout=20)
    prepared = {arm: case["check"] for arm, case in by_arm(out).items() if case["check"]}
    assert prepared
    resumed = perfbench("run", scenario, "--out", out, "--set", f"repetitions={LONG}", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for arm, before in prepared.items():
        proved = by_arm(out)[arm]["check"]["proved_rounds"]
        assert len(proved) == 2
        assert by_arm(out)[arm]["check"] == before | {"proved_rounds": proved}
    assert all(case["summary"] for case in by_arm(out).values())


def test_an_interrupted_run_says_how_to_go_on(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with running(scenario, out, LONG) as (process, worker):
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 130
        _, alive = psutil.wait_procs([worker], timeout=20)
    assert alive == []
    said = (tmp_path / "said").read_text()
    assert f"--out {out} --resume" in said
    assert "Traceback" not in said
    resumed = perfbench("run", scenario, "--out", out, "--set", f"repetitions={LONG}", "--resume")
    assert resumed.returncode == 0, resumed.stderr


def test_both_runtimes_take_turns_in_one_child(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = perfbench(
        "run", scenario, "--out", out, "--set", "runtime=[transformers, static]", "--set", "methods=[lora, peft]"
    )
    assert process.returncode == 0, process.stderr
    assert "runtime static: without peft" in process.stderr
    manifest = manifest_of(out)
    assert manifest["processes"] == 1
    assert orders(samples_of(out)).keys() == {0, 1, 2}
    static, plain = ({c: manifest["cases"][c] for c in m["case_ids"]} for m in reversed(manifest["comparisons"]))
    assert {case["arm"] for case in static.values()} == {"none", "lora"}
    assert {case["arm"] for case in plain.values()} == {"none", "lora", "peft"}
    for case in static.values():
        assert case["check"]["tokens_equal"] is True
        assert case["versus_plain"]["decode_tokens_per_s"]["rounds"] == 3
        assert case["exact"]["aten_ops_per_decode_step"] > 0
    assert [case["versus_plain"] for case in plain.values() if case["arm"] == "none"] == [None]
    roof = manifest["comparisons"][0]["roof"]
    assert roof["bytes_per_s"] > 1e8
    assert roof == manifest["comparisons"][1]["roof"]


def test_what_ended_a_child_is_said() -> None:
    assert "SIGSEGV" in cause(-signal.SIGSEGV)
    assert "memory" in cause(-signal.SIGKILL)
    assert "exit code 3" in cause(3)


def test_what_was_timed_and_never_proved_is_proved_by_a_resumed_run(
    scenario: Path, full: tuple[Path, Any], tmp_path: Path
) -> None:
    """As where a child dies between its last sample and the proof."""
    out = tmp_path / "run"
    shutil.copytree(full[0], out)
    before, samples = manifest_of(out), samples_of(out)
    for case in before["cases"].values():
        assert case["check"].pop("proved_rounds")
    (out / "run.json").write_text(json.dumps(before))
    resumed = perfbench("run", scenario, "--out", out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert all(case["check"]["proved_rounds"] for case in by_arm(out).values())
    assert samples_of(out) == samples
