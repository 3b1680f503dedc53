"""Damaged files of every kind that perfbench reads: each is used or refused in one line; never a traceback, never a
fault of perfbench's own, never a character that a terminal obeys."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from perfbench import exit_codes
from perfbench.errors import PerfbenchError
from tests import damage
from tests.outcomes import Family, problem

if sys.platform == "win32":
    pytest.skip("a timer that ends what works for too long is POSIX's", allow_module_level=True)

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[1]
RUNS = ("cpu-256x8/q8-none-1", "cpu-110m/q8-run-1", "h200/verify-7b-q1", "cpu-chat-turns", "cpu-tenant-sweep/q64-lora")
TRAINING = "skills-search/finetune-default"


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    """A family whose commands write into `tmp_path`, tracebacks too."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    return Family()


@pytest.mark.parametrize(
    ("code", "out", "error", "says"),
    [
        (2, "", "perfbench: x\n", ""),
        (2, "", "a note\nperfbench: x\n", ""),
        (2, "", "", "0 refusals"),
        (2, "", "perfbench: x\nperfbench: y\n", "2 refusals"),
        (4, "", "perfbench: KeyError: 'x'; this is a fault of perfbench itself, the traceback is in x\n", "a fault"),
        (1, "", "Traceback (most recent call last)\n", "a fault"),
        (4, "", "", "exit code 4"),
        ("no answer in 20 s", "", "", "exit code no answer"),
        (0, "lora \x1b[31m\n", "", "['0x1b']"),
        (0, "", "lora \u202e\n", "['0x202e']"),
        (0, "a,b\r\n", "", ""),
        (2, "", f"perfbench: {'x' * 5000}\n", "fills the screen"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_seen(code: int | str, out: str, error: str, says: str) -> None:
    found = problem(code, out, error, tells="validate")
    assert says in found
    assert bool(found) == bool(says)


def test_whatever_a_call_raises_is_an_outcome(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(error: BaseException) -> Callable[[], object]:
        def call() -> object:
            raise error

        return call

    def forever() -> None:
        while True:
            pass

    monkeypatch.setattr("tests.outcomes.LONGEST_S", 0.05)
    for call in (raises(PerfbenchError("x")), raises(KeyError("x")), forever, lambda: 0):
        family.expect(call, "planted")
    assert list(family.codes) == [2, 4, "no answer in 0.05 s", 0]
    assert [line.split(": ")[1] for line in family.failures] == ["a fault", "exit code no answer in 0.05 s"]
    with pytest.raises(AssertionError, match="2 of 4"):
        family.assert_none()


def copied(name: str, to: Path) -> Path:
    """A folder of results, in the place of what was there before."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(ROOT / "results" / name, to))


def damage_one_of(files: list[Path], random: Random) -> None:
    """Damages one file of a folder, as its kind asks for."""
    file = random.choice(files)
    content = file.read_bytes()
    if file.suffix == ".gz":
        lines = gzip.decompress(content).splitlines()
        changed = damage.torn(content, random) if random.random() < 0.3 else gzip.compress(
            damage.damaged_lines(lines, random), 1)  # fmt: skip
    elif file.suffix == ".jsonl":
        changed = damage.damaged_lines(content.splitlines(), random)
    elif file.suffix == ".safetensors":
        changed = damage.damaged_safetensors(content, random)
    else:
        changed = damage.damaged(json.loads(content), damage.JSON, random)
    file.write_bytes(changed)


def damaged_yaml(pattern: str, seed: int, to: Path) -> Path:
    """A YAML file that comes with perfbench, damaged."""
    random = Random(seed)
    text = random.choice(sorted(ROOT.glob(pattern))).read_text(encoding="utf-8")
    torn = random.random() < 0.3
    to.write_bytes(
        damage.torn(text.encode(), random) if torn else damage.damaged(yaml.safe_load(text), damage.YAML, random)
    )
    return to


def test_scenarios(family: Family, tmp_path: Path) -> None:
    for seed in range(400):
        file = damaged_yaml("scenarios/*.yaml", seed, tmp_path / "x.yaml")
        family.command("validate", file, about=seed)
        # Without `device` torch would be loaded to ask which there is.
        family.command("run", file, "--dry-run", "--set", "device=cpu", about=seed)
    family.assert_none()


def test_run_folders(family: Family, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for seed in range(120):
        random = Random(seed)
        name = random.choice((*RUNS, TRAINING))
        whole, run = ROOT / "results" / name, copied(name, tmp_path / "run")
        damage_one_of([run / "run.json", run / "samples.jsonl"], random)
        sides = ("--baseline", whole, "--candidate", run)
        writes = [f"--write={format}={out}" for format in ("junit", "markdown", "annotations", "json")]
        lines: list[tuple[str | Path, ...]] = [
            *(("show", run, "--format", format) for format in ("table", "markdown", "csv", "json")),
            ("report", run, "--out", out), ("report", run, "--format", "csv", "--samples"),
            ("report", run, whole, "--format", "markdown"), ("compare", whole, run, "--other-machine"),
            ("compare", run, whole, "--exact-only", "--all"), ("gate", *sides, "--other-machine", *writes),
            ("gate", *sides, "--exact-only"), ("history", run, "--store", tmp_path / f"{seed}.sqlite"),
        ]  # fmt: skip
        for line in random.sample(lines, 4):
            family.command(*line, about=f"{seed} {name}")
    family.assert_none()


def test_accuracy_folders(family: Family, tmp_path: Path) -> None:
    for seed in range(40):
        run = copied("cpu-accuracy", tmp_path / "run")
        damage_one_of([run / "accuracy.json", run / "accuracy.json", run / "items.jsonl.gz"], Random(seed))
        lines = (("show", run), ("report", run, "--out", tmp_path / "page.html"))
        family.command(*lines[seed % 2], about=seed)
    family.assert_none()


def test_study_folders(family: Family, tmp_path: Path) -> None:
    for seed in range(80):
        run = copied("studies/k-max", tmp_path / "run")
        damage_one_of([run / "study.json"], Random(seed))
        family.command("show", run, *(("--format", "markdown") if seed % 2 else ()), about=seed)
    family.assert_none()


def verify_folder(folder: Path) -> Path:
    """What `perfbench verify` leaves, with two sections."""
    from perfbench.verify import verify_report

    environment = json.loads((ROOT / "results" / RUNS[0] / "run.json").read_bytes())["environment"]
    findings = [vars(verify_report.Finding(what, status, "x" * 20, {"rows": 3})) for what, status in
                (("low rank", verify_report.PASS), ("few rows", verify_report.SKIPPED))]  # fmt: skip
    section = {"status": verify_report.PASS, "seconds": 1.5, "findings": findings}
    found: dict[str, Any] = {
        "schema_version": verify_report.SCHEMA_VERSION, "started_at": "2026-01-01T00:00:00+00:00",
        "perfbench_version": "1", "device": {"kind": "cpu", "name": "the CPU"}, "full": False, "budget_s": 120.0,
        "environment": environment, "sections": {"kernels": section, "generate": section}, "left_out": ["q8"],
    }  # fmt: skip
    verify_report.write(found, folder)
    return folder


def test_verify_folders(family: Family, tmp_path: Path) -> None:
    from perfbench.verify import verification, verify_report

    folder = verify_folder(tmp_path / "verify")
    whole = (folder / verify_report.JSON).read_bytes()

    def resumed() -> int:
        found = verify_report.read(folder)
        for section in found["sections"].values():
            verification.is_done(section)
        verify_report.render(found)
        return verify_report.exit_code(found) if verify_report.markdown(found) else exit_codes.OK

    for seed in range(300):
        (folder / verify_report.JSON).write_bytes(damage.damaged(json.loads(whole), damage.JSON, Random(seed)))
        family.expect(resumed, seed)
    family.command("show", folder, about="show")
    family.command("report", folder, "--out", tmp_path / "page.html", about="report")
    family.assert_none()


def a_kind(**figures: float) -> dict[str, Any]:
    """One kind of a profile's breakdown."""
    names = ("device_ms", "host_ms", "operations", "launches", "gap_ms", "outside_ms", "low_ms", "high_ms")
    return dict.fromkeys(names, 1.5) | figures


def profile_folder(folder: Path) -> Path:
    """What `perfbench profile` leaves, with one trace packed and one not."""
    from perfbench.profiling import profile_table

    step = {kind: a_kind() for kind in ("q", "shrink", "total")}
    events = [
        {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": 5, "pid": 1, "tid": tid, "args": {"External id": ts}}
        for cat, name, ts, tid in (("user_annotation", "lora / prefill", 1, 1), ("cpu_op", "aten::mm", 2, 1),
                                   ("kernel", "gemm", 3, "stream 7"))
    ]  # fmt: skip
    arms = {
        label: {
            "check": {"status": "ok", "reason": None},
            "breakdown": dict.fromkeys(profile_table.PHASES, step),
            "replays": False, "decode_step_spread": 0.1, "unprofiled_decode_step_ms": 2.5, "peak_bytes": 2**20,
            "trace": f"{label}.trace.json", "memory_picture": f"{label}.svg",
        }
        for label in ("none-eager", "lora-eager")
    }  # fmt: skip
    profile = {"schema_version": profile_table.SCHEMA_VERSION, "case": "x/lora-eager", "decode_steps": 2, "arms": arms}
    folder.mkdir(exist_ok=True)
    (folder / profile_table.PROFILE).write_text(json.dumps(profile), encoding="utf-8")
    for label in arms:
        (folder / f"{label}.trace.json").write_text(json.dumps({"schemaVersion": 1, "traceEvents": events}))
        (folder / f"{label}.svg").write_text("<svg/>")
    return folder


def test_profile_folders(family: Family, tmp_path: Path) -> None:
    from perfbench.profiling import view

    for seed in range(300):
        random = Random(seed)
        folder = profile_folder(tmp_path / "profile")
        damage_one_of(sorted(folder.glob("*.json")), random)
        family.expect(lambda folder=folder: len(view.pages(folder)) and exit_codes.OK, seed)  # type: ignore[misc]
    family.assert_none()


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Path]:
    """Method -> a whole adapter folder."""
    from perfbench.methods import parameters
    from perfbench.methods.registry import METHODS
    from perfbench.spec.backbone_config import shape_of

    shape, folders = shape_of("llama-tiny"), {}
    for method in (name for name, known in METHODS.items() if known.served_by == "plan" and name != "none"):
        invoked = {"invocation": (5, 6)} if method == "alora" else {}
        options, folders[method] = METHODS[method].options(**invoked), tmp_path / "whole" / method
        values = parameters.make(method, shape, options, seed=1)
        parameters.implementation(method).save(values, shape, options, folders[method], "llama-tiny")
    return folders


def test_adapter_folders(family: Family, tmp_path: Path, adapters: dict[str, Path]) -> None:
    from perfbench.measure import inputs
    from perfbench.spec import cases, scenario

    given = tmp_path / "adapter"
    comparisons = {
        method: cases.expand(scenario.resolve(scenario.load({
            "backbone": "llama-tiny", "dtype": "fp32", "device": "cpu", "methods": [{method: {"adapters": str(given)}}],
            "workload": {"prompt_tokens": 4, "new_tokens": 2, "requests": 1, "tenants": 1},
        }), "cpu"))
        for method in (*adapters, "peft")
        if not given.mkdir(exist_ok=True)
    }  # fmt: skip
    for seed in range(400):
        random = Random(seed)
        method = random.choice(list(comparisons))
        shutil.rmtree(given)
        shutil.copytree(adapters["lora" if method == "peft" else method], given)
        damage_one_of(sorted(given.iterdir()), random)
        family.expect(lambda method=method: print(*inputs.check(comparisons[method])), f"{seed} {method}")  # type: ignore[misc]
    family.assert_none()


def test_training_files(family: Family, tmp_path: Path) -> None:
    from perfbench.finetune import finetune_config
    from perfbench.finetune.accuracy import accuracy_config, accuracy_folder
    from perfbench.finetune.search import search_config
    from perfbench.finetune.study import study_config
    from perfbench.gate import policy

    loaders: dict[str, Callable[[Path], object]] = {
        "scenarios/finetune/*.yaml": lambda file: finetune_config.load(file).to_json(),
        "scenarios/accuracy/*.yaml": lambda file: accuracy_folder.resolved(accuracy_config.load(file)),
        "scenarios/fanlora/*.yaml": lambda file: search_config.load(file).to_json(),
        "scenarios/studies/*.yaml": study_config.load,
        ".github/*policy.yaml": policy.load,
    }
    for seed in range(400):
        for pattern, load in loaders.items():
            file = damaged_yaml(pattern, seed, tmp_path / "x.yaml")
            family.expect(lambda load=load, file=file: load(file), f"{seed} {pattern}")  # type: ignore[misc]
    family.assert_none()


TRAFFIC: dict[str, Any] = {
    "question": "How many?", "backbone": "llama-tiny", "dtype": "fp32", "device": "cpu", "methods": ["lora"],
    "traffic": {"prompt_tokens": {"median": 8, "sigma": 0.5, "most": 16}, "new_tokens": 4, "tenants": [3], "rate": 200,
                "requests": 20},
    "server": {"rows": 4, "resident": 3, "chunk_tokens": 5}, "targets": {"ttft_ms": 60000, "itl_ms": 60000},
    "repetitions": 1,
}  # fmt: skip


def test_scenarios_of_traffic(family: Family, tmp_path: Path) -> None:
    from perfbench.spec import traffic

    def loads(file: Path) -> object:
        return traffic.load(file, [], lambda wanted: ("cuda" if wanted == "cuda" else "cpu", "asked for")).to_json()

    for seed in range(400):
        file = damaged_yaml("scenarios/traffic.yaml", seed, tmp_path / "x.yaml")
        family.command("validate", file, about=seed)
        family.expect(lambda file=file: json.dumps(loads(file)) and exit_codes.OK, seed)  # type: ignore[misc]
    family.assert_none()


def test_traffic_folders(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from perfbench.traffic.traffic_run import Session

    scenario, whole = tmp_path / "tiny.yaml", tmp_path / "whole"
    scenario.write_text(yaml.safe_dump(TRAFFIC))
    family.command("traffic", scenario, "--out", whole, about="whole")

    def measures(*_: object) -> object:
        raise PerfbenchError("this would be measured")

    monkeypatch.setattr(Session, "_job", measures)
    for seed in range(200):
        random, run = Random(seed), tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        damage_one_of([run / "traffic.json", run / "traffic.json", run / "measurements.jsonl"], random)
        lines: list[tuple[str | Path, ...]] = [
            *(("show", run, "--format", format) for format in ("table", "markdown", "csv", "json")),
            ("report", run, "--out", tmp_path / "page.html"), ("report", run, "--format", "markdown"),
        ]  # fmt: skip
        family.command(*random.choice(lines), about=seed)
        family.command("traffic", scenario, "--out", run, "--resume", about=seed)
    family.assert_none()
