"""The sweep of learning rates before a verdict, what training costs elsewhere, the anchor of the bare backbone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perfbench.errors import FinetuneError
from perfbench.finetune import trained
from perfbench.finetune.accuracy import accuracy_config, accuracy_folder, accuracy_run, forgetting
from perfbench.finetune.accuracy.train import SWEEP
from perfbench.finetune.finetune_config import TaskSource
from perfbench.finetune.trainer import AdapterTrainer, NotFinite
from perfbench.runtimes import backbone
from tests.perfbench.finetune.accuracy.conftest import QUIET

WriteConfig = Callable[..., Path]
RATES = [1e-3, 0.1]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of another task, in the words that the tiny tokenizer knows; one record is too long."""
    path = tmp_path_factory.mktemp("elsewhere") / "train.jsonl"
    rows = [{"prompt": f"{n} + 2 =", "answer": f" {n + 2}"} for n in range(5)]
    rows.append({"prompt": "1 + " * 40, "answer": " 9"})
    path.write_text("".join(json.dumps({"id": str(n), **row}) + "\n" for n, row in enumerate(rows)))
    return path


@pytest.fixture(scope="module")
def swept(write_config: WriteConfig, elsewhere: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the file, the run folder) of two methods with two learning rates each and two seeds."""
    folder = tmp_path_factory.mktemp("swept")
    path = write_config(
        folder,
        methods=["lora", {"ia3": {"train": {"learning_rate": 0.05}}}],
        learning_rate=None,
        learning_rates=RATES,
        forgetting={"name": "own", "source": str(elsewhere.parent), "examples": 4},
        serve={"runtimes": ["static"], "kernels": ["eager"], "dtypes": ["fp32"], "requests": 5},
    )
    torch.set_num_threads(1)
    accuracy_run.execute(accuracy_config.load(path), folder / "run", resume=False, console=QUIET)
    return path, folder / "run"


def manifest_of(run: Path) -> Any:
    return json.loads((run / accuracy_folder.MANIFEST).read_text())


def test_the_rate_with_the_lowest_dev_loss_trains_the_other_seeds(swept: tuple[Path, Path]) -> None:
    _, out = swept
    manifest = manifest_of(out)
    losses = manifest["sweeps"]["sums"]["lora"]
    assert set(losses) == {f"{rate:g}" for rate in RATES}
    best = min(losses, key=losses.get)
    adapters = manifest["adapters"]["sums"]["lora"]
    assert {f"{one['learning_rate']:g}" for one in adapters.values()} == {best}
    assert adapters["0"]["best_dev_loss"] == losses[best], "the first seed is the sweep's own"
    for rate in losses:
        seeds = json.loads((out / "sums" / f"lora{SWEEP}" / rate / "run.json").read_text())["seeds"]
        assert list(seeds) == ["0"]
    rest = json.loads((out / "sums" / "lora" / "run.json").read_text())
    assert list(rest["seeds"]) == ["1"]
    assert f"{rest['config']['learning_rate']:g}" == best
    assert "ia3" not in manifest["sweeps"]["sums"], "it has a rate of its own"
    assert {one["learning_rate"] for one in manifest["adapters"]["sums"]["ia3"].values()} == {0.05}


def test_a_rate_whose_loss_is_not_finite_is_passed_over(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step = AdapterTrainer.training_step

    def explode(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, *args, **kwargs)
        if self.args.learning_rate in failing:
            raise self._not_finite("loss", float("nan"))
        return loss

    monkeypatch.setattr(AdapterTrainer, "training_step", explode)
    path = write_config(
        tmp_path, methods=["lora"], seeds=[0], learning_rate=None, learning_rates=RATES, serve={"dtypes": ["fp32"]}
    )
    failing = {RATES[1]}
    accuracy_run.execute(accuracy_config.load(path), tmp_path / "run", resume=False, console=QUIET)
    assert manifest_of(tmp_path / "run")["sweeps"]["sums"]["lora"]["0.1"] is None
    failing = set(RATES)
    with pytest.raises(NotFinite, match=r"seed 0, step 1: the loss is nan"):
        accuracy_run.execute(accuracy_config.load(path), tmp_path / "all", resume=False, console=QUIET)


def test_the_loss_elsewhere_is_that_of_a_plain_forward_before_and_after(
    swept: tuple[Path, Path], elsewhere: Path, tiny_llama: Path
) -> None:
    manifest = manifest_of(swept[1])
    base = backbone.load(str(tiny_llama), "fp32", "cpu", seed=0)
    adapter = swept[1] / "sums" / "ia3" / "seed1" / "adapter"
    models = [base.skeleton(), trained.load(base.skeleton(), adapter)]
    rows = [json.loads(line) for line in elsewhere.read_text().splitlines()]
    expected = []
    for model in models:
        total = tokens = 0.0
        for row in rows[:4]:
            prompt = base.tokenizer()(row["prompt"])["input_ids"]
            whole = base.tokenizer()(row["prompt"] + row["answer"])["input_ids"]
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(dim=-1)
            for place in range(len(prompt), len(whole)):
                total -= float(logits[place - 1, whole[place]])
                tokens += 1
        expected.append(total / tokens)
    assert manifest["forgetting"] == {"tokens": tokens, "loss_before": pytest.approx(expected[0], rel=1e-5)}
    assert manifest["adapters"]["sums"]["ia3"]["1"]["loss_elsewhere"] == pytest.approx(expected[1], rel=1e-5)
    assert abs(expected[1] - expected[0]) > 1e-4, "training changed something"


def test_the_bare_backbone_stands_in_the_table_and_is_not_judged(swept: tuple[Path, Path], capsys: Any) -> None:
    from perfbench.cli import main

    verdict = accuracy_folder.AccuracyFolder.open(swept[1]).judge()
    dev, test = verdict.zero_shot["sums"]
    assert (dev.items, test.items, len(test.seeds)) == (8, 6, 1)
    assert "zero-shot" not in {row.method for row in verdict.methods}
    assert main(["show", str(swept[1])]) == 3
    printed = capsys.readouterr().out
    assert "zero-shot" in printed
    assert "elsewhere" in printed
    assert "rate" in printed


def test_a_swept_run_that_is_done_trains_nothing_again(
    swept: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdapterTrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    before = manifest_of(swept[1])
    accuracy_run.execute(accuracy_config.load(swept[0]), swept[1], resume=True, console=QUIET)
    assert manifest_of(swept[1])["verdict"] == before["verdict"]


def test_examples_elsewhere_that_do_not_fit_are_left_out(elsewhere: Path, tiny_llama: Path) -> None:
    tokenizer = backbone.tokenizer_of(str(tiny_llama))
    found = forgetting.read(TaskSource("own", str(elsewhere.parent), train_examples=100), tokenizer, 32)
    assert len(found.examples) == 5
    with pytest.raises(FinetuneError, match=r"forgetting: no example of own fits max_tokens 2"):
        forgetting.read(TaskSource("own", str(elsewhere.parent), train_examples=100), tokenizer, 2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"learning_rates": [0.1]}, "learning_rates"),
        ({"learning_rates": [0.1, 0.2]}, "expected learning_rate or learning_rates, got both"),
        ({"learning_rate": None, "learning_rates": [0.1, "much"]}, "expected a number > 0, got 'much'"),
        ({"methods": [{"lora": {"label": "zero-shot"}}], "reference": "zero-shot"}, "zero-shot"),
        ({"forgetting": {"name": "owm", "examples": 3}}, "unknown task 'owm'"),
        ({"forgetting": {"name": "own", "source": "SUMS", "examples": 3}}, "expected a task that is not trained"),
    ],
)
def test_what_can_not_be_is_refused(
    changes: dict[str, Any], says: str, write_config: WriteConfig, sums: Path, tmp_path: Path
) -> None:
    if changes.get("forgetting", {}).get("source") == "SUMS":
        changes = {"forgetting": {**changes["forgetting"], "source": str(sums)}}
    path = write_config(tmp_path, **changes)
    with pytest.raises(FinetuneError, match=r"tiny\.yaml") as caught:
        accuracy_config.load(path)
    assert says in str(caught.value)
