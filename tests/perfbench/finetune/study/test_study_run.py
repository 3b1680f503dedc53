"""`perfbench study`: every step once, nothing twice, whatever changes and whenever it is stopped."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perfbench.cli import main
from perfbench.errors import FinetuneError, RunDirectoryError
from perfbench.finetune import recipe
from perfbench.finetune.study import study_config, study_folder, study_run
from perfbench.methods.shape import MODULES
from perfbench.spec import method_plugins
from tests.perfbench.finetune.made_up import write_own
from tests.perfbench.finetune.study.conftest import write_study


def again(file: Path, out: Path) -> dict[str, Any]:
    return study_run.execute(study_config.load(file), out)


def steps(folders: list[str]) -> Counter[str]:
    """Step -> in how many folders it was done."""
    return Counter(folder.rpartition("-")[0] for folder in folders)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_one_table_of_what_the_steps_measured(done: Path) -> None:
    manifest = study_folder.read(done)
    assert steps(list(manifest["steps"])) == {"search": 1, "kept": 2, "tuned": 2}
    assert [(row["label"], row["paper"]) for row in manifest["rows"]] == [
        ("k_max 1, rank 2", []),
        ("k_max 2, rank 1", [87.9]),
    ]
    for row in manifest["rows"]:
        seeds = json.loads((done / row["steps"]["tuned"] / "run.json").read_text())["seeds"].values()
        assert row["cells"]["tuned.test"] == [100 * seed["test_score"] for seed in seeds]
        assert row["cells"]["tuned.dev_loss"] == [seed["best_dev_loss"] for seed in seeds]
        assert len(set(row["cells"]["tuned.parameters"])) == 1
        assert -1 <= row["cells"]["kept.likeness"][0] <= 1
    assert [row["cells"]["kept.modules"] for row in manifest["rows"]] == [[2.0], [4.0]]


def test_a_setting_keeps_the_best_modules_of_the_score_that_it_names(done: Path) -> None:
    manifest = study_folder.read(done)
    values = json.loads((done / manifest["rows"][0]["steps"]["search"] / "search.json").read_text())["scores"]
    for k_max, row in zip((1, 2), manifest["rows"], strict=True):
        kept = json.loads((done / row["steps"]["kept"] / "setting.json").read_text())["layers"]
        for layer, names in zip(values["sensitivity"]["values"], kept, strict=True):
            best = sorted(zip(layer, MODULES, strict=True), reverse=True)[:k_max]
            assert set(names) == {module for _, module in best}
        trained = json.loads((done / row["steps"]["tuned"] / "run.json").read_text())["config"]
        assert trained["options"]["setting"] == kept


def test_given_again_it_does_nothing_and_says_the_same(study_file: Path, done: Path, ran: list[str]) -> None:
    before = study_folder.read(done)
    after = again(study_file, done)
    assert ran == []
    assert (after["rows"], after["steps"]) == (before["rows"], before["steps"])


Change = Callable[[Path, Path, dict[str, Path]], None]


def _in_file(old: str, new: str) -> Change:
    return lambda file, out, sources: replace(file, old, new)


def _first(out: Path, name: str, row: int = 0) -> Path:
    return out / study_folder.read(out)["rows"][row]["steps"][name]


# What is changed, and how often each step is done again.
CHANGES: dict[str, tuple[Change, dict[str, int]]] = {
    "a field of the last step": (_in_file("learning_rate: 0.01\n      method", "learning_rate: 0.02\n      method"),
                                 {"tuned": 2}),
    "a field of the first": (_in_file("0.01\n      rows", "0.1\n      rows"), {"search": 1, "kept": 2, "tuned": 2}),
    "one that leaves the settings as they are": (_in_file("rows: 4", "rows: 3"), {"search": 1, "kept": 2}),
    "the score": (_in_file("score: sensitivity", "score: ab"), {"kept": 2, "tuned": 2}),
    "one row's rank": (_in_file("k_max: 1, rank: 2", "k_max: 1, rank: 3"), {"tuned": 1}),
    "one row's K_max": (_in_file("k_max: 1, rank: 2", "k_max: 3, rank: 2"), {"kept": 1, "tuned": 1}),
    "one row more": (_in_file("for_each:\n", "for_each:\n  - {k_max: 4, rank: 1}\n"), {"kept": 1, "tuned": 1}),
    "the data of the last step": (
        lambda file, out, sources: replace(sources["data"] / "train.jsonl", '"answer": "5"', '"answer": "7"'),
        {"tuned": 2},
    ),
    "the backbone": (
        lambda file, out, sources: replace(sources["model"] / "config.json", '"vocab_size"', ' "vocab_size"'),
        {"search": 1, "kept": 2, "tuned": 2},
    ),
    "what an earlier step wrote": (
        lambda file, out, sources: replace(_first(out, "kept") / "setting.json", '"layers"', ' "layers"'),
        {"tuned": 1},
    ),
    "a missing stamp": (lambda file, out, sources: (_first(out, "tuned") / "step.json").unlink(), {"tuned": 1}),
    "a torn stamp": (
        lambda file, out, sources: os.truncate(_first(out, "tuned") / "step.json", 20), {"tuned": 1}
    ),
    "a lost step": (lambda file, out, sources: shutil.rmtree(_first(out, "tuned", 1)), {"tuned": 1}),
    "the words of the question": (_in_file("question: Which?", "question: Which one?"), {}),
    "how a value is written": (_in_file("learning_rate: 0.01\n      method", "learning_rate: 1e-2\n      method"), {}),
    "what a row is called": (_in_file("{k_max: 1", "{label: one, k_max: 1"), {}),
    "a default written out": (_in_file("epochs: 1", "epochs: 1\n      patience: 10"), {}),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_hangs_on_a_change_is_done_again(
    change: str, tiny_llama: Path, sets: tuple[Path, Path], done: Path, tmp_path: Path, ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The data and the backbone lie elsewhere for this: by names that are the same before and after."""
    sources = {"model": tmp_path / "model", "learnt": tmp_path / "learnt", "data": tmp_path / "data"}
    for (name, path), source in zip(sources.items(), (tiny_llama, *sets), strict=True):
        shutil.copytree(source, path)
        assert name == path.name
    monkeypatch.chdir(tmp_path)
    file = write_study(tmp_path / "tiny.yaml", *(Path(name) for name in sources))
    out = _whole_in(tmp_path, file, done)
    alter, expected = CHANGES[change]
    alter(file, out, sources)
    ran.clear()
    again(file, out)
    assert steps(ran) == expected
    ran.clear()
    again(file, out)
    assert ran == []


_WHOLE: list[Path] = []


def _whole_in(place: Path, file: Path, done: Path) -> Path:
    """A folder of this very study in which all is done: made once, then copied, as its keys hold names and bytes."""
    if not _WHOLE:
        _WHOLE.append(done.parent / "whole")
        again(file, _WHOLE[0])
    return Path(shutil.copytree(_WHOLE[0], place / "out"))


def test_the_folder_may_be_moved(study_file: Path, done: Path, tmp_path: Path, ran: list[str]) -> None:
    moved = Path(shutil.copytree(done, tmp_path / "elsewhere"))
    again(study_file, moved)
    assert ran == []


@pytest.mark.parametrize(("method", "redone"), [("fanlora", {"tuned": 2}), ("another", {})])
def test_the_code_of_a_plugin_counts_where_its_method_is_named(
    method: str, redone: dict[str, int], study_file: Path, done: Path, tmp_path: Path, ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = Path(shutil.copytree(done, tmp_path / "out"))
    plugin = {"source": "mine.py", "methods": [method], "sha256": "1"}
    monkeypatch.setattr(method_plugins, "as_json", lambda: [plugin])
    again(study_file, out)
    assert steps(ran) == redone
    ran.clear()
    again(study_file, out)
    assert ran == []
    plugin["sha256"] = "2"
    again(study_file, out)
    assert steps(ran) == redone


def test_stopped_in_the_middle_it_goes_on_to_the_same_table(
    study_file: Path, done: Path, tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "my out"
    whole = recipe._Seed._judge
    calls: list[int] = []

    def stopped(self: Any, entry: dict[str, Any]) -> None:
        calls.append(self.seed)
        if len(calls) == 4:  # the last seed of the last row
            raise KeyboardInterrupt
        whole(self, entry)

    monkeypatch.setattr(recipe._Seed, "_judge", stopped)
    words = ["study", str(study_file), "--set", "let.unused=1", "--out", str(out)]
    assert main(words) == 130
    said = capsys.readouterr().err.splitlines()[-1].removeprefix("interrupted; go on with: ")
    assert shlex.split(said) == ["perfbench", *words, "--resume"]
    assert steps(ran) == {"search": 1, "kept": 2, "tuned": 2}
    assert not (out / ran[-1] / "step.json").exists()
    assert study_folder.read(out)["finished_at"] is None
    last = ran[-1]
    ran.clear()
    assert main(shlex.split(said)[1:]) == 0
    assert ran == [last]
    assert [row["cells"] for row in study_folder.read(out)["rows"]] == [
        row["cells"] for row in study_folder.read(done)["rows"]
    ]


def test_what_an_earlier_step_has_lost_is_named(study_file: Path, done: Path, tmp_path: Path, ran: list[str]) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    (_first(out, "kept") / "setting.json").unlink()
    with pytest.raises(FinetuneError, match=r"setting.json.*if it was lost, delete .*kept-"):
        again(study_file, out)
    assert ran == []


def test_a_lock_keeps_another_process_out(study_file: Path, tmp_path: Path) -> None:
    hold = (
        "import sys, pathlib; from perfbench.files import run_lock\n"
        f"with run_lock.held(pathlib.Path({str(tmp_path / 'out')!r}), resume=False):\n    print('held', flush=True)\n"
        "    sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert main(["study", str(study_file), "--out", str(tmp_path / "out")]) == 2
        other.communicate()
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("search-*"))


def test_a_folder_of_something_else_is_refused(
    study_file: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(RunDirectoryError, match="has files in it"):
        again(study_file, tmp_path / "mine")
    with pytest.raises(RunDirectoryError, match="is a file"):
        again(study_file, tmp_path / "mine" / "letter.txt")
    other = tmp_path / "other.yaml"
    shutil.copy(study_file, other)
    with pytest.raises(RunDirectoryError, match="holds the study tiny, not other"):
        again(other, done)
    assert main(["study", str(study_file), "--resume", "--out", str(tmp_path / "new")]) == 2
    assert "no study to go on with" in capsys.readouterr().err
    assert main(["study", str(study_file), "--resume"]) == 2
    assert "--resume: say with --out which study" in capsys.readouterr().err


def test_a_dry_run_reads_everything_and_does_nothing(
    study_file: Path, ran: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study", str(study_file), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "k_max 1, rank 2: search (fanlora search), kept (setting), tuned (finetune)",
        "k_max 2, rank 1: search (fanlora search), kept (setting), tuned (finetune)",
    ]
    assert (ran, list(tmp_path.iterdir())) == ([], [])


def test_accuracy_and_evaluation_are_steps_too(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_own(tmp_path / "data", {"train": 16, "dev": 4, "test": 4})
    common = {"backbone": str(tiny_llama), "dtype": "fp32", "device": "cpu"}
    training = {"seeds": [0, 1], "epochs": 3, "max_tokens": 16}
    given = {
        "question": "Which?",
        "steps": {
            "judged": {
                "command": "accuracy",
                "from": {
                    **common,
                    **training,
                    "methods": ["lora"],
                    "tasks": [{"name": "own", "source": str(data)}],
                    "learning_rates": [0.05, 0.1],
                    "margin": 0.1,
                    "serve": {"runtimes": ["static"], "kernels": ["eager"], "dtypes": ["fp32"], "requests": 4},
                },
            },
            "asked": {
                "command": "evaluate",
                "from": {
                    **common,
                    "task": "own",
                    "source": str(data),
                    "adapters": ["$judged/own/lora/seed1/adapter"],
                    "served": "static",
                },
            },
        },
        "columns": ["judged.test", "judged.learning_rate", "asked.bare", "asked.as_trained", "asked.served"],
    }
    out = tmp_path / "out"
    (row,) = study_run.execute(study_config.load(given), out)["rows"]
    assert row["label"] == "all"
    judged = json.loads((out / row["steps"]["judged"] / "accuracy.json").read_text())
    (verdict,) = judged["verdict"]["methods"]
    assert row["cells"]["judged.test"] == [100 * score for score in verdict["test"]["seeds"]]
    assert row["cells"]["judged.learning_rate"] == [
        seed["learning_rate"] for seed in judged["adapters"]["own"]["lora"].values()
    ]
    asked = json.loads((out / row["steps"]["asked"] / "evaluation.json").read_text())
    shown = [row["cells"][f"asked.{name}"] for name in ("bare", "as_trained", "served")]
    assert shown == [[100 * result["score"]] for result in asked["results"]]
    assert study_folder.read(out)["differs"] == []
    _plant_a_difference(out, row)
    found = study_run.execute(study_config.load(given), out)
    assert found["differs"] == [
        "all: own, static-eager-fp32: the adapter of another tenant",
        "all: static-eager-fp32: 3 predictions are not as trained",
    ]
    assert study_folder.exit_code(found) == 1
    assert "NOT SHOWN TO BE SERVED AS TRAINED: all: own, static-eager-fp32" in (out / "study.md").read_text()


def _plant_a_difference(out: Path, row: dict[str, Any]) -> None:
    """In what both commands have found; their adapters, which the second step reads, stay."""
    judged = out / row["steps"]["judged"] / "accuracy.json"
    found = json.loads(judged.read_text())
    found["verdict"]["paths"][0].update(verdict="differs", reason="the adapter of another tenant")
    judged.write_text(json.dumps(found))
    asked = out / row["steps"]["asked"] / "evaluation.json"
    found = json.loads(asked.read_text())
    found["results"][-1]["changed"] = 3
    asked.write_text(json.dumps(found))
