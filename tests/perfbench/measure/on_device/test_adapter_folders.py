"""Which adapters a folder holds: PEFT's, a Trainer's, those of our own training, and lists of folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perfbench.errors import AdapterError
from perfbench.measure.on_device.adapter_folders import adapter_folders, all_folders


def adapters(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "adapter_config.json").write_text("{}")
    return root


def training(root: Path, method: str, seeds: int) -> Path:
    """As `perfbench finetune` leaves it."""
    adapters(root, *(f"seed{seed}/adapter" for seed in range(seeds)))
    (root / "run.json").write_text(json.dumps({"kind": "finetune", "config": {"method": method}}))
    return root


def found(root: Path, given: str | list[str], method: str = "lora") -> list[str]:
    return [path.relative_to(root).as_posix() for path in all_folders(given, method)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["."], ["."]),
        (["t10", "t2", "t1"], ["t1", "t2", "t10"]),
        ([".", "b", "a"], [".", "a", "b"]),  # PEFT: the adapter `default`, and others by name
        (["checkpoint-9", "checkpoint-100", "."], [".", "checkpoint-100", "checkpoint-9"]),
        (["a/b"], []),
    ],
)
def test_a_folder_of_peft_or_a_trainer(tmp_path: Path, names: list[str], expected: list[str]) -> None:
    assert found(tmp_path, str(adapters(tmp_path, *names))) == expected


def test_our_own_training(tmp_path: Path) -> None:
    assert found(tmp_path, str(training(tmp_path, "lora", 11)))[-2:] == ["seed9/adapter", "seed10/adapter"]


def test_an_accuracy_run_gives_each_arm_its_own(tmp_path: Path) -> None:
    training(tmp_path / "skills" / "mine", "para", 2)
    training(tmp_path / "skills" / "lora", "lora", 1)
    training(tmp_path / "boolq" / "lora", "lora", 1)
    training(tmp_path / "boolq" / "houlsby", "houlsby", 1)
    both = ["boolq/lora/seed0/adapter", "skills/lora/seed0/adapter"]
    assert found(tmp_path, str(tmp_path), "para") == ["skills/mine/seed0/adapter", "skills/mine/seed1/adapter"]
    assert found(tmp_path, str(tmp_path), "lora") == both
    assert found(tmp_path, str(tmp_path), "peft") == both  # the same LoRA
    with pytest.raises(AdapterError, match="a training of houlsby, lora, para, expected one of ia3"):
        all_folders(str(tmp_path), "ia3")


def test_a_list_of_folders(tmp_path: Path) -> None:
    adapters(tmp_path, "one", "several/y", "several/x")
    training(tmp_path / "trained", "lora", 1)
    given = [str(tmp_path / name) for name in ("several", "one", "trained", "one")]
    assert found(tmp_path, given) == ["several/x", "several/y", "one", "trained/seed0/adapter", "one"]


def test_too_few_says_what_was_looked_for(tmp_path: Path) -> None:
    adapters(tmp_path, "a")
    with pytest.raises(AdapterError) as refused:
        adapter_folders(str(tmp_path), "lora", 2)
    said = str(refused.value)
    assert said.startswith(f"{tmp_path}: 2 resident tenants need as many adapter folders, found 1 ({tmp_path}/a); ")
    assert "adapter_config.json" in said
    assert "seed*/adapter" in said
    assert "TASK/METHOD/seed*/adapter" in said
    assert adapter_folders(str(tmp_path), "lora", 1) == [tmp_path / "a"]
