"""The shipped recipes: each is loaded, and run with a tiny model and a handful of made-up examples in its place."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perfbench.finetune import recipe
from perfbench.finetune.finetune_config import load
from perfbench.finetune.small_backbone import SMALL_BACKBONES
from perfbench.finetune.tasks.registry import TASKS
from perfbench.finetune.trained import parameter_count
from perfbench.finetune.trained_table import trainable
from perfbench.spec.backbone_config import find_config
from tests.perfbench.finetune.made_up import WRITERS

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "scenarios" / "finetune").glob("*.yaml"))
LARGE = [path for path in RECIPES if load(path).backbone not in SMALL_BACKBONES]


def test_there_are_recipes_of_every_task_and_served_method_of_the_papers() -> None:
    loaded = [load(path) for path in LARGE]
    assert {config.task.name for config in loaded} == set(WRITERS) <= set(TASKS)
    assert {config.method for config in loaded} == {"lora", "fanlora", "ia3", "para"} <= set(trainable())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_head_has_its_question_and_its_command(path: Path) -> None:
    head = path.read_text().splitlines()[:2]
    assert head[0] == f"# {load(path).question}"
    assert head[1] == f"#   perfbench finetune scenarios/finetune/{path.name}"


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_it_is_the_papers_recipe(path: Path) -> None:
    config = load(path)
    assert (config.learning_rate, config.warmup_share, config.evaluate_every, config.patience) == (1e-4, 0.06, 200, 10)
    small = config.task.name in ("boolq", "copa", "gsm8k")
    assert config.batch == (16 if small else 128)
    assert config.max_tokens == (1024 if "fanlora" in path.stem else 2048)
    assert config.epochs == (1 if config.task.name == "instructions" else 10)
    assert config.beams == 3
    assert len(config.seeds) == (1 if path.stem == "ultrachat_fanlora" else 5)
    assert re.fullmatch(r"[\w-]+/[\w.-]+", config.backbone)


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_it_runs_with_a_tiny_model_in_its_place(
    path: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    shipped = load(path)
    task = TASKS[shipped.task.name]
    monkeypatch.setitem(TASKS, task.name, replace(task, new_tokens=min(task.new_tokens, 4)))
    data = tmp_path / "data"
    data.mkdir()
    WRITERS[shipped.task.name](data)
    tested = 0 if shipped.task.test_examples == 0 else 1
    config = replace(
        shipped,
        backbone=str(tiny_llama),
        dtype="fp32",
        device="cpu",
        task=replace(shipped.task, source=str(data), test_examples=tested),
        seeds=shipped.seeds[:1],
        epochs=1,
    )
    (result,) = recipe.finetune(config, tmp_path / "run")
    assert result.best_step == result.steps == 1
    assert result.test_items == (tested or None)
    assert (result.adapter / "adapter_model.safetensors").is_file()
    count = parameter_count(config.method, find_config(str(tiny_llama)), config.options)
    assert result.trainable_parameters == count > 0
