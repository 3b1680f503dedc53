"""Real committed runs compared, each with a fault planted: every one is named, and none passes."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perfbench.errors import ComparisonError, PerfbenchError, RunDirectoryError
from perfbench.gate import policy, stored
from perfbench.gate.formats import names, written
from perfbench.gate.gate_report import Report
from perfbench.gate.machines import machine_differences
from perfbench.run_folder.run_directory import MANIFEST, SAMPLES
from tests.perfbench.gate import runs


def compared(baseline: Path, candidate: Path, *, rules: str = "{}", tmp_path: Path | None = None, **how: Any) -> Report:
    exact_only = how.get("exact_only", False)
    sides = [stored.load(path, exact_only=exact_only) for path in (baseline, candidate)]
    found = policy.load(None)
    if tmp_path:
        (tmp_path / "policy.yaml").write_text(rules)
        found = policy.load(tmp_path / "policy.yaml")
    return stored.compare(found, *sides, **how)


def of(report: Report, figure: str, case: str = runs.LORA) -> list[Any]:
    return [one for one in report.findings if one.case == case and one.figure == figure]


def test_two_runs_of_one_commit_pass_by_their_exact_figures() -> None:
    """Three committed runs on a noisy machine differ by 14% in speed and in no exact figure."""
    folders = [runs.ROOT / "results" / "cpu-110m" / f"q8-run-{number}" for number in (1, 2, 3)]
    for other in folders[1:]:
        report = compared(folders[0], other)
        assert (report.verdict, report.exit_code) == ("pass", 0)
        assert not report.of("fail", "inconclusive")
        assert sum(one.kind == "exact" and one.status == "pass" for one in report.findings) == 96
        assert "no timed figure was gated" in report.reason
        assert any("1 process a side, 6 needed" in one.note for one in report.findings)


@pytest.mark.parametrize(
    ("part", "figure", "step"),
    [
        ("exact", "aten_ops_per_decode_step", 1),
        ("exact", "flops_per_decode_step", 1),
        ("adapters", "bytes_per_tenant", 1),
        ("adapters", "parameters_per_tenant", -1),
        ("memory", "peak_allocated_bytes", 1),
        ("exact", "kept_bound", -1e-9),
    ],
)
def test_one_more_of_an_exact_figure_fails(tmp_path: Path, part: str, figure: str, step: float) -> None:
    def plant(manifest: dict[str, Any]) -> None:
        manifest["cases"][runs.LORA][part][figure] += step

    report = compared(runs.COMMITTED, runs.copy_of(tmp_path / "run", manifest=plant), exact_only=True)
    assert report.exit_code == 1
    assert [(one.case, one.figure) for one in report.of("fail")] == [(runs.LORA, figure)]
    assert figure in report.headline


def test_one_less_is_better_and_told(tmp_path: Path) -> None:
    def plant(manifest: dict[str, Any]) -> None:
        manifest["cases"][runs.LORA]["exact"]["aten_ops_per_decode_step"] -= 1

    report = compared(runs.COMMITTED, runs.copy_of(tmp_path / "run", manifest=plant), exact_only=True)
    assert report.exit_code == 0
    assert "renew the baseline" in of(report, "aten_ops_per_decode_step")[0].note


@pytest.mark.parametrize(
    ("part", "figure", "value", "why"),
    [
        ("exact", "flops_per_decode_step", 0, "nothing is left of what the baseline has"),
        ("exact", "flops_per_decode_step", 1, "fewer than the .* that the step can't do without"),
        ("memory", "peak_allocated_bytes", 0, "nothing is left"),
        ("exact", "kept_bound", 1.01, "no arm reads less than the bare backbone"),
    ],
)
def test_a_fall_that_can_t_be_is_not_called_better(
    tmp_path: Path, part: str, figure: str, value: float, why: str
) -> None:
    def plant(manifest: dict[str, Any]) -> None:
        manifest["cases"][runs.LORA][part][figure] = value

    report = compared(runs.COMMITTED, runs.copy_of(tmp_path / "run", manifest=plant), exact_only=True)
    assert report.exit_code == 1
    (found,) = report.of("fail")
    assert re.search(f"contradictory: .* -> .*, {why}", found.note)


def test_what_the_baseline_can_t_have_counted_is_not_gated(tmp_path: Path) -> None:
    """A count of 0 FLOPs, as torch gives it where its registry lacks an operation, and the right one: no regression."""

    def plant(flops: int) -> Callable[[dict[str, Any]], None]:
        def change(manifest: dict[str, Any]) -> None:
            exact = manifest["cases"][runs.LORA]["exact"]
            exact |= {"flops_per_decode_step": flops, "least_flops_per_decode_step": 1000}

        return change

    wrong, right = (runs.copy_of(tmp_path / f"{flops}", manifest=plant(flops)) for flops in (0, 1000))
    report = compared(wrong, right, exact_only=True)
    assert report.exit_code == 0
    (found,) = [one for one in of(report, "flops_per_decode_step") if one.case == runs.LORA]
    assert (found.status, found.note.split(": ")[1]) == ("shown", "the baseline's contradicts itself")
    assert compared(right, wrong, exact_only=True).exit_code == 1


def test_a_figure_that_vanished_fails(tmp_path: Path) -> None:
    def plant(manifest: dict[str, Any]) -> None:
        manifest["cases"][runs.LORA]["exact"]["flops_per_decode_step"] = None

    report = compared(runs.COMMITTED, runs.copy_of(tmp_path / "run", manifest=plant), exact_only=True)
    assert report.exit_code == 1
    assert "no such figure" in report.reason


def test_a_missing_case_fails(tmp_path: Path) -> None:
    def plant(manifest: dict[str, Any]) -> None:
        del manifest["cases"][runs.LORA]
        for comparison in manifest["comparisons"]:
            comparison["case_ids"] = [one for one in comparison["case_ids"] if one != runs.LORA]

    for exact_only in (True, False):
        run = runs.copy_of(tmp_path / f"run-{exact_only}", manifest=plant)
        report = compared(runs.COMMITTED, run, exact_only=exact_only)
        assert report.exit_code == 1
        assert report.reason == f"{runs.LORA}: missing in the candidate"
    # The other way round it is new, and nothing is wrong.
    report = compared(run, runs.COMMITTED, exact_only=True)
    assert report.exit_code == 0
    assert of(report, "")[0].status == "shown"


@pytest.mark.parametrize("status", ["crashed", "out_of_memory", "check_failed", "check_void", "pending"])
def test_a_case_that_was_not_measured_fails_under_its_own_name(tmp_path: Path, status: str) -> None:
    def plant(manifest: dict[str, Any]) -> None:
        manifest["cases"][runs.LORA].update(status=status, reason="ended by SIGSEGV\nsecond line", summary=None)

    run = runs.copy_of(tmp_path / "run", manifest=plant)
    report = compared(runs.COMMITTED, run)
    assert report.exit_code == 1
    word = "not measured" if status == "pending" else status.replace("_", " ")
    assert f"{word} (ended by SIGSEGV second line) in the candidate" in report.reason
    assert not [one for one in report.findings if one.case == runs.LORA and one.kind != "case"]
    assert compared(run, run).exit_code == 1, "measured on neither side is no pass"
    assert compared(run, runs.COMMITTED).exit_code == 0


def test_a_skipped_case_may_be_missing_and_says_why(tmp_path: Path) -> None:
    def plant(manifest: dict[str, Any]) -> None:
        manifest["cases"][runs.LORA].update(status="crashed", reason="known")

    rules = "overrides: [{cases: '*/transformers/*/lora-eager', reason: known bug 12, skip: true}]"
    run = runs.copy_of(tmp_path / "run", manifest=plant)
    report = compared(runs.COMMITTED, run, rules=rules, tmp_path=tmp_path, exact_only=True)
    assert report.exit_code == 0
    assert "known bug 12" in of(report, "")[0].note


def test_a_tolerance_lets_pass_what_is_within_it(tmp_path: Path) -> None:
    def plant(manifest: dict[str, Any]) -> None:
        memory = manifest["cases"][runs.LORA]["memory"]
        memory["peak_allocated_bytes"] = round(memory["peak_allocated_bytes"] * 1.01)

    run = runs.copy_of(tmp_path / "run", manifest=plant)
    for rules, code in (
        ("exact: {peak_allocated_bytes: {tolerance: 0.02}}", 0),
        ("exact: {peak_allocated_bytes: {tolerance: 0.005}}", 1),
        ("overrides: [{cases: '*', reason: pages, exact: {peak_allocated_bytes: {tolerance: 0.02}}}]", 0),
        ("overrides: [{cases: '*/ia3*', reason: pages, exact: {peak_allocated_bytes: {tolerance: 0.02}}}]", 1),
    ):
        report = compared(runs.COMMITTED, run, rules=rules, tmp_path=tmp_path, exact_only=True)
        assert report.exit_code == code, rules


@pytest.mark.parametrize(
    ("slowdown", "verdict", "word"),
    [
        (0.0, "pass", "no worse"),
        (0.05, "regression", "slower by"),
        (0.03, "inconclusive", "inside it"),
        (-0.2, "pass", "no worse"),
        (-0.4, "regression", "implausible gain"),
    ],
)
def test_a_planted_slowdown_of_six_processes(
    tmp_path: Path, baseline: Path, slowdown: float, verdict: str, word: str
) -> None:
    run = runs.half_of(tmp_path / "run", 1, sample=runs.slower_by(slowdown, quiet=True))
    report = compared(baseline, run)
    assert report.verdict == verdict
    assert word in report.reason


def test_noise_is_inconclusive_and_not_a_pass(tmp_path: Path) -> None:
    """The real samples, as noisy as they were: six processes of 8 rounds can't tell 5% from nothing."""
    baseline, run = runs.half_of(tmp_path / "a", 0), runs.half_of(tmp_path / "b", 1, sample=runs.slower_by(0.05))
    report = compared(baseline, run)
    assert report.exit_code == 3
    assert "inside it" in report.reason


def test_five_processes_are_shown_and_not_gated(tmp_path: Path, baseline: Path) -> None:
    run = runs.half_of(tmp_path / "run", 1, processes=5, sample=runs.slower_by(0.5, quiet=True))
    report = compared(baseline, run)
    assert report.exit_code == 0
    (primary,) = [one for one in report.findings if one.kind == "timed" and one.note]
    assert (primary.status, primary.note[:33]) == ("shown", "not gated: 5 processes a side, 6 ")
    assert primary.change == pytest.approx(1 / 1.5 - 1, abs=0.05)


def test_a_primary_figure_that_matches_nothing_fails(tmp_path: Path, baseline: Path) -> None:
    rules = "timed: {primary: [{figure: ttft_ms, cases: '*/no-such-*'}]}"
    report = compared(baseline, baseline, rules=rules, tmp_path=tmp_path)
    assert report.exit_code == 1
    assert "no case in common matches '*/no-such-*'" in report.reason


def test_a_figure_that_only_one_side_measured_fails(tmp_path: Path, baseline: Path) -> None:
    rules = "timed: {primary: [{figure: energy_mj_per_token}]}"
    report = compared(baseline, baseline, rules=rules, tmp_path=tmp_path)
    assert report.exit_code == 1
    assert "not measured in the baseline" in report.reason


def test_a_policy_that_gates_nothing_is_no_pass(tmp_path: Path) -> None:
    rules = "overrides: [{cases: '*', reason: all off, skip: true}]\ntimed: {primary: []}"
    for exact_only in (True, False):
        report = compared(runs.COMMITTED, runs.COMMITTED, rules=rules, tmp_path=tmp_path, exact_only=exact_only)
        assert report.exit_code == 2
        assert "no figure was gated" in report.reason


@pytest.mark.parametrize(
    ("plant", "word"),
    [
        (lambda env: env["cpu"].update(model="Another CPU"), "CPU AMD EPYC and Another CPU"),
        (lambda env: env["cpu"].update(threads=1), "threads 2 and 1"),
        (lambda env: env["cpu"].update(max_clock_mhz=3000), "highest CPU clock unknown and 3000"),
        (lambda env: env.update(gpus=[{"name": "A"}]), "0 and 1 GPUs"),
    ],
)
def test_another_machine_is_refused_and_named(tmp_path: Path, plant: Any, word: str) -> None:
    run = runs.copy_of(tmp_path / "run", manifest=lambda manifest: plant(manifest["environment"]))
    with pytest.raises(ComparisonError, match=word) as refused:
        compared(runs.COMMITTED, run)
    assert "--other-machine" in str(refused.value)
    for how in ({"other_machine": True}, {"exact_only": True}):
        report = compared(runs.COMMITTED, run, **how)
        assert report.exit_code == 0
        assert word in report.notes[0]


@pytest.mark.parametrize("how", [{"exact_only": True}, {"other_machine": True}])
def test_peak_bytes_are_exact_on_one_machine_only(tmp_path: Path, how: dict[str, bool]) -> None:
    """One commit on one core and on two took 37,398,840 and 37,530,552 bytes; what threads don't change is judged."""

    def plant(manifest: dict[str, Any]) -> None:
        manifest["environment"]["cpu"]["threads"] = 1
        manifest["cases"][runs.LORA]["memory"]["peak_allocated_bytes"] += 131_712

    run = runs.copy_of(tmp_path / "run", manifest=plant)
    report = compared(runs.COMMITTED, run, **how)
    assert report.exit_code == 0
    (peak,) = of(report, "peak_allocated_bytes")
    assert (peak.status, peak.note) == ("shown", "not gated: it depends on the machine (threads 2 and 1)")
    assert of(report, "aten_ops_per_decode_step")[0].status == "pass"
    manifest = json.loads((run / MANIFEST).read_text())
    manifest["environment"]["cpu"]["threads"] = 2
    (run / MANIFEST).write_text(json.dumps(manifest))
    assert [one.figure for one in compared(runs.COMMITTED, run, **how).of("fail")] == ["peak_allocated_bytes"]


def test_tails_are_shown_and_judged_where_the_policy_names_them(tmp_path: Path, baseline: Path) -> None:
    """A process of 8 repetitions has 120 steps, enough for a p95 of these, and 8 times to the first token."""
    run = runs.half_of(tmp_path / "run", 1, sample=runs.slower_by(0.1, quiet=True))
    report = compared(baseline, run)
    assert [one.status for one in of(report, "itl_p95_ms")] == ["shown"]
    assert not of(report, "itl_p99_ms")
    assert not of(report, "ttft_p95_ms")
    assert not [one for one in report.of("fail") if "_p95_" in one.figure]
    judged = compared(baseline, run, rules="timed: {primary: [{figure: itl_p95_ms}]}", tmp_path=tmp_path)
    assert judged.verdict == "regression"
    assert "itl_p95_ms: slower by" in judged.reason
    few = compared(baseline, run, rules="timed: {primary: [{figure: ttft_p95_ms}]}", tmp_path=tmp_path)
    assert few.exit_code == 1
    assert "too few repetitions of a process" in few.reason
    assert "from 100 repetitions on" in few.reason


def test_another_driver_is_another_machine() -> None:
    gpu = {"name": "G", "driver": "1", "max_sm_clock_mhz": 1000, "power_limit_watts": 300, "memory_bytes": 1}
    one = {"gpus": [gpu]}
    assert machine_differences(one, {"gpus": [{**gpu, "sm_clock_mhz": 5}]}) == []
    for key in ("driver", "max_sm_clock_mhz", "power_limit_watts", "name"):
        assert key in machine_differences(one, {"gpus": [{**gpu, key: "other"}]})[0]


def test_a_gpu_that_ran_at_another_clock_is_refused(tmp_path: Path) -> None:
    """The same card with the same limits, throttled by 5% while the candidate ran."""
    sides = [
        runs.half_of(tmp_path / f"{clock}", 0, sample=lambda one, clock=clock: one.update(sm_clock_mhz=clock))
        for clock in (1980, 1975, 1880)
    ]
    assert compared(sides[0], sides[1]).verdict != "invalid"
    with pytest.raises(ComparisonError, match=r"GPU clock while measuring 1980\.0 and 1880\.0 MHz"):
        compared(sides[0], sides[2])


def test_memory_that_a_boot_changed_is_the_same_machine() -> None:
    assert machine_differences({"cpu": {"memory_bytes": 100_000}}, {"cpu": {"memory_bytes": 100_400}}) == []
    assert machine_differences({"cpu": {"memory_bytes": 100_000}}, {"cpu": {"memory_bytes": 200_000}})


def test_other_versions_and_settings_are_told(tmp_path: Path) -> None:
    def plant(manifest: dict[str, Any]) -> None:
        manifest["environment"]["versions"]["torch"] = "2.14.0"
        manifest["scenario"]["repetitions"] = 7

    report = compared(runs.COMMITTED, runs.copy_of(tmp_path / "run", manifest=plant), exact_only=True)
    assert report.exit_code == 0
    assert "torch 2.13.0+cpu -> 2.14.0" in report.notes[0]
    assert "repetitions 100 -> 7" in report.notes[1]


def test_truncated_samples_are_refused(tmp_path: Path) -> None:
    for number, cut in enumerate((1, 100, 100_000)):
        run = runs.copy_of(tmp_path / f"run{number}")
        samples = run / SAMPLES
        samples.write_bytes(samples.read_bytes()[:-cut])
        with pytest.raises(ComparisonError, match=r"expected the 100 valid samples .* got \d\d; restore"):
            stored.load(run, exact_only=False)
        assert compared(runs.COMMITTED, run, exact_only=True).exit_code == 0
    (run / SAMPLES).unlink()
    with pytest.raises(RunDirectoryError, match="can't be read"):
        stored.load(run, exact_only=False)


@pytest.mark.parametrize(
    "plant", [{"itl_ms": []}, {"itl_ms": "x"}, {"total_ms": -1.0}, {"total_ms": None}, {"process": "x"}]
)
def test_a_malformed_sample_is_refused(tmp_path: Path, plant: dict[str, Any]) -> None:
    run = runs.copy_of(tmp_path / "run")
    first, _, rest = (run / SAMPLES).read_text().partition("\n")
    (run / SAMPLES).write_text(json.dumps(json.loads(first) | plant) + "\n" + rest)
    with pytest.raises(RunDirectoryError, match=rf"samples\.jsonl:1: {next(iter(plant))}: expected "):
        stored.load(run, exact_only=False)


def test_a_figure_that_is_no_number_is_refused(tmp_path: Path) -> None:
    def plant(manifest: dict[str, Any]) -> None:
        manifest["cases"][runs.LORA]["exact"]["flops_per_decode_step"] = "many"

    with pytest.raises(RunDirectoryError, match=r"flops_per_decode_step: expected a number or null .* got 'many'"):
        compared(runs.COMMITTED, runs.copy_of(tmp_path / "run", manifest=plant), exact_only=True)


@pytest.mark.parametrize("exact_only", [True, False])
def test_a_status_without_a_valid_sample_is_no_measurement(tmp_path: Path, exact_only: bool) -> None:
    """A run that was throttled all along: every sample is void, and every status says ok."""
    run = runs.copy_of(tmp_path / "run", manifest=_without_summaries)
    lines = (json.loads(line) | {"void": "throttled"} for line in (run / SAMPLES).read_text().splitlines())
    (run / SAMPLES).write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = compared(runs.COMMITTED, run, exact_only=exact_only)
    assert report.exit_code == 1
    assert "none of its samples is valid" in report.reason
    assert not [one for one in report.findings if one.status == "pass"]


def _without_summaries(manifest: dict[str, Any]) -> None:
    for case in manifest["cases"].values():
        case.update(summary=None, kept=None, versus_lora=None, versus_plain=None)


def test_without_samples_the_summary_says_whether_a_case_was_measured(tmp_path: Path) -> None:
    for name, plant, code in (("kept", lambda _: None, 0), ("void", _without_summaries, 1)):
        run = runs.copy_of(tmp_path / name, manifest=plant)
        (run / SAMPLES).unlink()
        assert compared(runs.COMMITTED, run, exact_only=True).exit_code == code


@pytest.mark.parametrize("check", [None, {"passed": False}])
def test_a_status_without_a_passed_check_is_no_measurement(tmp_path: Path, check: Any) -> None:
    run = runs.copy_of(tmp_path / "run", manifest=lambda manifest: manifest["cases"][runs.LORA].update(check=check))
    for exact_only in (True, False):
        report = compared(runs.COMMITTED, run, exact_only=exact_only)
        assert report.exit_code == 1
        assert "its check did not pass" in report.reason


@pytest.mark.parametrize("size", [-5, -1e-9, "-1e999", "NaN", "true"])
def test_a_size_that_can_not_be_is_refused(tmp_path: Path, size: Any) -> None:
    run = runs.copy_of(
        tmp_path / "run", manifest=lambda manifest: manifest["cases"][runs.LORA]["memory"].update(adapter_bytes="@")
    )
    (run / MANIFEST).write_text((run / MANIFEST).read_text().replace('"@"', str(size)))
    with pytest.raises((ComparisonError, RunDirectoryError)):
        compared(runs.COMMITTED, run, exact_only=True)


def test_a_change_too_large_for_a_number_fails_and_is_written(tmp_path: Path) -> None:
    sides = [
        runs.copy_of(
            tmp_path / str(number),
            manifest=lambda manifest, size=size: manifest["cases"][runs.LORA]["memory"].update(adapter_bytes=size),
        )
        for number, size in enumerate((5e-324, 1e24))
    ]
    report = compared(*sides, exact_only=True)
    assert report.exit_code == 1
    assert json.loads(written(report, "json"))["verdict"] == "regression"


def test_a_run_still_being_written_is_refused(tmp_path: Path) -> None:
    run = runs.copy_of(tmp_path / "run", manifest=lambda manifest: manifest.update(finished_at=None))
    with pytest.raises(ComparisonError, match="not finished"):
        stored.load(run, exact_only=True)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    run = runs.copy_of(tmp_path / "run", manifest=lambda manifest: manifest.update(schema_version=1))
    with pytest.raises(RunDirectoryError, match="schema_version: expected 2, got 1"):
        stored.load(run, exact_only=True)


def test_no_case_in_common_is_refused() -> None:
    with pytest.raises(ComparisonError, match="no case in common"):
        compared(runs.COMMITTED, runs.ROOT / "results" / "cpu-110m" / "q8-run-1", exact_only=True)


def test_the_run_json_or_its_folder_is_taken() -> None:
    one = stored.load(runs.COMMITTED / MANIFEST, exact_only=True)
    assert one.path == runs.COMMITTED
    assert "56721775bf44" in one.label


def test_no_mangled_run_is_a_traceback(tmp_path: Path) -> None:
    """400 runs in which one value, anywhere, became another kind of value: each is compared or refused in one line."""
    draw = random.Random(0)
    junk = [None, 0, -1, 1e400, "x", [], {}, [1], {"a": 1}, True]
    cases = [runs.LORA, runs.LORA.replace("lora", "none")]
    lines = [json.loads(line) for line in (runs.COMMITTED / SAMPLES).read_text().splitlines()]
    lines = [one for one in lines if one["case"] in cases and one["round"] < 2]
    source = json.loads((runs.COMMITTED / MANIFEST).read_text())
    source["cases"] = {case: source["cases"][case] for case in cases}
    source["comparisons"] = [{**source["comparisons"][0], "case_ids": cases}]
    for case in source["cases"].values():
        case["summary"]["total_ms"]["rounds"] = 2

    def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        found = [place] if place else []
        members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return found + [inner for key, member in members for inner in places(member, (*place, key))]

    def write(folder: Path, manifest: Any, samples: Any) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / MANIFEST).write_text(json.dumps(manifest))
        (folder / SAMPLES).write_text("".join(json.dumps(one) + "\n" for one in samples))
        return folder

    good = write(tmp_path / "good", source, lines)
    refusals = []
    in_manifest, in_lines = places(source), places(lines)
    for _ in range(400):
        manifest, samples = copy.deepcopy(source), copy.deepcopy(lines)
        target: Any = manifest if draw.random() < 0.7 else samples
        place = draw.choice(in_manifest if target is manifest else in_lines)
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = draw.choice(junk)
        try:
            report = compared(good, write(tmp_path / "bad", manifest, samples))
            for name in names():
                written(report, name)
        except PerfbenchError as error:
            refusals.append(str(error))
    assert len(refusals) > 100
    assert not [one for one in refusals if "\n" in one]
