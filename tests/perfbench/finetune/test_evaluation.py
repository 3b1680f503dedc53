"""`perfbench evaluate`: the bare backbone, our adapters and PEFT's on one task, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from perfbench.cli import main
from perfbench.finetune import trained
from perfbench.finetune.predict import predict
from perfbench.finetune.tasks.registry import find, load_splits
from perfbench.methods.bank import Bank
from perfbench.runtimes import backbone


def write_mmlu(folder: Path, questions: int = 5) -> Path:
    """Two subjects in the original's format."""
    for subject in ("hens", "eggs"):
        for split in ("dev", "test"):
            (folder / split).mkdir(parents=True, exist_ok=True)
            rows = [f"{split} {subject} {n}?,one,two,three,four,{'ABCD'[n % 4]}" for n in range(questions)]
            (folder / split / f"{subject}_{split}.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An AdaLoRA and a BitFit of ours, and a LoRA that PEFT saved; each as after some training."""
    folder = tmp_path_factory.mktemp("adapters")
    for method in ("adalora", "bitfit"):
        module = trained.attach(backbone.load(str(tiny_llama), "fp32", "cpu", 0).model, method, None, seed=0)
        fill(module)
        trained.save(module, folder / method)
    module = peft.get_peft_model(
        backbone.load(str(tiny_llama), "fp32", "cpu", 0).model, peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    fill(module)
    module.save_pretrained(str(folder / "peft"))
    return {path.name: path for path in folder.iterdir()}


def fill(module: Any) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 1)


def test_any_adapter_on_mmlu(tiny_llama: Path, adapters: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    source = write_mmlu(tmp_path / "mmlu")
    options = [part for path in adapters.values() for part in ("--adapter", str(path))]
    out = tmp_path / "out"
    command = ["evaluate", str(tiny_llama), "--task", "mmlu", "--source", str(source), "--device", "cpu", *options]
    assert main([*command, "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("mmlu: accuracy ")
    assert said[0].endswith("% of 10 test items, the bare backbone")
    assert all("points to the bare backbone, for this very adapter" in line for line in said[1:])
    found = json.loads((out / "evaluation.json").read_text())
    assert [one["peft_type"] for one in found["results"]] == [
        None, *({"adalora": "ADALORA", "bitfit": "PERFBENCH", "peft": "LORA"}[name] for name in adapters)
    ]  # fmt: skip
    items = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    task = find("mmlu")
    examples = load_splits(task, str(source), ("test",))["test"]
    for result in found["results"]:
        own = [item for item in items if item["adapter"] == result["adapter"]]
        model = backbone.load(str(tiny_llama), "fp32", "cpu", 0).model
        if result["adapter"] != "none":
            model = trained.load(model, Path(result["adapter"]))
        expected = predict(model, backbone.tokenizer_of(str(tiny_llama)), task, examples)
        assert [item["prediction"] for item in own] == expected
        assert result["score"] == pytest.approx(sum(item["score"] for item in own) / 10)
    assert len({tuple(i["prediction"] for i in items if i["adapter"] == r["adapter"]) for r in found["results"]}) > 1
    assert main([*command, "--out", str(out)]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err


def test_one_dev_example(tiny_llama: Path, tmp_path: Path) -> None:
    source, out = write_mmlu(tmp_path / "mmlu"), tmp_path / "out"
    command = ["evaluate", str(tiny_llama), "--task", "mmlu", "--source", str(source), "--split", "dev"]
    assert main([*command, "--examples", "1", "--device", "cpu", "--out", str(out)]) == 0
    (item,) = (json.loads(line) for line in (out / "items.jsonl").read_text().splitlines())
    assert (item["split"], item["path"]) == ("dev", "as-trained-fp32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "mmul", "--source", "."], "unknown task 'mmul'; did you mean 'mmlu'?"),
        (["--task", "mmlu", "--source", "nowhere"], "nowhere"),
        (["--task", "mmlu", "--source", "SOURCE", "--adapter", "no-adapter"], "no-adapter: no such adapter folder"),
    ],
)
def test_what_can_not_be_used_is_said_in_one_line(
    tiny_llama: Path, options: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    source = write_mmlu(tmp_path / "mmlu")
    options = [str(source) if option == "SOURCE" else option for option in options]
    command = ["evaluate", str(tiny_llama), *options, "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("runtime", ["static", "transformers"])
def test_adapters_are_asked_as_served_too(
    runtime: str, tiny_llama: Path, adapters: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    source, out = write_mmlu(tmp_path / "mmlu"), tmp_path / "out"
    options = [part for name in ("adalora", "peft") for part in ("--adapter", str(adapters[name]))]
    command = ["evaluate", str(tiny_llama), "--task", "mmlu", "--source", str(source), "--device", "cpu", *options]
    assert main([*command, "--served", runtime, "--out", str(out)]) == 0
    assert "0 predictions are not as trained" in capsys.readouterr().out.splitlines()[-1]
    results = json.loads((out / "evaluation.json").read_text())["results"]
    paths = ["as-trained-fp32"] * 3 + [f"{runtime}-eager-fp32"] * 2
    assert [(one["path"], one["changed"]) for one in results] == [
        (path, None if path.startswith("as") else 0) for path in paths
    ]
    assert [one["score"] for one in results[3:]] == [one["score"] for one in results[1:3]]


def test_a_tenant_that_is_served_by_another_s_adapter_is_seen(
    tiny_llama: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """On predictions it might never show."""
    rows = Bank.rows
    monkeypatch.setattr(Bank, "rows", lambda self, slots: rows(self, [(s + 1) % self.capacity for s in slots]))
    source, out = write_mmlu(tmp_path / "mmlu"), tmp_path / "out"
    options = [part for name in ("adalora", "peft") for part in ("--adapter", str(adapters[name]))]
    command = ["evaluate", str(tiny_llama), "--task", "mmlu", "--source", str(source), "--device", "cpu", *options]
    assert main([*command, "--served", "static", "--out", str(out)]) == 1
    assert f"{adapters['adalora']} is served as {adapters['peft']}" in capsys.readouterr().out
    results = json.loads((out / "evaluation.json").read_text())["results"]
    assert [one["identity"]["status"] for one in results[3:]] == ["wrong", "wrong"]


def test_what_is_never_served_is_refused_before_it_is_asked(
    tiny_llama: Path, adapters: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    source, out = write_mmlu(tmp_path / "mmlu"), tmp_path / "out"
    command = ["evaluate", str(tiny_llama), "--task", "mmlu", "--source", str(source), "--device", "cpu"]
    command += ["--adapter", str(adapters["bitfit"]), "--served", "static", "--out", str(out)]
    assert main(command) == 2
    assert "is never served here; leave out --served" in capsys.readouterr().err
