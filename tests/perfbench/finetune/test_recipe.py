"""`perfbench finetune` on a tiny random Llama: what is kept, what it goes on from, and what stops it."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from perfbench.cli import main
from perfbench.errors import PerfbenchError, RunDirectoryError, TaskError
from perfbench.finetune import checkpoint, recipe, trained, trainer
from perfbench.finetune.encoding import Collator
from perfbench.finetune.finetune_config import FinetuneConfig, TaskSource
from perfbench.finetune.finetune_folder import FinetuneFolder
from perfbench.runtimes import backbone
from tests.perfbench.finetune.made_up import write_own

ROOT = Path(__file__).resolve().parents[3]
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def config(tiny_llama: Path, sums: Path) -> FinetuneConfig:
    """LoRA on made-up sums: 6 steps an epoch, an evaluation every 4 steps."""
    return FinetuneConfig(
        backbone=str(tiny_llama),
        method="lora",
        options={"rank": 2},
        task=TaskSource("own", str(sums)),
        device="cpu",
        seeds=(0,),
        max_tokens=16,
        learning_rate=5e-3,
        epochs=2,
        batch=8,
        evaluate_every=4,
    )


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="session")
def done(config: FinetuneConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, recipe.SeedResult]:
    """A run that nothing disturbed, and its seed's result."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("done") / "run"
    with (out.parent / "said").open("w") as said:
        (result,) = recipe.finetune(config, out, console=Console(file=said))
    return out, result


def test_it_says_what_it_is_doing(done: tuple[Path, recipe.SeedResult]) -> None:
    said = (done[0].parent / "said").read_text()
    assert said.index("seed 0: training") < said.index("dev loss") < said.index("seed 0: judging on 6 test items")


def test_a_run_says_what_came_out(done: tuple[Path, recipe.SeedResult]) -> None:
    out, result = done
    manifest = manifest_of(out)
    assert (manifest["kind"], manifest["config"]["method"]) == ("finetune", "lora")
    assert manifest["environment"]["versions"]["peft"]
    assert manifest["examples"]["train"] == 48
    seed = manifest["seeds"]["0"]
    assert (seed["status"], seed["steps"]) == ("ok", 12)
    assert seed["trainable_parameters"] == result.trainable_parameters > 0
    assert seed["train_s"] > 0
    assert seed["time_to_best_s"] > 0
    assert seed["tokens_per_s"] > 0
    assert seed["peak_bytes"] > 1e6
    predictions = [json.loads(line) for line in (out / "seed0" / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 6
    assert manifest["test"]["median"] == pytest.approx(sum(one["score"] for one in predictions) / 6)
    assert not (out / "seed0" / "checkpoints").exists()


def test_show_prints_it_and_what_compares_speeds_refuses_it(
    done: tuple[Path, recipe.SeedResult], capsys: pytest.CaptureFixture[str]
) -> None:
    out, result = done
    assert main(["show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"{result.best_dev_loss:.4f}" in shown
    assert " of 1 seed (" in shown
    assert main(["show", str(out), "--format", "csv"]) == 2
    assert main(["compare", str(out), str(ROOT / "results" / "cpu-multitenant")]) == 2
    assert "a run of `perfbench finetune`, which has no cases" in capsys.readouterr().err


def test_the_dev_set_is_judged_every_n_steps_and_at_each_epochs_end(done: tuple[Path, recipe.SeedResult]) -> None:
    samples = [json.loads(line) for line in (done[0] / "samples.jsonl").read_text().splitlines()]
    assert [one["step"] for one in samples if one["split"] == "dev"] == [4, 6, 8, 12]
    train = [one for one in samples if one["split"] == "train"]
    assert [one["step"] for one in train] == [10]
    assert all(one["train_s"] <= one["elapsed_s"] for one in samples)


def dev_loss(config: FinetuneConfig, adapter: Path) -> float:
    """The dev loss of a saved adapter, by plain transformers: the mean over one batch of 8."""
    bare = backbone.load(config.backbone, "fp32", "cpu", 0)
    data = recipe.read_data(config, config.backbone, backbone.tokenizer_of(config.backbone))
    with torch.inference_mode():
        return trained.load(bare.model, adapter)(**Collator(0)(data.dev)).loss.item()


def test_the_adapter_on_disk_is_that_of_the_lowest_dev_loss(
    config: FinetuneConfig, tmp_path: Path, done: tuple[Path, recipe.SeedResult]
) -> None:
    """A dev set with answers that train knows nothing of: the more is learnt, the worse."""
    own = write_own(tmp_path / "own", {"train": 48, "test": 1})
    lines = [json.dumps({"prompt": f"{n}+{n}=", "answer": "xyzxyz"}) for n in range(10, 18)]
    (own / "dev.jsonl").write_text("\n".join(lines) + "\n")
    task = TaskSource("own", str(own), test_examples=0)
    spoilt = replace(config, learning_rate=0.05, epochs=6, patience=2, task=task)
    (result,) = recipe.finetune(spoilt, tmp_path / "run")
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    losses = {one["step"]: one["loss"] for one in samples if one["split"] == "dev"}
    assert result.best_dev_loss == min(losses.values()) == losses[result.best_step]
    since = [step for step in losses if step > result.best_step]
    assert [step % 4 for step in since].count(0) == 2, "patience ended the run after two more"
    assert since[-1] % 4 == 0, "an epoch's end takes nothing of the patience"
    assert any(step % 4 for step in since)
    assert result.steps == max(losses) < 36
    assert result.test_score is None
    assert dev_loss(spoilt, result.adapter) == pytest.approx(result.best_dev_loss, rel=1e-5)
    assert dev_loss(config, done[1].adapter) == pytest.approx(done[1].best_dev_loss, rel=1e-5)


@pytest.fixture
def uneven(tmp_path: Path) -> TaskSource:
    """Answers of 1 to 9 letters, so that a mean of batches' means is not the mean over tokens."""
    own = write_own(tmp_path / "uneven", {"train": 16, "test": 1})
    lines = [json.dumps({"prompt": f"{n}:", "answer": "x" * (1 + n * n % 9)}) for n in range(11)]
    (own / "dev.jsonl").write_text("\n".join(lines) + "\n")
    return TaskSource("own", str(own), test_examples=0)


def dev_losses(out: Path) -> list[float]:
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return [one["loss"] for one in samples if one["split"] == "dev"]


def test_the_dev_loss_is_a_mean_over_tokens_whatever_the_batches_are(
    config: FinetuneConfig, uneven: TaskSource, tmp_path: Path
) -> None:
    """It was a mean of batches' means: 4.699, 4.766 and 4.717 of one model at accumulate 1, 4 and 16."""
    bare = backbone.load(config.backbone, "fp32", "cpu", 0)
    still = replace(config, learning_rate=1e-30, epochs=1, task=uneven)
    examples = recipe.read_data(still, still.backbone, backbone.tokenizer_of(still.backbone)).dev
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for one in examples:
            logits = bare.model(torch.tensor([one.ids])).logits[0, one.prompt_tokens - 1 : -1].double()
            answer = torch.tensor(one.ids[one.prompt_tokens :])
            total += float(torch.nn.functional.cross_entropy(logits, answer, reduction="sum"))
            tokens += len(answer)
    for batch, accumulate in ((8, 1), (8, 4), (16, 16)):
        out = tmp_path / f"run-{batch}-{accumulate}"
        recipe.finetune(replace(still, batch=batch, accumulate=accumulate), out)
        assert dev_losses(out)[-1] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 4, 8])
def test_adalora_is_trained_and_chosen_by_what_lora_is(
    config: FinetuneConfig, uneven: TaskSource, tmp_path: Path, accumulate: int
) -> None:
    """Its orthogonality term counts once in a step of training, however that is split, and never in the dev loss."""
    still = replace(config, learning_rate=1e-30, epochs=5, evaluate_every=3, task=uneven, accumulate=accumulate)
    losses = {}
    for method in ("lora", "adalora"):
        out = tmp_path / method
        recipe.finetune(replace(still, method=method, options={}), out)
        samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        losses[method] = {one["split"]: one["loss"] for one in samples}
    assert losses["adalora"]["dev"] == pytest.approx(losses["lora"]["dev"], rel=1e-6)
    module = trained.attach(backbone.load(config.backbone, "fp32", "cpu", 0).model, "adalora", None, 0)
    term = torch.tensor(
        [
            float((p @ p.T if "lora_A" in name else p.T @ p).sub(torch.eye(8)).norm().detach())
            for name, p in module.named_parameters()
            if "lora_A" in name or "lora_B" in name
        ]
    )
    assert losses["adalora"]["train"] - losses["lora"]["train"] == pytest.approx(0.5 * float(term.mean()), rel=1e-3)


@pytest.mark.parametrize("method", ["adalora", "ssp"])
def test_what_is_chosen_is_within_its_budget(config: FinetuneConfig, tmp_path: Path, method: str) -> None:
    """A dev set that only gets worse: before the pruning its loss is the lowest, and that used to be kept."""
    own = write_own(tmp_path / "own", {"train": 48, "test": 1})
    lines = [json.dumps({"prompt": f"{n}+{n}=", "answer": "xyzxyz"}) for n in range(10, 18)]
    (own / "dev.jsonl").write_text("\n".join(lines) + "\n")
    task = TaskSource("own", str(own), test_examples=0)
    options = {"adalora": {"initial_rank": 4, "rank": 2}, "ssp": {"budget": 700}}[method]
    spoilt = replace(config, method=method, options=options, learning_rate=0.05, epochs=3, evaluate_every=1,
                     patience=2, task=task)  # fmt: skip
    (result,) = recipe.finetune(spoilt, tmp_path / "run")
    losses = dev_losses(tmp_path / "run")
    settled = {"adalora": 18 - 5, "ssp": round(18 * 0.3)}[method]
    assert losses.index(min(losses)) + 1 < settled, "the case has to be one in which the lowest comes too early"
    assert result.best_step >= settled
    assert result.best_dev_loss == min(losses[settled - 1 :])
    kept = load_file(result.adapter / "adapter_model.safetensors")
    if method == "adalora":
        ranks = [tensor.shape[0] for name, tensor in kept.items() if name.endswith("lora_E")]
        assert sum(ranks) == 2 * len(ranks)
    else:
        assert sum(tensor.numel() for tensor in kept.values()) <= 700
    assert result.trainable_parameters == sum(tensor.numel() for tensor in kept.values())


def test_full_fine_tuning_in_bf16_learns_as_in_fp32(config: FinetuneConfig, tmp_path: Path) -> None:
    """Without fp32 masters a step is lost in the rounding of the weights: 6.71 where fp32 reached 3.55."""
    losses, moved = {}, {}
    task = replace(config.task, test_examples=0)
    for dtype in ("fp32", "bf16"):
        full = replace(config, method="full", options={}, dtype=dtype, learning_rate=1e-4, epochs=4, task=task)
        (result,) = recipe.finetune(full, tmp_path / dtype)
        losses[dtype] = result.best_dev_loss
        before = dict(backbone.load(config.backbone, dtype, "cpu", 0).model.named_parameters())
        after = load_file(result.adapter / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in after.values()} == {torch.float32}
        same = sum(int((after[name] == before[name].float()).sum()) for name in after)
        moved[dtype] = 1 - same / sum(tensor.numel() for tensor in after.values())
        loaded = trained.load(backbone.load(config.backbone, dtype, "cpu", 0).model, result.adapter)
        assert {p.dtype for p in loaded.parameters()} == {{"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]}
    bare = backbone.load(config.backbone, "fp32", "cpu", 0).model
    data = recipe.read_data(config, config.backbone, backbone.tokenizer_of(config.backbone))
    with torch.inference_mode():
        start = bare(**Collator(0)(data.dev)).loss.item()
    assert start - losses["fp32"] > 0.01, "something has to be learnt"
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.1 * (start - losses["fp32"]))
    assert moved["bf16"] == pytest.approx(moved["fp32"], abs=0.05)


def test_a_seed_decides_everything(
    config: FinetuneConfig, done: tuple[Path, recipe.SeedResult], tmp_path: Path
) -> None:
    task = replace(config.task, test_examples=0)
    again, other = recipe.finetune(replace(config, seeds=(0, 1), task=task), tmp_path / "run")
    bytes_of = [(result.adapter / "adapter_model.safetensors").read_bytes() for result in (done[1], again, other)]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]


KILLED_AT = """
import os, signal, sys
import torch
from perfbench.finetune import finetune_config, recipe
from perfbench.finetune.trainer import AdapterTrainer

torch.set_num_threads(1)
step = AdapterTrainer.training_step
def killed(self, *args, **kwargs):
    if self.state.global_step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
AdapterTrainer.training_step = killed
{more}
recipe.finetune(finetune_config.load(sys.argv[1]), __import__("pathlib").Path(sys.argv[2]))
"""
# Dies while the checkpoint of step 8 is being written: weights are there, the rest is not.
TORN = """
def torn(self, output_dir):
    if self.state.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return rng(self, output_dir)
rng = AdapterTrainer._save_rng_state
AdapterTrainer._save_rng_state = torn
"""


@pytest.mark.parametrize(("method", "step", "more"), [("lora", 7, ""), ("para", 99, TORN)])
def test_a_killed_run_goes_on_to_the_same_bytes(
    config: FinetuneConfig, done: tuple[Path, Any], tmp_path: Path, method: str, step: int, more: str
) -> None:
    fields = {key: value for key, value in config.to_json().items() if key not in ("options", "name", "method")}
    fields["task"] = {"name": "own", "source": config.task.source, "test_examples": 0}
    file = tmp_path / "finetune.yaml"
    file.write_text(json.dumps(fields | {"method": {method: {"rank": 2}}}))
    command = [sys.executable, "-c", KILLED_AT.format(step=step, more=more), str(file), str(tmp_path / "killed")]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert child.returncode == -9, child.stderr
    assert manifest_of(tmp_path / "killed")["seeds"]["0"]["status"] == "pending"
    assert main(["finetune", str(file), "--out", str(tmp_path / "killed"), "--resume"]) == 0
    whole = done[0] if method == config.method else tmp_path / "whole"
    if not whole.exists():
        assert main(["finetune", str(file), "--out", str(whole)]) == 0
    assert (tmp_path / "killed" / "seed0" / WEIGHTS).read_bytes() == (whole / "seed0" / WEIGHTS).read_bytes()

    def losses(run: Path) -> list[tuple[int, float]]:
        samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        return [(one["step"], one["loss"]) for one in samples if one["split"] == "dev"]

    assert losses(tmp_path / "killed") == losses(whole), "each evaluation stands there once"


@pytest.fixture(scope="session")
def stopped(config: FinetuneConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 10, with the checkpoints of steps 6 and 8."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("stopped") / "run"
    step = trainer.AdapterTrainer.training_step

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 10:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.AdapterTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            recipe.finetune(config, out)
    return out


def checkpoints(run: Path) -> list[Path]:
    return list(checkpoint.all_in(run / "seed0" / "checkpoints"))


# Each damage of one file; the last is what a stranger would put there.
DAMAGES: dict[str, Any] = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:50]),
    "empty": lambda file: file.write_bytes(b""),
    "gone": Path.unlink,
    "one bit": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "deep": lambda file: file.write_text("[" * 100_000),
    "nothing": lambda file: file.write_text("{}"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "pickle": lambda file: file.write_bytes(pickle.dumps(print)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_was_damaged_is_torn(stopped: Path, tmp_path: Path, damage: str) -> None:
    """Whatever was done to whichever of its files; one that was only copied is whole."""
    before, last = checkpoints(stopped)
    assert [path.name for path in (before, last)] == ["checkpoint-6", "checkpoint-8"]
    assert checkpoint.fault_of(last) is None
    names = sorted(path.name for path in last.iterdir())
    assert not [name for name in names if not name.endswith((".json", ".safetensors"))], "no pickle"
    for name in names:
        copy = tmp_path / name / "checkpoint-8"
        shutil.copytree(last, copy)
        DAMAGES[damage](copy / name)
        assert checkpoint.last_whole(copy.parent)[0] is None, name
    moved = shutil.copytree(before, tmp_path / "moved" / "checkpoint-8")
    assert checkpoint.fault_of(moved) == "complete.json is that of step 6"


@pytest.mark.parametrize(("torn", "said"), [(1, "goes on from step 6"), (2, "goes on from its beginning")])
def test_it_goes_on_from_the_one_before_to_the_same_bytes(
    config: FinetuneConfig,
    done: tuple[Path, Any],
    stopped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    torn: int,
    said: str,
) -> None:
    """Deleting the optimiser's state once gave another adapter, exit code 0. Nothing on the way is pickle."""
    for function in ("load", "save"):
        monkeypatch.setattr(torch, function, lambda *args, **kwargs: pytest.fail("pickle"))
    run = shutil.copytree(stopped, tmp_path / "run")
    for path in checkpoints(run)[-torn:]:
        (path / "optimiser.safetensors").unlink()
    (run / "seed0" / "checkpoints" / "checkpoint-99").write_text("no folder")
    with (tmp_path / "said").open("w") as out:
        recipe.finetune(config, run, resume=True, console=Console(file=out))
    lines = (tmp_path / "said").read_text()
    assert lines.count("torn: optimiser.safetensors can't be read (No such file or directory); seed 0 " + said) == torn
    assert (run / "seed0" / WEIGHTS).read_bytes() == (done[0] / "seed0" / WEIGHTS).read_bytes()
    steps = [json.loads(line)["step"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in (done[0] / "samples.jsonl").read_text().splitlines()]


def test_what_ended_by_patience_is_not_trained_further(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between the last checkpoint and the note that the seed is done."""
    impatient = replace(config, learning_rate=0.5, patience=1, epochs=6, task=replace(config.task, test_examples=0))
    (whole,) = recipe.finetune(impatient, tmp_path / "whole")
    assert whole.steps < 36

    def stopped(kind: str) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "_peak_bytes", stopped)
        with pytest.raises(KeyboardInterrupt):
            recipe.finetune(impatient, tmp_path / "stopped")
    (again,) = recipe.finetune(impatient, tmp_path / "stopped", resume=True)
    assert (again.steps, again.best_step, again.best_dev_loss) == (whole.steps, whole.best_step, whole.best_dev_loss)
    weights = [(result.adapter / "adapter_model.safetensors").read_bytes() for result in (whole, again)]
    assert weights[0] == weights[1]


def test_a_finished_run_is_not_trained_again(
    config: FinetuneConfig, done: tuple[Path, recipe.SeedResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(done[0], tmp_path / "run")
    monkeypatch.setattr(trained, "attach", lambda *args: pytest.fail("it was trained again"))
    (again,) = recipe.finetune(config, tmp_path / "run", resume=True)
    assert replace(again, adapter=done[1].adapter) == done[1]


def test_a_run_of_another_configuration_is_not_gone_on_with(
    config: FinetuneConfig, done: tuple[Path, recipe.SeedResult]
) -> None:
    with pytest.raises(RunDirectoryError, match="holds a run with epochs 2, not 3"):
        recipe.finetune(replace(config, epochs=3), done[0], resume=True)
    with pytest.raises(RunDirectoryError, match="expected a new or empty folder"):
        recipe.finetune(config, done[0])
    with pytest.raises(RunDirectoryError, match="expected a fine-tuning run, got kind 'run'"):
        FinetuneFolder.open(ROOT / "results" / "cpu-multitenant")


@pytest.fixture
def poisoned(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny Llama with a NaN where the letter `N` is looked up, which loading it would refuse."""
    monkeypatch.setattr(backbone, "_expect_finite", lambda name, model: None)
    folder = tmp_path / "poisoned"
    shutil.copytree(tiny_llama, folder)
    weights = load_file(folder / "model.safetensors")
    letter = backbone.tokenizer_of(str(folder))("N", add_special_tokens=False)["input_ids"][0]
    weights["model.embed_tokens.weight"][letter] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_what_was_good(
    config: FinetuneConfig, poisoned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One record of train has the letter: its step is the one that is told."""
    own = write_own(tmp_path / "own", {"train": 24, "dev": 4, "test": 2})
    with (own / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "N+1=", "answer": "2"}) + "\n")
    fields = config.to_json() | {"backbone": str(poisoned), "method": {"lora": {"rank": 2}}, "evaluate_every": 1}
    fields |= {"batch": 1, "task": {"name": "own", "source": str(own)}, "seeds": [3]}
    path = tmp_path / "finetune.yaml"
    path.write_text(json.dumps({key: value for key, value in fields.items() if key != "options"}))
    out = tmp_path / "run"
    assert main(["finetune", str(path), "--out", str(out)]) == 2
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    evaluated = [one for one in samples if one["split"] == "dev"]
    assert evaluated, "the seed has to let some steps come first"
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"perfbench: seed 3, step {evaluated[-1]['step'] + 1}: the loss is nan; the best adapter")
    seed = manifest_of(out)["seeds"]["3"]
    assert seed["status"] == "not_finite"
    assert seed["reason"] in said
    kept = load_file(out / "seed3" / WEIGHTS)
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    assert list((out / "seed3" / "checkpoints").glob(f"*/{checkpoint.MANIFEST}"))


def test_a_dev_loss_that_is_not_a_number_stops_it_too(config: FinetuneConfig, poisoned: Path, tmp_path: Path) -> None:
    own = write_own(tmp_path / "own", {"train": 24, "dev": 4, "test": 2})
    with (own / "dev.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "N+1=", "answer": "2"}) + "\n")
    task = TaskSource("own", str(own))
    with pytest.raises(PerfbenchError, match="seed 0, step 3: the dev loss is nan; no adapter was kept yet"):
        recipe.finetune(replace(config, backbone=str(poisoned), task=task), tmp_path / "run")
    assert not list((tmp_path / "run" / "seed0").glob("adapter*"))


def plant_nothing(own: Path) -> None:
    (own / "dev.jsonl").write_text("\n")


def plant_a_leak(own: Path) -> None:
    (own / "dev.jsonl").write_text((own / "train.jsonl").read_text().splitlines()[2] + "\n")


def plant_a_long_answer(own: Path) -> None:
    with (own / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "9+9=", "answer": "eighteen, which is more"}) + "\n")


def plant_a_missing_field(own: Path) -> None:
    with (own / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "9+9="}) + "\n")


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (plant_nothing, "has no record for dev"),
        (plant_a_leak, "is in train too, at"),
        (plant_a_long_answer, "train.jsonl:9: expected at most max_tokens 16, got 5 of the prompt + 24 of the answer"),
        (plant_a_missing_field, "train.jsonl:9: no field 'answer'"),
    ],
)
def test_bad_data_is_refused_before_anything_is_written(
    config: FinetuneConfig, tmp_path: Path, plant: Any, message: str
) -> None:
    own = write_own(tmp_path / "own", {"train": 8, "dev": 2, "test": 2})
    plant(own)
    with pytest.raises(TaskError) as refused:
        recipe.finetune(replace(config, task=TaskSource("own", str(own))), tmp_path / "run")
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 4096}, "max_tokens: expected at most 2048, the context of"),
        ({"backbone": "llama-tiny"}, "a named shape has random weights and no tokenizer"),
        ({"backbone": "no/such"}, "no such folder"),
        ({"method": "fanlora", "options": {"setting": (("v",),)}}, "expected a setting of 2 layers"),
    ],
)
def test_a_configuration_that_the_backbone_refuses(
    config: FinetuneConfig, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(PerfbenchError, match=message):
        recipe.finetune(replace(config, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_accumulation_changes_nothing_but_rounding(
    config: FinetuneConfig, done: tuple[Path, recipe.SeedResult], tmp_path: Path
) -> None:
    """The loss of a batch is the mean over its answer tokens, in however many pieces it is computed."""
    task = replace(config.task, test_examples=0)
    (pieces,) = recipe.finetune(replace(config, accumulate=4, task=task), tmp_path / "run")
    whole, split = (load_file(result.adapter / "adapter_model.safetensors") for result in (done[1], pieces))
    for name, tensor in whole.items():
        torch.testing.assert_close(split[name], tensor, rtol=1e-3, atol=1e-5)
