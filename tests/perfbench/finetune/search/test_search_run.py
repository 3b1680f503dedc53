"""`perfbench fanlora search` on tiny models: from adapters, from scratch, killed and resumed, and on bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from perfbench.cli import main
from perfbench.errors import PerfbenchError, TaskError
from perfbench.finetune.search import search_config, search_run
from perfbench.finetune.search.journal import Journal
from perfbench.methods.shape import MODULES
from perfbench.spec import cases, scenario
from tests.perfbench.finetune.search.conftest import one_thread, write_adapter, write_model

ROOT = Path(__file__).resolve().parents[4]
PICTURES = {f"{what}-{score}.svg" for what in ("scores", "kept", "share") for score in ("ab", "shapley", "sensitivity")}
LINES = """
question: Which?
backbone: {model}
dtype: fp32
device: cpu
task: {{name: own, source: {data}, dev_examples: 6}}
adapters: [{one}, {two}]
scores: [ab, shapley, sensitivity]
permutations: 2
rows: 3
max_tokens: 16
"""


@pytest.fixture(scope="module")
def file(tiny_llama: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search on two random adapters of the tiny Llama, two batches of three examples."""
    folder = tmp_path_factory.mktemp("search")
    one, two = (write_adapter(folder / f"adapter{seed}", tiny_llama, seed) for seed in (0, 1))
    path = folder / "tiny.yaml"
    path.write_text(LINES.format(model=tiny_llama, data=sums, one=one, two=two), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def done(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed search leaves."""
    out = tmp_path_factory.mktemp("done") / "out"
    with one_thread():  # a fixture of a module is made before those of its tests
        assert main(["fanlora", "search", str(file), "--out", str(out)]) == 0
    return out


def measured(out: Path) -> dict[str, object]:
    """All scores of a search."""
    manifest = json.loads((out / "search.json").read_text())
    return {seed: one["scores"] for seed, one in manifest["seeds"].items()} | {"spearman": manifest["spearman"]}


def test_everything_is_there(done):
    manifest = json.loads((done / "search.json").read_text())
    assert manifest["kind"] == "fanlora-search"
    assert manifest["held_out"]["examples"] == 6
    assert {path.name for path in done.glob("*.svg")} == PICTURES
    pairs = [(one["score"], one["seeds"]) for one in manifest["spearman"]["seeds"]]
    assert pairs == [("ab", [0, 1]), ("shapley", [0, 1]), ("sensitivity", [0, 1])]
    assert len(manifest["spearman"]["scores"]) == 3
    check = manifest["check"]
    assert check["apart"] < 1e-4
    assert check["speed_up"] == check["naive_s"] / check["shared_s"]
    assert 1 < check["bound"] < 3


def test_the_setting_keeps_the_best_of_the_mean_score(done):
    found = json.loads((done / "setting.json").read_text())
    values = json.loads((done / "search.json").read_text())["scores"]["ab"]["values"]
    assert found["scores"]["values"] == values
    for layer, kept in zip(values, found["layers"], strict=True):
        best = sorted(zip(layer, MODULES, strict=True), reverse=True)[:2]
        assert set(kept) == {module for value, module in best if value >= 0}
    assert found["provenance"]["k_max"] == 2
    assert {one["rank"] for one in found["provenance"]["adapters"].values()} == {3}
    assert {path.name for path in done.glob("setting*.json")} == {
        "setting.json", "setting-shapley.json", "setting-sensitivity.json"
    }  # fmt: skip


def test_the_setting_is_taken_by_a_scenario(done, tiny_llama, tmp_path, capsys):
    path = tmp_path / "served.yaml"
    path.write_text(
        f"backbone: {tiny_llama}\ndtype: fp32\ndevice: cpu\nmethods: [{{fanlora: {{setting: {done}/setting.json}}}}]\n"
        "workload: {prompt_tokens: 6, new_tokens: 3, requests: 2, tenants: 2}\nrepetitions: 1\nwarmup: 1\n"
    )
    assert main(["validate", str(path)]) == 0
    resolved = scenario.resolve(scenario.load(path), "cpu")
    wanted = tuple(map(tuple, json.loads((done / "setting.json").read_text())["layers"]))
    assert resolved.methods[1].options.setting == wanted
    assert len(cases.expand(resolved)[0].cases) == 2
    assert main(["run", str(path), "--out", str(tmp_path / "run")]) == 0
    assert "fanlora" in capsys.readouterr().out


KILLED = """
import os, signal, sys
import torch
from perfbench.finetune.search import journal
torch.set_num_threads(1)  # as the tests around it: sums are split alike
add, left = journal.Journal.add, {units}
def add_then_die(self, unit, line):
    global left
    add(self, unit, line)
    left -= 1
    if left == 0:
        with self.path.open("ab") as file:
            file.write(b'{{"unit": [7], "tok')  # as if it had been killed in the middle of the next line
        os.kill(os.getpid(), signal.SIGKILL)
journal.Journal.add = add_then_die
from perfbench.cli import main
sys.exit(main(["fanlora", "search", {file!r}, "--out", {out!r}]))
"""


def test_killed_and_resumed_it_gives_the_same_and_measures_nothing_twice(file, done, tmp_path, monkeypatch):
    out = tmp_path / "out"
    code = KILLED.format(units=5, file=str(file), out=str(out))
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120)
    assert killed.returncode == -9, killed.stderr.decode()
    assert not (out / "setting.json").exists()
    added = []
    add = Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, unit, line: (added.append(unit), add(self, unit, line)))
    assert main(["fanlora", "search", str(file), "--out", str(out), "--resume"]) == 0
    # Of each seed: ab on two batches and one beside the naive way, two permutations and the gradients on two batches.
    assert len(added) == 2 * (3 + 4 + 2) - 5
    assert measured(out) == measured(done)
    assert (
        json.loads((out / "setting.json").read_text())["layers"]
        == (json.loads((done / "setting.json").read_text())["layers"])
    )


def test_interrupted_it_says_how_to_go_on(file, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", interrupt)
    out = tmp_path / "out"
    assert main(["fanlora", "search", str(file), "--set", "k_max=1", "--out", str(out)]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"interrupted; go on with: perfbench fanlora search {file} --set k_max=1 --out {out} --resume"


def test_what_was_measured_on_something_else_is_not_mixed_in(file, done, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    assert main(["fanlora", "search", str(file), "--set", "rows=2", "--out", str(out), "--resume"]) == 2
    assert "ab.jsonl: was measured with another rows; give a new --out" in capsys.readouterr().err


def test_a_corrupt_line_is_named(file, done, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    lines = (out / "seed0" / "ab.jsonl").read_bytes().split(b"\n")
    (out / "seed0" / "ab.jsonl").write_bytes(b"\n".join([lines[0], b"{}", *lines[2:]]))
    assert main(["fanlora", "search", str(file), "--out", str(out), "--resume"]) == 2
    assert "seed0/ab.jsonl:2: not a line of a search" in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_left_alone(file, tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    assert main(["fanlora", "search", str(file), "--out", str(tmp_path)]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err
    assert main(["fanlora", "search", str(file), "--out", str(tmp_path), "--resume"]) == 2
    assert "no search to go on with" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_step_one_trains_the_adapters(file, tmp_path):
    """Two seeds of LoRA on made-up sums; then the same again from the folders that it left."""
    text = "\n".join(line for line in file.read_text().splitlines() if not line.startswith(("adapters", "scores")))
    path = tmp_path / "train.yaml"
    path.write_text(f"{text}\nseeds: [3, 4]\nrank: 2\nbatch: 8\nlearning_rate: 1.0e-2\nepochs: 2\n")
    out = tmp_path / "out"
    found = search_run.search(search_config.load(path), out)
    assert [one["rank"] for one in found.manifest["seeds"].values()] == [2, 2]
    adapters = [out / "training" / f"seed{seed}" / "adapter" for seed in (3, 4)]
    places = [one["adapter"] for one in found.manifest["seeds"].values()]
    assert [out / place for place in places] == adapters
    assert not Path(places[0]).is_absolute()
    again = path.with_name("again.yaml")
    again.write_text(path.read_text() + f"adapters: [{adapters[0]}, {adapters[1]}]\n")
    assert search_run.search(search_config.load(again), tmp_path / "again").scores == found.scores


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["max_tokens=4"], "expected at most max_tokens 4"),
        (["max_tokens=4096"], "max_tokens: expected at most 2048, the context of"),
        (["backbone=llama-tiny"], "llama-tiny: a named shape has random weights and no tokenizer"),
        (["backbone=/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(sets, message, file, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [part for text in sets for part in ("--set", text)]
    assert main(["fanlora", "search", str(file), *arguments, "--out", str(out)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("perfbench: ")
    assert message in said
    assert not out.exists()


def test_an_empty_held_out_set_is_refused(file, sums, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(sums, data)
    (data / "dev.jsonl").write_text("")
    with pytest.raises(TaskError, match="dev"):
        search_run.search(search_config.load(file, [f"task.source={data}"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_fit_are_refused(file, tiny_llama, tmp_path):
    other = write_adapter(tmp_path / "other", write_model(tmp_path / "model"))
    with pytest.raises(PerfbenchError, match="made for another backbone"):
        search_run.search(search_config.load(file, [f"adapters=[{other}]", "seeds=[0]"]), tmp_path / "one")
    assert not (tmp_path / "one").exists()
    idle = write_adapter(tmp_path / "idle", tiny_llama, scale=0.0)
    with pytest.raises(PerfbenchError, match="ab: every module has the same score 0") as error:
        search_run.search(search_config.load(file, [f"adapters=[{idle}]", "scores=[ab]"]), tmp_path / "two")
    assert str(tmp_path / "two" / "search.json") in str(error.value)
    assert not (tmp_path / "two" / "setting.json").exists()


def test_real_weights_and_a_real_set(stories260k, test_data, tmp_path):
    """The real 260K model and a few real instructions; the adapter is random, so that the setting means nothing."""
    data = test_data / "instruct_alpaca5k_NC" / "alpaca_data_5000.json"
    if not data.is_file():
        pytest.skip(f"needs a real instruction set: no {data.name} in {test_data}")
    adapter = write_adapter(tmp_path / "adapter", stories260k, scale=0.1)
    path = ROOT / "scenarios" / "fanlora" / "alpaca_cpu.yaml"
    sets = [f"backbone={stories260k}", f"task.source={data}", "task.dev_examples=1", f"adapters=[{adapter}]"]
    found = search_run.search(search_config.load(path, [*sets, "seeds=[0]", "scores=[ab]"]), tmp_path / "out")
    assert len(found.scores["ab"].values) == 5
    assert found.manifest["held_out"]["answer_tokens"] > 10
    assert found.manifest["check"]["apart"] < 1e-4
