"""A run directory under bad luck: kills, full disks, corrupt files; and what the samples sum up to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from perfbench.errors import RunDirectoryError
from perfbench.figures.metrics import sample_metrics
from perfbench.run_folder.run_directory import SCHEMA_VERSION, RunDirectory, pending_case

ARMS = ("none", "lora", "para")
FULL = Path("/dev/full")


def manifest(statuses: dict[str, str] | None = None) -> dict[str, Any]:
    """One comparison of three arms, as `perfbench run` writes it; `statuses` by arm, ok where not given."""
    cases = {f"c/{arm}": pending_case(f"c/{arm}", "c", arm, arm, {}, "eager") for arm in ARMS}
    for arm in ARMS:
        cases[f"c/{arm}"]["status"] = (statuses or {}).get(arm, "ok")
    comparison = {
        "id": "c",
        "backbone": "llama-tiny",
        "dtype": "fp32",
        "device": "cpu",
        "runtime": "transformers",
        "workload": {"prompt_tokens": 8, "new_tokens": 3, "beams": 1, "requests": 2, "tenants": 2},
        "case_ids": list(cases),
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "perfbench_version": "0.1.0",
        "started_at": "2026-01-01T00:00:00+00:00",
        "finished_at": None,
        "scenario": {"name": "s", "seed": 0, "repetitions": 3, "paper": None},
        "environment": {},
        "processes": 1,
        "comparisons": [comparison],
        "cases": cases,
    }


def sample(arm: str, round_: int, slowness: float = 1.0, process: int = 0, **changes: Any) -> dict[str, Any]:
    """One repetition with 3 tokens of 2 requests: 4 later tokens in 40 ms x `slowness`."""
    figures = sample_metrics([20.0, 20 + 20 * slowness, 20 + 40 * slowness], 2, 20 + 40 * slowness)
    meta = dict.fromkeys(("void", "sm_clock_mhz", "throttle_reasons", "energy_mj"))
    turn = {"case": f"c/{arm}", "round": round_, "process": process}
    return {**turn, **figures, **meta, "unix_time_s": 1.5, **changes}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", manifest())


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def refused(path: Path) -> str:
    """The message with which `open` refuses the folder; one line."""
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory.open(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# Making and opening.


def test_what_is_created_can_be_opened(run: RunDirectory) -> None:
    again = RunDirectory.open(run.path)
    assert again.manifest == manifest()
    assert again.samples() == []


def test_parents_are_made(tmp_path: Path) -> None:
    assert RunDirectory.create(tmp_path / "a" / "b", manifest()).manifest_path.is_file()


def test_an_empty_folder_is_taken_even_with_what_a_kill_left_in_it(tmp_path: Path) -> None:
    (tmp_path / ".run.json.tmp").write_text('{"half')
    run = RunDirectory.create(tmp_path, manifest())
    assert [entry.name for entry in run.path.iterdir()] == ["run.json"]


def test_a_folder_with_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(RunDirectoryError, match=r"--resume continues .* another --out"):
        RunDirectory.create(tmp_path, manifest())
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_under_a_file_can_not_be_made(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "run", file / "deep" / "run"):
        with pytest.raises(RunDirectoryError, match="can't be written") as caught:
            RunDirectory.create(path, manifest())
        assert str(path) in str(caught.value)
        assert "--out" in str(caught.value)
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


def test_a_place_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    # The kernel's own file system refuses new folders even to root.
    with pytest.raises(RunDirectoryError, match=r"^/proc/nothing-here/run: can't be written"):
        RunDirectory.create("/proc/nothing-here/run", manifest())


def test_a_create_that_fails_takes_its_folders_back(tmp_path: Path) -> None:
    broken = manifest()
    broken["environment"]["load"] = math.nan
    with pytest.raises(ValueError, match=r"run\.json\.environment\.load: expected a finite number"):
        RunDirectory.create(tmp_path / "a" / "b", broken)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    assert "no such folder; give the folder that `perfbench run` wrote" in refused(tmp_path / "gone")
    assert "it has no run.json" in refused(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema_version": 1, ', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"schema_version": NaN}', "NaN is not JSON"),
        (b"[1, 2]", "expected a JSON object, got list"),
        (b"{}", "schema_version: expected 2, got None"),
        (b'{"schema_version": 2}', "perfbench_version: expected a value of type str, got NoneType"),
    ],
)
def test_a_corrupt_manifest_is_refused(run: RunDirectory, content: bytes, message: str) -> None:
    run.manifest_path.write_bytes(content)
    refusal = refused(run.path)
    assert message in refusal
    assert "run.json" in refusal
    assert "--out" in refusal


def test_another_schema_version_is_refused_with_the_version_that_reads_it(run: RunDirectory) -> None:
    run.manifest_path.write_text(json.dumps(manifest() | {"schema_version": 99, "perfbench_version": "9.1"}))
    refusal = refused(run.path)
    assert "schema_version: expected 2, got 99; read it with the perfbench that wrote it (9.1)" in refusal


def test_damage_inside_a_manifest_is_named(run: RunDirectory) -> None:
    damaged = manifest()
    damaged["cases"]["c/lora"]["status"] = "fine"
    run.manifest_path.write_text(json.dumps(damaged))
    assert "cases.c/lora.status: expected one of pending, ok, " in refused(run.path)
    damaged = manifest()
    del damaged["cases"]["c/lora"]["summary"]
    run.manifest_path.write_text(json.dumps(damaged))
    assert "cases.c/lora: expected every field of a case, got none called summary" in refused(run.path)
    damaged = manifest()
    damaged["comparisons"][0]["case_ids"].append("c/gone")
    run.manifest_path.write_text(json.dumps(damaged))
    assert "comparisons[0].case_ids: expected ids of cases of this run, got 'c/gone'" in refused(run.path)
    damaged = manifest()
    del damaged["comparisons"][0]["workload"]["requests"]
    run.manifest_path.write_text(json.dumps(damaged))
    assert "comparisons[0].workload: " in refused(run.path)


# Writing the manifest.


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_manifest_that_fails_half_way_leaves_the_old_one(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = run.manifest_path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync" if step == "fsync" else "pathlib.Path.replace", fail)
    run.manifest["finished_at"] = "now"
    with pytest.raises(RunDirectoryError, match=r"run\.json: disk full .* --resume"):
        run.write_manifest()
    assert run.manifest_path.read_bytes() == before
    assert [entry.name for entry in run.path.iterdir()] == ["run.json"]


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, which Linux has")
def test_a_full_disk_leaves_the_old_manifest(run: RunDirectory) -> None:
    before = run.manifest_path.read_bytes()
    (run.path / ".run.json.tmp").symlink_to(FULL)
    run.manifest["finished_at"] = "now"
    with pytest.raises(RunDirectoryError, match=r"run\.json: disk full"):
        run.write_manifest()
    assert run.manifest_path.read_bytes() == before
    assert [entry.name for entry in run.path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_has_not_is_never_written(run: RunDirectory, number: float) -> None:
    run.append_sample(sample("none", 0))
    before = (run.manifest_path.read_bytes(), run.samples_path.read_bytes())
    run.manifest["cases"]["c/lora"]["check"] = {"relative_difference": number}
    with pytest.raises(ValueError, match=r"run\.json\.cases\.c/lora\.check\.relative_difference"):
        run.write_manifest()
    with pytest.raises(ValueError, match=r"sample\.itl_ms\.1: expected a finite number"):
        run.append_sample(sample("none", 1, itl_ms=[1.0, number]))
    assert (run.manifest_path.read_bytes(), run.samples_path.read_bytes()) == before


# Samples.


def test_samples_come_back_as_they_went(run: RunDirectory) -> None:
    taken = [sample("none", 0), sample("lora", 0, 1.1, void="compiled in the window"), sample("para", 0)]
    for one in taken:
        run.append_sample(one)
        # Flushed at once: another reader sees every line while the run goes on.
        assert RunDirectory.open(run.path).samples()[-1] == one
    assert run.samples() == taken


def test_a_sample_of_another_form_or_case_is_refused(run: RunDirectory) -> None:
    with pytest.raises(ValueError, match=r"missing or unknown fields: \['extra'\]"):
        run.append_sample(sample("none", 0, extra=1))
    with pytest.raises(ValueError, match="unknown case 'c/gone'"):
        run.append_sample(sample("gone", 0))
    assert run.samples() == []


def test_a_kill_in_any_byte_of_the_last_line_loses_that_sample_only(run: RunDirectory) -> None:
    first, second, third = (sample("none", round_) for round_ in range(3))
    run.append_sample(first)
    start = run.samples_path.stat().st_size
    run.append_sample(second)
    whole = run.samples_path.read_bytes()
    for end in range(start, len(whole)):
        run.samples_path.write_bytes(whole[:end])
        resumed = RunDirectory.open(run.path)
        assert resumed.samples() == [first], end
        resumed.append_sample(third)
        assert resumed.samples() == [first, third], end
        lines = run.samples_path.read_bytes().splitlines(keepends=True)
        assert [json.loads(line)["round"] for line in lines] == [0, 2], end
    run.samples_path.write_bytes(whole)
    assert RunDirectory.open(run.path).samples() == [first, second]


def test_a_kill_in_the_first_line_of_all(run: RunDirectory) -> None:
    run.samples_path.write_bytes(b'{"case": "c/no')
    resumed = RunDirectory.open(run.path)
    assert resumed.samples() == []
    resumed.append_sample(sample("none", 0))
    assert [one["round"] for one in resumed.samples()] == [0]


@pytest.mark.parametrize("line", [b"{half", b"", b"[1]", b'{"case": "c/none"}', b"\xff", b"\0\0\0"])
def test_a_corrupt_line_elsewhere_is_named(run: RunDirectory, line: bytes) -> None:
    run.append_sample(sample("none", 0))
    run.append_sample(sample("none", 1))
    lines = run.samples_path.read_bytes().splitlines(keepends=True)
    run.samples_path.write_bytes(lines[0] + line + b"\n" + lines[1])
    with pytest.raises(RunDirectoryError, match=r"samples\.jsonl:2: .*; delete that line"):
        RunDirectory.open(run.path).samples()


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, which Linux has")
def test_a_full_disk_is_said_with_file_and_remedy(run: RunDirectory) -> None:
    run.samples_path.symlink_to(FULL)
    with pytest.raises(RunDirectoryError, match=r"samples\.jsonl: disk full .*--resume.*--out") as caught:
        run.append_sample(sample("none", 0))
    assert "\n" not in str(caught.value)


def test_a_disk_that_fills_up_in_a_line_is_cut_back(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes part of a line before it fails; when there is room again, the run goes on."""
    run.append_sample(sample("none", 0))
    before = run.samples_path.read_bytes()
    real_open = Path.open

    class Filling:
        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 10

        def __enter__(self) -> Filling:
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def fileno(self) -> int:
            return int(self.file.fileno())

        def write(self, data: bytes) -> int:
            if self.room == 0:
                raise OSError(28, "No space left on device")
            written, self.room = self.file.write(data[: self.room]), 0
            return int(written)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *a, **k: Filling(real_open(path, *a, **k)))
        with pytest.raises(RunDirectoryError, match="disk full"):
            run.append_sample(sample("none", 1))
    assert run.samples_path.read_bytes() == before
    run.append_sample(sample("none", 2))
    assert [one["round"] for one in run.samples()] == [0, 2]


def test_samples_that_are_gone_are_not_taken_for_none(run: RunDirectory) -> None:
    for arm in ARMS:
        run.append_sample(sample(arm, 0))
    run.summarise()
    run.write_manifest()
    run.samples_path.unlink()
    with pytest.raises(RunDirectoryError, match=r"samples\.jsonl: can't be read \(No such file"):
        RunDirectory.open(run.path).summarise()


# Summaries.


def take(run: RunDirectory, rounds: int = 3) -> None:
    """`rounds` rounds in which LoRA's step takes twice as long as the bare backbone's, PARA's 1.25 times."""
    for round_ in range(rounds):
        drift = 1 + round_  # the machine slows down: only ratios within a round are right
        for arm, slowness in (("none", 1.0), ("lora", 2.0), ("para", 1.25)):
            run.append_sample(sample(arm, round_, slowness * drift))


def test_summaries_are_of_the_samples(run: RunDirectory) -> None:
    take(run)
    run.summarise()
    none, lora, para = (run.manifest["cases"][f"c/{arm}"] for arm in ARMS)
    assert none["summary"]["itl_ms"]["median"] == 40.0
    assert none["summary"]["itl_ms"]["rounds"] == 6
    assert none["summary"]["total_ms"]["rounds"] == 3
    assert none["summary"]["decode_tokens_per_s"]["max"] == pytest.approx(100.0)
    assert "energy_mj_per_token" not in none["summary"]
    kept = lora["kept"]["decode_tokens_per_s"]
    half = pytest.approx(0.5)
    assert kept == {"ratio": half, "low": None, "high": None, "rounds": 3, "correlated": None}
    assert para["kept"]["decode_tokens_per_s"]["ratio"] == pytest.approx(0.8)
    assert para["versus_lora"]["decode_tokens_per_s"]["ratio"] == pytest.approx(1.6)
    assert none["versus_lora"]["decode_tokens_per_s"]["ratio"] == pytest.approx(2.0)
    # An arm beside itself is not a measurement.
    assert none["kept"] is None
    assert lora["versus_lora"] is None
    run.write_manifest()
    assert read(run.manifest_path)["cases"]["c/lora"]["kept"]["tokens_per_s"]["rounds"] == 3


def test_tails_are_those_of_all_steps_and_of_all_repetitions(run: RunDirectory) -> None:
    """50 repetitions have 100 steps, and are too few for a tail of their 50 times to the first token."""
    for round_ in range(50):
        run.append_sample(sample("lora", round_, 1 + round_))
    run.append_sample(sample("lora", 50, 1000.0, void="compiled in the window"))
    run.summarise()
    found = run.manifest["cases"]["c/lora"]["summary"]
    assert found["itl_ms"]["p95"] == pytest.approx(950.0, abs=10)  # steps of 20, 20, 40, 40 ... 1,000, 1,000 ms
    assert found["itl_ms"]["p99"] is None
    assert found["ttft_ms"]["p95"] is None
    assert "p95" not in found["total_ms"]


def test_a_run_without_tails_is_given_them_from_its_samples(run: RunDirectory) -> None:
    for round_ in range(50):
        run.append_sample(sample("lora", round_, 1 + round_))
    run.summarise()
    found = run.manifest["cases"]["c/lora"]["summary"]
    whole = json.loads(json.dumps(found))
    for name in found:
        found[name] = {key: value for key, value in found[name].items() if not key.startswith("p9")}
    run.write_manifest()
    old = RunDirectory.open(run.path)
    old.add_tails(old.samples())
    assert old.manifest["cases"]["c/lora"]["summary"] == whole
    # Of a part of the samples they would be other figures.
    part = RunDirectory.open(run.path)
    part.add_tails(part.samples()[:-1])
    assert "p95" not in part.manifest["cases"]["c/lora"]["summary"]["itl_ms"]


def test_void_samples_count_for_nothing(run: RunDirectory) -> None:
    take(run)
    run.append_sample(sample("none", 3))
    run.append_sample(sample("lora", 3, 100.0, void="compiled in the window"))
    run.summarise()
    lora = run.manifest["cases"]["c/lora"]
    assert lora["summary"]["total_ms"]["rounds"] == 3
    assert lora["kept"]["tokens_per_s"]["rounds"] == 3


@pytest.mark.parametrize("status", ["check_failed", "check_void", "crashed", "out_of_memory", "pending"])
def test_no_speed_without_a_passed_check(run: RunDirectory, status: str) -> None:
    take(run)
    run.summarise()
    assert run.manifest["cases"]["c/lora"]["summary"] is not None
    run.manifest["cases"]["c/lora"]["status"] = status
    run.summarise()
    lora, para = run.manifest["cases"]["c/lora"], run.manifest["cases"]["c/para"]
    assert (lora["summary"], lora["kept"], lora["versus_lora"]) == (None, None, None)
    assert para["versus_lora"] is None
    assert para["kept"] is not None


def test_arms_of_other_kernels_are_not_compared(run: RunDirectory) -> None:
    take(run)
    run.manifest["cases"]["c/lora"]["kernels"] = "triton"
    run.summarise()
    assert run.manifest["cases"]["c/lora"]["kept"] is None
    assert run.manifest["cases"]["c/para"]["versus_lora"] is None


def test_rounds_of_different_processes_are_not_paired(run: RunDirectory) -> None:
    run.append_sample(sample("none", 0, process=0))
    run.append_sample(sample("lora", 0, process=1))
    run.append_sample(sample("para", 0, process=0))
    run.summarise()
    assert run.manifest["cases"]["c/lora"]["kept"] is None
    assert run.manifest["cases"]["c/para"]["kept"]["tokens_per_s"] == {
        "ratio": 1.0,
        "low": None,
        "high": None,
        "rounds": 1,
        "correlated": None,
    }


def test_what_a_process_shares_widens_the_interval_of_several(run: RunDirectory) -> None:
    """Two processes that differ, each steady: rounds in one pot had an interval with nothing in it but the two."""
    for process, factor in ((0, 1.0), (1, 1.1)):
        for round_ in range(4):
            run.append_sample(sample("none", round_, process=process))
            run.append_sample({**sample("lora", round_, process=process), "tokens_per_s": 100.0 * factor})
    run.summarise()
    kept = run.manifest["cases"]["c/lora"]["kept"]["tokens_per_s"]
    assert kept["high"] / kept["low"] > 2  # of two processes Student's t reaches 12.7 errors
    assert kept["correlated"] is None


def test_a_turn_taken_twice_is_an_error_of_the_file(run: RunDirectory) -> None:
    take(run, rounds=1)
    run.append_sample(sample("lora", 0))
    with pytest.raises(RunDirectoryError, match=r"samples\.jsonl: c/lora: two samples in round 0"):
        run.summarise()


def test_energy_per_token_where_it_was_measured(run: RunDirectory) -> None:
    run.append_sample(sample("none", 0, energy_mj=60.0))
    run.append_sample(sample("none", 1, energy_mj=None))
    run.summarise()
    energy = run.manifest["cases"]["c/none"]["summary"]["energy_mj_per_token"]
    assert (energy["median"], energy["rounds"]) == (10.0, 1)  # 2 requests x 3 tokens


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ({}, 0),
        ({"lora": "check_failed"}, 1),
        ({"lora": "check_void"}, 1),
        ({"lora": "crashed"}, 4),
        ({"lora": "out_of_memory"}, 4),
        ({"lora": "pending"}, 4),
        ({"lora": "check_failed", "para": "crashed"}, 4),
    ],
)
def test_exit_codes(tmp_path: Path, statuses: dict[str, str], code: int) -> None:
    run = RunDirectory.create(tmp_path / "run", manifest(statuses))
    take(run)
    run.summarise()
    assert run.exit_code() == code


def test_a_case_with_nothing_but_void_samples_was_not_measured(run: RunDirectory) -> None:
    for arm in ("none", "lora"):
        run.append_sample(sample(arm, 0))
    run.append_sample(sample("para", 0, void="compiled in the window"))
    run.summarise()
    assert run.manifest["cases"]["c/para"]["summary"] is None
    assert run.exit_code() == 4


@pytest.mark.parametrize("change", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-40])])
def test_samples_that_vanish_during_the_run_are_noticed(run: RunDirectory, change: Any) -> None:
    """At the next sample, and at the latest where they are summed up."""
    run.append_sample(sample("none", 0))
    run.append_sample(sample("none", 1))
    change(run.samples_path)
    with pytest.raises(RunDirectoryError, match="another program changed it during the run"):
        run.summarise()
    with pytest.raises(RunDirectoryError, match="another program changed it during the run"):
        run.append_sample(sample("none", 2))
