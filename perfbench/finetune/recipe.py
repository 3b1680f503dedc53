"""`perfbench finetune`: one method on one task, trained with every seed, judged on the test set."""

from __future__ import annotations

import gc
import json
import math
import shutil
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from transformers.utils import logging as transformers_logging

from perfbench.errors import FinetuneError, TaskError
from perfbench.finetune import checkpoint, small_backbone, trained
from perfbench.finetune.encoding import Collator, Encoded, encode_split, fits
from perfbench.finetune.finetune_config import FinetuneConfig
from perfbench.finetune.finetune_folder import FinetuneFolder
from perfbench.finetune.frozen_products import in_bf16
from perfbench.finetune.predict import predict
from perfbench.finetune.tasks.registry import find, load_splits
from perfbench.finetune.tasks.task import Example, Split, Task
from perfbench.finetune.tasks.task_metrics import METRICS
from perfbench.finetune.trainer import AdapterTrainer, NotFinite, training_arguments
from perfbench.machine.device import device_kind
from perfbench.measure.on_device.memory import peak_resident_bytes, reset_peak_resident
from perfbench.progress import RunProgress
from perfbench.runtimes import backbone
from perfbench.spec.backbone_config import shape_of

ADAPTER, CHECKPOINTS, PREDICTIONS = "adapter", "checkpoints", "predictions.jsonl"


@dataclass(frozen=True)
class SeedResult:
    """What one seed gave. `adapter`: the best dev checkpoint; `train_s`: in steps alone, `time_to_best_s`: from the
    start to the best evaluation, all included; `peak_bytes`: allocated on a GPU, resident on a CPU; `test_score`: the
    task's metric, the mean over the test items, None where the test set was not asked for."""

    seed: int
    adapter: Path
    best_step: int
    best_dev_loss: float
    steps: int
    train_s: float
    time_to_best_s: float
    tokens_per_s: float
    peak_bytes: int | None
    trainable_parameters: int
    test_score: float | None = None
    test_items: int | None = None


@dataclass(frozen=True)
class Data:
    """A task as training sees it; `left_out` counts what does not fit max_tokens."""

    task: Task
    train: list[Encoded]
    dev: list[Encoded]
    test: list[Example]
    left_out: dict[str, int]


def finetune(
    config: FinetuneConfig, out: Path, *, resume: bool = False, console: Console | None = None
) -> tuple[SeedResult, ...]:
    """Trains `config` with each of its seeds into the run folder `out`, and judges each on the test set.

    Under torchrun or `accelerate launch` every process calls this; the main one writes. With `resume` it goes on where
    a killed run stopped, to the same adapter bytes. TaskError, BackboneError, FinetuneError, RunDirectoryError: before
    anything is written, but for a loss that is not finite (NotFinite), which leaves what the last evaluation left.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Trainer and PEFT call each other's old names, which is nothing that the reader could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\b.*")
    kind, _ = device_kind(config.device)
    processes = PartialState(cpu=kind == "cpu")
    console = (console or Console(stderr=True)) if processes.is_main_process else Console(quiet=True)
    training_arguments(config, 0, kind, out, processes.num_processes)  # refuses a batch that can't be split
    with processes.main_process_first():
        name = small_backbone.resolve(config.backbone, console)
    check_against_backbone(config, name)
    tokenizer = backbone.tokenizer_of(name)
    data = read_data(config, name, tokenizer)
    for split, count in data.left_out.items():
        if count:
            console.print(f"{split}: {count} examples left out, longer than max_tokens {config.max_tokens}")
    folder = _folder(config, out, resume, kind, data, processes)
    steps = config.epochs * -(-len(data.train) // config.batch)
    results = []
    with RunProgress(len(config.seeds) * steps, console) as progress:
        for seed in config.seeds:
            one = _Seed(config, name, kind, tokenizer, data, folder, seed, processes, progress)
            results.append(one.run())
            one.show(steps)
    if processes.is_main_process:
        folder.manifest["test"] = summary(data.task, results)
        folder.manifest["finished_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        folder.write()
    return tuple(results)


def check_against_backbone(config: FinetuneConfig, name: str) -> None:
    """FinetuneError for what the sizes of the backbone make impossible, BackboneError for the backbone itself."""
    shape = shape_of(name)
    if config.max_tokens > shape.context:
        limit = f"{shape.context}, the context of {name}"
        raise FinetuneError(f"max_tokens: expected at most {limit}, got {config.max_tokens}; lower it")
    setting = config.options.get("setting")
    if setting is not None and len(setting) != shape.layers:
        expected = f"expected a setting of {shape.layers} layers, those of {name}"
        raise FinetuneError(f"method.{config.method}.setting: {expected}, got {len(setting)}")


def read_data(config: FinetuneConfig, name: str, tokenizer: Any) -> Data:
    """The splits of the configured task, encoded for the backbone `name`. TaskError names file and record."""
    context = shape_of(name).context
    task = find(config.task.name, config.task.metric)
    counts: dict[Split, int | None] = {
        "train": config.task.train_examples,
        "dev": config.task.dev_examples,
        "test": config.task.test_examples,
    }
    wanted: Sequence[Split] = ("train", "dev") if config.task.test_examples == 0 else ("train", "dev", "test")
    limits = {split: count for split, count in counts.items() if count is not None}
    splits = load_splits(task, config.task.source, wanted, limits)
    leave_out = config.too_long == "leave-out"
    encoded, left_out = {}, {}
    for split in ("train", "dev"):
        encoded[split], left_out[split] = encode_split(
            splits[split],
            tokenizer,
            end=task.kind == "generate",
            max_tokens=config.max_tokens,
            leave_out=leave_out,
            invocation=config.options.get("invocation", ()),
        )
    # Found out now, and not after hours of training.
    test = [one for one in splits.get("test", []) if fits(task, one, tokenizer, context, leave_out)]
    left_out["test"] = len(splits.get("test", [])) - len(test)
    if left_out["test"] and not test:
        raise TaskError(f"test: none of {left_out['test']} examples fits {context} tokens, the context of {name}")
    return Data(task, encoded["train"], encoded["dev"], test, left_out)


def summary(task: Task, results: Sequence[SeedResult]) -> dict[str, Any] | None:
    """Median and spread of the test metric over the seeds; None where the test set was not asked for."""
    scores = [result.test_score for result in results if result.test_score is not None]
    if not scores:
        return None
    found = {"median": statistics.median(scores), "lowest": min(scores), "highest": max(scores)}
    return {"metric": task.metric, "items": results[0].test_items, "seeds": len(scores), **found}


def _folder(
    config: FinetuneConfig, out: Path, resume: bool, kind: str, data: Data, processes: PartialState
) -> FinetuneFolder:
    """The run's folder, made by the main process, opened by the others."""
    with processes.main_process_first():
        if resume or not processes.is_main_process:
            folder = FinetuneFolder.open(out)
            folder.check_same(config, processes.num_processes)
            return folder
        examples = {"train": len(data.train), "dev": len(data.dev), "test": len(data.test), "left_out": data.left_out}
        return FinetuneFolder.create(out, config, kind, torch.get_num_threads(), processes.num_processes, examples)


@dataclass
class _Seed:
    """One seed of a run, from the backbone's weights to the adapter and its score."""

    config: FinetuneConfig
    name: str
    kind: str
    tokenizer: Any
    data: Data
    folder: FinetuneFolder
    seed: int
    processes: PartialState
    progress: RunProgress
    shown_steps: int = 0

    def run(self) -> SeedResult:
        """Trains unless that is done already, then judges unless that is."""
        entry = self.folder.manifest["seeds"][str(self.seed)]
        if entry["status"] != "ok":
            self._train(entry)
        if self.data.test and entry["test_score"] is None:
            self._judge(entry)
        figures = {key: value for key, value in entry.items() if key not in ("status", "reason")}
        return SeedResult(seed=self.seed, adapter=self._place / ADAPTER, **figures)

    @property
    def _place(self) -> Path:
        return self.folder.path / f"seed{self.seed}"

    def _train(self, entry: dict[str, Any]) -> None:
        self.progress.say(f"seed {self.seed}", "training")
        model = trained.attach(self._backbone(), self.config.method, self.config.options, self.seed)
        if self.config.frozen_products == "bf16":
            in_bf16(model)
        resettable = _reset_peak(self.kind)
        trainer = AdapterTrainer(
            model=model,
            args=training_arguments(
                self.config, self.seed, self.kind, self._place / CHECKPOINTS, self.processes.num_processes
            ),
            train_dataset=self.data.train,
            eval_dataset=self.data.dev,
            data_collator=Collator(_pad_id(self.tokenizer)),
            seed=self.seed,
            patience=self.config.patience,
            save_best=self._save_best,
            record=self._record,
            passed=self._passed,
        )
        start = self._start()
        try:
            trainer.go_on(start)
        except NotFinite as error:
            entry.update(status="not_finite", reason=str(error))
            if self.processes.is_main_process:
                self.folder.write()
            raise
        best = trainer.best()
        assert best is not None  # the end of an epoch has an evaluation
        entry.update(
            status="ok",
            reason=None,
            best_step=best["step"],
            best_dev_loss=best["eval_loss"],
            steps=trainer.state.global_step,
            train_s=trainer.train_seconds(),
            time_to_best_s=best["elapsed_s"],
            tokens_per_s=trainer.state.num_input_tokens_seen / trainer.train_seconds(),
            peak_bytes=_peak_bytes(self.kind) if resettable else None,
            trainable_parameters=trained.kept_parameters(model),
        )
        if self.processes.is_main_process:
            self.folder.write()
            shutil.rmtree(self._place / CHECKPOINTS, ignore_errors=True)

    def _start(self) -> Path | None:
        """The last whole checkpoint; says what it passes over, and drops the samples that will be written again."""
        start, torn = checkpoint.last_whole(self._place / CHECKPOINTS)
        step = checkpoint.step_of(start) if start else 0
        for one in torn:
            self.progress.warn(f"{one}; seed {self.seed} goes on from {f'step {step}' if step else 'its beginning'}")
        if self.processes.is_main_process:
            self.folder.cut_samples(self.seed, step)
        return start

    def _judge(self, entry: dict[str, Any]) -> None:
        """Every process predicts its share of the test set with the best adapter; the main one writes them down."""
        self.progress.say(f"seed {self.seed}", f"judging on {len(self.data.test)} test items")
        model = trained.load(self._backbone(), self._place / ADAPTER)
        share = self.data.test[self.processes.process_index :: self.processes.num_processes]
        predictions = predict(model, self.tokenizer, self.data.task, share, beams=self.config.beams)
        metric = METRICS[self.data.task.metric]
        own = [
            {"id": example.id, "prediction": prediction, "score": metric(prediction, example)}
            for example, prediction in zip(share, predictions, strict=True)
        ]
        items = sorted(gather_object(own), key=lambda item: item["id"])
        entry.update(test_score=statistics.fmean(item["score"] for item in items), test_items=len(items))
        if self.processes.is_main_process:
            text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            (self._place / PREDICTIONS).write_text(text, encoding="utf-8")
            self.folder.write()

    def _backbone(self) -> Any:
        """The model with its own weights, afresh: some methods train them."""
        gc.collect()
        return backbone.load(self.name, self.config.dtype, str(self.processes.device), seed=0).model

    def _save_best(self, module: Any) -> None:
        """Puts the adapter in its place, as a whole."""
        place, fresh, old = (self._place / name for name in (ADAPTER, f"{ADAPTER}.new", f"{ADAPTER}.old"))
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        trained.save(module, fresh)
        if place.exists():
            place.replace(old)
        fresh.replace(place)
        shutil.rmtree(old, ignore_errors=True)

    def _record(self, entry: dict[str, Any]) -> None:
        """One log entry of Trainer's as a sample: of a step's loss, or of an evaluation."""
        kind = "dev" if "eval_loss" in entry else "train" if "loss" in entry else None
        if kind is None:
            return  # Trainer's own summary at the end
        self.folder.append(
            {
                "seed": self.seed,
                "step": entry["step"],
                "epoch": entry["epoch"],
                "split": kind,
                "loss": entry["eval_loss" if kind == "dev" else "loss"],
                "learning_rate": entry.get("learning_rate"),
                "gradient_norm": _finite(entry.get("grad_norm")),
                "tokens": entry["num_input_tokens_seen"],
                "train_s": entry["train_s"],
                "elapsed_s": entry["elapsed_s"],
            }
        )

    def _passed(self, step: int, evaluation: dict[str, Any] | None) -> None:
        self.show(step)
        if evaluation:
            best = ", the lowest so far" if evaluation["is_best"] else ""
            self.progress.say(f"seed {self.seed}, step {step}", f"dev loss {evaluation['eval_loss']:.4f}{best}")

    def show(self, steps: int) -> None:
        """Moves the bar to where `steps` of this seed are done."""
        self.progress.already(steps - self.shown_steps)
        self.shown_steps = steps


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: a gradient may have one where the loss has none."""
    return value if value is not None and math.isfinite(value) else None


def _pad_id(tokenizer: Any) -> int:
    """What fills the places that the attention mask hides; any token does."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _reset_peak(kind: str) -> bool:
    """Makes the peak start again; False where that can't be done."""
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    return reset_peak_resident()


def _peak_bytes(kind: str) -> int:
    return torch.cuda.max_memory_allocated() if kind == "cuda" else peak_resident_bytes()
