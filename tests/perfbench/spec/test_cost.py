"""What a scenario costs is counted before anything is made, and refused above limits that a flag lifts."""

from __future__ import annotations

from pathlib import Path

import pytest

from perfbench.cli import main
from perfbench.files.yaml_source import read
from perfbench.run_folder.run_directory import MANIFEST, SAMPLES, RunDirectory
from perfbench.spec import cases, cost, scenario
from perfbench.spec.traffic import is_traffic

ROOT = Path(__file__).parents[3]
SCENARIO = """\
backbone: llama-tiny
dtype: fp32
device: cpu
runtime: [transformers, static]
kernels: eager
methods: [lora, peft]
workload: {{prompt_tokens: {prompts}, new_tokens: {new}, requests: 2, tenants: {tenants}, resident: {resident}}}
warmup: {warmup}
repetitions: {repetitions}
processes: {processes}
"""


def written(folder: Path, **fields: str) -> str:
    usual = {"prompts": "4", "new": "2", "tenants": "1", "resident": "8"}
    usual |= {"warmup": "1", "repetitions": "2", "processes": "1"}
    (folder / "x.yaml").write_text(SCENARIO.format(**(usual | fields)))
    return str(folder / "x.yaml")


def many(count: int) -> str:
    return str(list(range(2, count + 2)))


SHIPPED = [file for file in sorted((ROOT / "scenarios").glob("*.yaml")) if not is_traffic(read(file).values)]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_count_is_that_of_the_cases_that_are_made(file: Path) -> None:
    document = scenario.load(file)
    for kind in document.device_kinds:
        resolved = scenario.resolve(document, kind)
        made = cases.expand(resolved)
        counted = cost.of_scenario(resolved)
        assert counted.cases == sum(len(comparison.cases) for comparison in made)
        assert counted == cost.of_comparisons(resolved, made)
        assert counted.turns == counted.cases * (resolved.rounds + resolved.warmup * resolved.processes)
        cost.check(resolved, counted, large=False)


@pytest.mark.parametrize("folder", ["cpu-multitenant", "cpu-chat-turns", "cpu-110m/q8-run-1", "cpu-tenant-sweep/q8"])
def test_the_estimated_bytes_are_those_of_a_real_run_within_a_factor_of_two(folder: str) -> None:
    path = ROOT / "results" / folder
    manifest = RunDirectory.open(path).manifest
    steps = max(one["workload"]["new_tokens"] for one in manifest["comparisons"])
    rounds = manifest["scenario"]["repetitions"] * manifest["scenario"].get("processes", 1)
    line = cost._LINE_BYTES + cost._STEP_BYTES * steps
    estimated = len(manifest["cases"]) * (cost._CASE_BYTES + rounds * line)
    real = (path / MANIFEST).stat().st_size + (path / SAMPLES).stat().st_size
    assert real / 2 < estimated < real * 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"repetitions": "1000000000000"}, "expected at most 1,000,000 turns"),
        ({"processes": "1000000000000"}, "expected at most 1,000,000 turns"),
        ({"warmup": "1000000000000"}, "expected at most 1,000,000 turns"),
        ({"repetitions": "150000", "new": "490"}, "expected at most 1,073,741,824 bytes on disk"),
        ({"prompts": many(200), "new": many(200)}, "expected at most 2,000 cases, got 200,000"),
        ({"prompts": many(200), "new": many(200), "tenants": many(999), "resident": "2000"}, "at most 2,000 cases"),
    ],
)
@pytest.mark.parametrize("command", ["validate", "run"])
def test_what_costs_too_much_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, str], words: str, command: str
) -> None:
    more = ["--out", str(tmp_path / "out")] if command == "run" else []
    assert main([command, written(tmp_path, **fields), *more]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert words in last
    assert "x.yaml:1: " in last
    assert last.endswith("or say --large")
    assert not (tmp_path / "out").exists()


def test_the_flag_lifts_the_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, repetitions="1000000", prompts=many(50), new=many(21))
    assert main(["validate", file]) == 2
    assert main(["validate", file, "--large"]) == 0
    assert main(["run", file, "--dry-run", "--large"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 5 * 50 * 21


def test_of_many_cases_a_few_may_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, prompts=many(80), new=many(80))
    assert main(["run", file, "--dry-run"]) == 2
    assert main(["run", file, "--dry-run", "--case", "*p4-n2-*"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    file = written(tmp_path, prompts=many(200), new=many(200))
    assert main(["run", file, "--dry-run", "--case", "*p4-n2-*"]) == 2
    assert "expected at most 20,000 comparisons, the product of all axes, got 80,000" in capsys.readouterr().err
    assert main(["profile", file, "--case", "*p4-n2-*", "--out", str(tmp_path / "out")]) == 2


def test_long_lists_that_contradict_each_other_take_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A product of 20,000 x 20,000 was looked through."""
    tenants, resident = many(20_000), str(list(range(30_000, 50_000)))
    assert main(["validate", written(tmp_path, tenants=tenants, resident=resident)]) == 2
    assert "cases" in capsys.readouterr().err
    assert main(["validate", written(tmp_path, tenants="[1, 3, 2]", resident="[9, 2]")]) == 2
    assert "resident 2 with tenants 3" in capsys.readouterr().err
