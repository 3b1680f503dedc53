"""The accuracy file: what it makes, and every refusal in one line with its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perfbench.errors import PerfbenchError
from perfbench.finetune.accuracy.accuracy_config import Serving, load

ROOT = Path(__file__).resolve().parents[4]
SHIPPED = sorted((ROOT / "scenarios" / "accuracy").glob("*.yaml"))


def test_each_method_meets_each_task_with_one_recipe(
    write_config: Callable[..., Path], tmp_path: Path, sums: Path
) -> None:
    tasks = [{"name": "own", "source": str(sums), "label": name} for name in ("a", "b")]
    methods = ["lora", {"lora": {"label": "lora-12", "rank": 12, "train": {"learning_rate": 0.01}}}]
    config = load(write_config(tmp_path, tasks=tasks, methods=methods))
    assert [(entry.task, entry.method) for entry in config.entries] == [
        ("a", "lora"), ("a", "lora-12"), ("b", "lora"), ("b", "lora-12"),
    ]  # fmt: skip
    assert (config.methods, config.tasks) == (("lora", "lora-12"), ("a", "b"))
    plain, other = (entry.config for entry in config.entries[:2])
    assert (plain.method, plain.options, plain.learning_rate) == ("lora", {}, 0.1)
    assert (other.method, other.options, other.learning_rate) == ("lora", {"rank": 12}, 0.01)
    assert (plain.seeds, plain.epochs, plain.batch) == ((0, 1), 1, 8)
    assert config.serving == Serving(requests=5)
    assert (config.reference, config.margin) == ("lora", 0.5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"methods": ["lora", "parra"]}, r"tiny\.yaml:\d+: .*unknown method 'parra'; did you mean 'para'"),
    "task": ({"tasks": [{"name": "bolq"}]}, r"tiny\.yaml:\d+: .*unknown task 'bolq'; did you mean 'boolq'"),
    "runtime": ({"serve": {"runtimes": ["statik"]}}, r"tiny\.yaml:\d+: serve\.runtimes\.0: unknown runtime 'statik'"),
    "key": ({"marjin": 1}, r"tiny\.yaml:\d+: marjin: unknown key 'marjin'; did you mean 'margin'"),
    "recipe": ({"epochs": 0}, r"tiny\.yaml:\d+: epochs: expected an integer >= 1, got 0"),
    "margin": ({"margin": None}, r"margin: is missing"),
    "reference": (
        {"reference": "lorra"},
        r"tiny\.yaml:\d+: reference: expected one of the methods.*did you mean 'lora'",
    ),
    "twice": ({"methods": ["lora", "lora"]}, r"tiny\.yaml:\d+: methods\.1: the label 'lora' is that of methods\.0"),
    "label": ({"methods": ["lora", {"para": {"label": "../x"}}]}, r"tiny\.yaml:\d+: methods\.1: expected a short name"),
    "option": ({"methods": ["lora", {"para": {"rnk": 3}}]}, r"tiny\.yaml:\d+: .*rnk.*did you mean 'rank'"),
    "train": (
        {"methods": ["lora", {"para": {"train": {"batch": 0}}}]},
        r"tiny\.yaml:\d+: batch: expected an integer >= 1",
    ),
    "train all": (
        {"methods": ["lora", {"para": {"train": {"dtype": "bf16"}}}]},
        r"tiny\.yaml:\d+: methods\.1\.para\.train\.dtype: unknown key 'dtype'; known: .*learning_rate",
    ),
    "train none": ({"methods": ["lora", {"para": {"train": 3}}]}, r"train: expected a mapping, got 3"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_bad_input_is_refused(fault: str, write_config: Callable[..., Path], tmp_path: Path) -> None:
    changed, said = REFUSED[fault]
    with pytest.raises(PerfbenchError, match=said) as caught:
        load(write_config(tmp_path, **changed))
    assert "\n" not in str(caught.value)


def test_set_changes_a_field_and_is_named_when_it_can_not(write_config: Callable[..., Path], tmp_path: Path) -> None:
    path = write_config(tmp_path)
    assert load(path, ["seeds=[3]", "serve.requests=9"]).serving.requests == 9
    with pytest.raises(PerfbenchError, match=r"--set margin=2: expected a number from 0 to 1, got 2|--set margin=2"):
        load(path, ["margin=2"])
    with pytest.raises(PerfbenchError, match="expected key=value"):
        load(path, ["margin"])


@pytest.mark.parametrize("text", ["", "- a list", "a: [", "margin: 0.1\nmargin: 0.2"])
def test_what_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(PerfbenchError, match=r"bad\.yaml"):
        load(tmp_path / "bad.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_load_and_say_what_they_answer(path: Path) -> None:
    config = load(path)
    head = path.read_text().splitlines()
    assert head[0] == f"# {config.question}"
    assert head[1] == f"#   perfbench accuracy scenarios/accuracy/{path.name}"
    assert config.reference == "lora"
    wanted = {"dora", "road", "miss", "vera"} if path.stem == "smollm2_rivals" else {"ia3", "para", "fanlora"}
    assert {"lora", *wanted} <= set(config.methods)


def test_these_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} == {
        "cpu",
        "gemma_2b",
        "llama2_7b",
        "llama2_7b_baselines",
        "llama2_7b_large",
        "smollm2",
        "smollm2_boolq",
        "smollm2_rivals",
    }
