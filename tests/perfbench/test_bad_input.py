"""What is wrong with the input is said in one line, with exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from perfbench.cli import main
from perfbench.methods.checkpoints.adapter_folder import WEIGHTS
from perfbench.methods.registry import METHODS
from perfbench.spec.backbone_config import shape_of

SCENARIO = """\
backbone: llama-tiny
dtype: fp32
device: cpu
methods: [lora]
workload: {prompt_tokens: 6, new_tokens: 3, requests: 3, tenants: 2}
warmup: 1
repetitions: 2
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SCENARIO)
    return path


class Refusal:
    """Runs a command that must be refused, and gives its one line."""

    def __init__(self, capsys: pytest.CaptureFixture[str], out: Path):
        self.capsys = capsys
        self.out = out

    def __call__(self, *arguments: str | Path) -> str:
        code = main(["run", *map(str, arguments), "--out", str(self.out)])
        lines = self.capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("perfbench: ")]
        assert code == 2
        assert len(errors) == 1, lines
        assert lines[-1] == errors[0], "the error is the last word, and one line"
        assert not any("Traceback" in line for line in lines)
        assert not self.out.exists(), "a run that never was leaves no directory"
        return errors[0]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refusal:
    return Refusal(capsys, tmp_path / "out")


def test_the_scenario_is_good_as_it_stands(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(scenario), "--dry-run"]) == 0


def test_malformed_yaml(refused: Refusal, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("backbone: llama-tiny\nmethods: [lora\n")
    assert "bad.yaml:" in refused(path)


def test_an_empty_file(refused: Refusal, tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert "empty.yaml" in refused(path)


def test_a_file_that_is_no_text(refused: Refusal, tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert "binary.yaml" in refused(path)


def test_a_folder_or_nothing_for_a_scenario(refused: Refusal, tmp_path: Path) -> None:
    assert str(tmp_path) in refused(tmp_path)
    assert "absent.yaml" in refused(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("methods=[lorra]", "lora"),
        ("backbone=llama-tinny", "llama-tiny"),
        ("workload.beams=0", "beams"),
        ("workload.beams=three", "beams"),
        ("workload.beams=1000000", "vocabulary"),
        ("workload.prompt_tokens=1000000", "context"),
        ("workload.new_tokens=1", "new_tokens"),
        ("workload.resident=1", "capacity"),
        ("workload.tenant=2", "tenants"),
        ("repetitions=0", "repetitions"),
        ("dtype=fp16", "fp16"),
        ("workload.prompts=absent.jsonl", "absent.jsonl"),
        ("methods=[{lora: {adapters: absent}}]", "absent"),
        ("nonsense", "key=value"),
    ],
)
def test_a_value_that_can_not_be(refused: Refusal, scenario: Path, change: str, words: str) -> None:
    assert words in refused(scenario, "--set", change)


def test_a_glob_that_matches_nothing(refused: Refusal, scenario: Path) -> None:
    assert "no case matches" in refused(scenario, "--case", "*/para*")


def test_resume_needs_a_directory(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(scenario), "--resume"]) == 2
    assert "--out" in capsys.readouterr().err


def test_resume_of_nothing(refused: Refusal, scenario: Path) -> None:
    assert "no such folder" in refused(scenario, "--resume")


def test_cuda_where_there_is_none(refused: Refusal, scenario: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert "perfbench doctor" in refused(scenario, "--set", "device=cuda")


def test_a_hub_id_without_a_network(refused: Refusal, scenario: Path) -> None:
    said = refused(scenario, "--set", "backbone=perfbench-tests/no-such-model")
    assert "perfbench-tests/no-such-model" in said
    assert "HF_HUB_OFFLINE" in said


def test_a_backbone_folder_without_a_config(refused: Refusal, scenario: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert "config.json" in refused(scenario, "--set", f"backbone={tmp_path / 'model'}")


def test_a_backbone_folder_without_weights_or_with_a_pickle(refused: Refusal, scenario: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(llama_config())))
    assert "no weights" in refused(scenario, "--set", f"backbone={folder}")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "pickle" in refused(scenario, "--set", f"backbone={folder}")


def test_backbone_weights_cut_short(refused: Refusal, scenario: Path, tmp_path: Path) -> None:
    # Only the worker reads the weights: what it says must come out the same way.
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(llama_config())))
    (folder / "model.safetensors").write_bytes(b'\x40\x00\x00\x00\x00\x00\x00\x00{"cut"')
    assert str(folder) in refused(scenario, "--set", f"backbone={folder}")


def llama_config() -> dict[str, Any]:
    from perfbench.spec.backbone_config import find_config

    return find_config("llama-tiny")


def adapters(folder: Path, backbone: str = "llama-tiny", count: int = 2, method: str = "lora") -> Path:
    """A folder with `count` valid adapters for `backbone`."""
    from perfbench.methods import parameters

    shape, options = shape_of(backbone), METHODS[method].options()
    for tenant in range(count):
        values = parameters.make(method, shape, options, seed=tenant)
        parameters.implementation(method).save(values, shape, options, folder / f"tenant{tenant}", backbone)
    return folder


def with_adapters(folder: Path) -> list[str]:
    return ["--set", f"methods=[{{lora: {{adapters: {folder}}}}}]"]


def test_adapters_for_another_backbone(refused: Refusal, scenario: Path, tmp_path: Path) -> None:
    folder = adapters(tmp_path / "adapters", backbone="llama-256x8")
    assert "another backbone" in refused(scenario, *with_adapters(folder))


def test_adapters_of_another_method(refused: Refusal, scenario: Path, tmp_path: Path) -> None:
    folder = adapters(tmp_path / "adapters", method="ia3-original")
    assert "peft_type" in refused(scenario, *with_adapters(folder))


def test_too_few_adapters(refused: Refusal, scenario: Path, tmp_path: Path) -> None:
    folder = adapters(tmp_path / "adapters", count=1)
    assert "found 1" in refused(scenario, *with_adapters(folder))


def test_an_adapter_cut_short(refused: Refusal, scenario: Path, tmp_path: Path) -> None:
    folder = adapters(tmp_path / "adapters")
    weights = folder / "tenant1" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(weights) in refused(scenario, *with_adapters(folder))


def test_an_adapter_with_a_nan(refused: Refusal, scenario: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = adapters(tmp_path / "adapters")
    weights = folder / "tenant1" / WEIGHTS
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, weights)
    said = refused(scenario, *with_adapters(folder))
    assert name in said
    assert "NaN" in said


def test_an_adapter_that_is_a_pickle(refused: Refusal, scenario: Path, tmp_path: Path) -> None:
    folder = adapters(tmp_path / "adapters")
    (folder / "tenant1" / WEIGHTS).rename(folder / "tenant1" / "adapter_model.bin")
    assert "pickle" in refused(scenario, *with_adapters(folder))


def test_too_few_prompts(refused: Refusal, scenario: Path, tmp_path: Path, stories260k: Path) -> None:
    prompts = tmp_path / "two.txt"
    prompts.write_text("Once upon a time\nThere was a dog\n")
    said = refused(scenario, "--set", f"backbone={stories260k}", "--set", f"workload.prompts={prompts}")
    assert "3 requests" in said
    assert "found 2" in said


def test_prompts_for_a_shape_without_a_tokenizer(refused: Refusal, scenario: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "three.txt"
    prompts.write_text("a\nb\nc\n")
    assert "tokenizer" in refused(scenario, "--set", f"workload.prompts={prompts}")


def test_an_output_folder_under_a_file(scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["run", str(scenario), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "can't be written" in capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk(scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A run directory in which nothing is measured yet, and whose samples go to a device that is always full.
    from perfbench.measure.run import manifest_of
    from perfbench.run_folder.run_directory import MANIFEST, SAMPLES, RunDirectory
    from perfbench.spec import cases
    from perfbench.spec.scenario import load, resolve

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    resolved = resolve(load(scenario), "cpu")
    out = tmp_path / "out"
    RunDirectory.create(out, manifest_of(resolved, cases.expand(resolved)))
    (out / SAMPLES).symlink_to("/dev/full")
    assert main(["run", str(scenario), "--out", str(out), "--resume"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"perfbench: {out / SAMPLES}: disk full")
    assert "--resume" in last
    # What was found before is kept: freeing space and resuming goes on from there.
    assert all(case["check"]["passed"] for case in json.loads((out / MANIFEST).read_text())["cases"].values())


def test_a_run_of_another_schema_version(scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"schema_version": 999, "perfbench_version": "9.9"}))
    for command in (["show", str(out)], ["run", str(scenario), "--out", str(out), "--resume"]):
        assert main(command) == 2
        assert "schema_version: expected 2, got 999" in capsys.readouterr().err
    shutil.rmtree(out)
