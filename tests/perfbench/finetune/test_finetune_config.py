"""A fine-tuning file: what it says is what is trained, and what it can't mean is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perfbench.errors import FinetuneError
from perfbench.finetune.finetune_config import load
from perfbench.finetune.trained import find
from perfbench.finetune.trained_table import BASELINES
from perfbench.spec.option_schema import schema_of

FILE = """\
question: Does it learn?
backbone: some/folder
method: {lora: {rank: 2}}
task: {name: own, source: data}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE)
    return path


def test_what_is_not_said_is_the_papers_recipe(file: Path) -> None:
    config = load(file)
    assert (config.learning_rate, config.warmup_share, config.epochs, config.batch) == (1e-4, 0.06, 10, 16)
    assert (config.evaluate_every, config.patience, config.seeds) == (200, 10, (0, 1, 2, 3, 4))
    assert (config.name, config.method, config.options) == ("mine", "lora", {"rank": 2})


def test_settings_change_fields(file: Path) -> None:
    config = load(file, ["seeds=[7]", "task.train_examples=3", "method=para", "learning_rate=1"])
    assert (config.seeds, config.task.train_examples, config.method, config.options) == ((7,), 3, "para", {})
    assert isinstance(config.learning_rate, float)
    assert json.loads(json.dumps(config.to_json())) == config.to_json()


def test_a_learning_rate_may_be_written_as_everybody_does(file: Path) -> None:
    assert load(file, ["learning_rate=3e-4"]).learning_rate == 3e-4
    assert load(file, ["learning_rate=1.0e-4"]).learning_rate == 1e-4


def test_a_source_beside_the_file_is_found(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert load(file).task.source == "data"  # a hub id, perhaps
    (tmp_path / "data").mkdir()
    assert load(file).task.source == str(tmp_path / "data")


def test_a_setting_of_fanlora_is_read_from_its_file(file: Path, tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text(json.dumps({"layers": [["v", "o"], []], "scores": {}}))
    config = load(file, ["method={fanlora: {setting: found.json}}"])
    assert config.options == {"setting": (("v", "o"), ())}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("metod=lora", "unknown key 'metod'; did you mean 'method'?"),
        ("method=loar", "unknown method 'loar'; did you mean 'lora'?"),
        ("method={lora: {rnk: 2}}", "unknown option 'rnk'; did you mean 'rank'?"),
        ("method.lora.rank=two", "expected an integer from 1 to 1024, got 'two'"),
        ("method={houlsby: {botleneck: 2}}", ": method.houlsby.botleneck: unknown option 'botleneck'; did you mean"),
        ("method={houlsby: {bottleneck: many}}", "expected an integer from 1 to 65536, got 'many'"),
        ("method={ssp: {budget: 0}}", "expected an integer or null >= 1, got 0"),
        ("method={adalora: {rank: 8}}", ": method.adalora: rank: expected less than initial_rank 8, got 8"),
        ("method={lora: {}, para: {}}", "expected exactly one method"),
        ("method={fanlora: {setting: none.json}}", "none.json: expected a JSON file"),
        ("task.name=bolq", "unknown task 'bolq'; did you mean 'boolq'?"),
        ("task.metric=exct_match", "unknown metric 'exct_match'; did you mean 'exact_match'?"),
        ("task.sorce=x", "unknown key 'sorce'; did you mean 'source'?"),
        ("dtype=fp16", "unknown dtype 'fp16'"),
        ("seeds=[]", "expected at least one value"),
        ("seeds=[1, 1]", "expected each value once"),
        ("epochs=0", "expected an integer >= 1, got 0"),
        ("learning_rate=0", "expected a number > 0"),
        ("warmup_share=1", "expected a number from 0 to 0.99, got 1"),  # Trainer would take it as one step
        ("accumulate=3", "expected batch to be a multiple of accumulate, got 16 / 3"),
        ("too_long=drop", "unknown too_long 'drop'"),
        ("epochs", "expected key=value"),
    ],
)
def test_what_it_cannot_mean_is_refused_in_one_line(file: Path, setting: str, message: str) -> None:
    with pytest.raises(FinetuneError) as refused:
        load(file, [setting])
    text = str(refused.value)
    assert message in text
    assert text.startswith("--set "), "the message says where it was written"
    assert "\n" not in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("epochs: none\n", "mine.yaml:5: epochs: expected an integer >= 1"),
        ("task: again\n", "mine.yaml:5: malformed YAML: duplicate key 'task'"),
        ("learning_rate: .nan\n", "mine.yaml:5: malformed YAML: expected a finite number"),
    ],
)
def test_a_fault_of_the_file_has_its_line(file: Path, line: str, message: str) -> None:
    file.write_text(FILE + line)
    with pytest.raises(FinetuneError) as refused:
        load(file)
    assert message in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match="no such file"):
        load(tmp_path / "none.yaml")


def test_a_broken_setting_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps({"layers": [["v", "oo"]]}))
    with pytest.raises(FinetuneError, match=r"bad.json: layers.*unknown module 'oo'"):
        load(file, ["method={fanlora: {setting: bad.json}}"])


def test_every_option_of_a_baseline_has_bounds() -> None:
    for name in BASELINES:
        for option, rules in schema_of(find(name).options).items():
            assert "minimum" in rules, f"{name}.{option}"
