"""Search files: the shipped ones are loaded, wrong ones are refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from perfbench.errors import FinetuneError
from perfbench.finetune.search.search_config import load

ROOT = Path(__file__).resolve().parents[4]
SHIPPED = sorted((ROOT / "scenarios" / "fanlora").glob("*.yaml"))
GOOD = "backbone: small-llama\ntask: {name: skills}\n"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_has_its_question_and_its_command(path):
    config = load(path)
    head = path.read_text(encoding="utf-8").splitlines()[:3]
    assert head[0] == f"# {config.training.question}"
    assert head[2].startswith(f"#   perfbench fanlora search scenarios/fanlora/{path.name}")
    assert config.training.method == "lora"
    assert config.training.options["rank"] == 12
    assert config.training.epochs == 1
    assert config.k_max == 2
    assert config.scores[0] == "ab"


def test_the_papers_recipe():
    config = load(ROOT / "scenarios" / "fanlora" / "ultrachat_7b.yaml")
    assert (config.training.learning_rate, config.training.warmup_share) == (1e-4, 0.06)
    assert (config.training.batch, config.training.max_tokens, len(config.training.seeds)) == (128, 1024, 3)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "search.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_not_said_is_the_papers(tmp_path):
    config = load(written(tmp_path, GOOD))
    assert (config.k_max, config.scores, config.training.seeds, config.training.epochs) == (2, ("ab",), (0,), 1)
    assert config.training.options == {"rank": 12}
    assert config.training.task.test_examples == 0
    assert config.training.name == "search"


def test_settings_are_laid_over_the_file(tmp_path):
    config = load(written(tmp_path, GOOD), ["k_max=3", "task.dev_examples=5", "rank=4"])
    assert (config.k_max, config.training.task.dev_examples, config.training.options["rank"]) == (3, 5, 4)


def test_adapters_are_looked_for_beside_the_file_and_have_a_seed_each(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    config = load(written(tmp_path, GOOD + "adapters: [one, two]\n"))
    assert config.adapters == (str(tmp_path / "one"), str(tmp_path / "two"))
    assert config.training.seeds == (0, 1)
    assert load(written(tmp_path, GOOD + "adapters: one\n")).adapters == (str(tmp_path / "one"),)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("scores: [shaply]", "search.yaml:3: scores.0: unknown score 'shaply'; did you mean 'shapley'?"),
        ("scores: []", "search.yaml:3: scores: expected at least one value, got []"),
        ("scores: [ab, ab]", "search.yaml:3: scores: expected each value once"),
        ("k_max: 0", "search.yaml:3: k_max: expected an integer from 1 to 7, got 0"),
        ("k_max: 8", "search.yaml:3: k_max: expected an integer from 1 to 7, got 8"),
        ("kmax: 2", "search.yaml:3: kmax: unknown key 'kmax'; did you mean 'k_max'?"),
        ("rank: 0", "search.yaml:3: rank: expected an integer from 1 to 1024, got 0"),
        ("permutations: 1", "search.yaml:3: permutations: expected an integer >= 2, got 1"),
        ("method: para", "search.yaml:3: method: unknown key 'method'"),
        ("adapters: nowhere", "search.yaml:3: adapters: no such folder 'nowhere'; expected a PEFT LoRA checkpoint"),
        ("adapters: [a, b]\nseeds: [0]", "search.yaml:3: adapters: expected one adapter for each of 1 seeds, got 2"),
        ("epochs: 0", "search.yaml:3: epochs: expected an integer >= 1, got 0"),
        ("rows: 1.5", "search.yaml:3: rows: expected an integer >= 1, got 1.5"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_place(more, message, tmp_path):
    with pytest.raises(FinetuneError) as error:
        load(written(tmp_path, GOOD + more + "\n"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: {name: skills}\n", "backbone: is missing"),
        ("backbone: x\ntask: {name: skils}\n", "unknown task 'skils'; did you mean 'skills'?"),
        ("- a\n", "expected a mapping"),
        ("backbone: [\n", "malformed YAML"),
        ("backbone: x\ntask: skills\n", "task: expected a mapping"),
    ],
)
def test_a_file_that_is_no_search_is_refused(text, message, tmp_path):
    with pytest.raises(FinetuneError, match=r"search\.yaml") as error:
        load(written(tmp_path, text))
    assert message in str(error.value)


def test_set_on_a_file_that_is_no_mapping_names_the_file(tmp_path):
    with pytest.raises(FinetuneError, match=r"search\.yaml:1: expected a mapping of fields"):
        load(written(tmp_path, "- a\n"), ["k_max=1"])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FinetuneError, match=r"nowhere\.yaml: no such file"):
        load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("text", ["k_max", "=3", "k_max=", "k_max=9"])
def test_a_wrong_set_is_refused(text, tmp_path):
    with pytest.raises(FinetuneError, match="--set"):
        load(written(tmp_path, GOOD), [text])
