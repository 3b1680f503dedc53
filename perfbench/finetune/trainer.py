"""Hugging Face's Trainer, with what a comparison of adapters needs on top of it.

The loop, the optimiser, the devices and the resumption are Trainer's and Accelerate's. Added are: checkpoints of what
is trained only, sealed by checksums and without pickle; the best adapter kept on disk; an end when the dev loss no
longer falls or a loss is not finite; seconds and tokens.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from perfbench.errors import FinetuneError
from perfbench.finetune import checkpoint, trained
from perfbench.finetune.encoding import IGNORED, answers_only
from perfbench.finetune.finetune_config import FinetuneConfig

LOG_EVERY_STEPS = 10


def training_arguments(
    config: FinetuneConfig, seed: int, device_kind: str, checkpoints: Path, processes: int
) -> TrainingArguments:
    """The papers' recipe as Trainer spells it: AdamW, linear decay after a warm-up, evaluations by steps.

    FinetuneError where the batch can't be split evenly over `processes` and accumulation.
    """
    pieces = processes * config.accumulate
    if config.batch % pieces:
        raise FinetuneError(
            f"batch: expected a multiple of {pieces}, {processes} processes x accumulate {config.accumulate}, "
            f"got {config.batch}; change batch or accumulate"
        )
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        optim="adamw_torch",
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_share,  # below 1, Trainer takes it as a share of all steps
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch // pieces,
        per_device_eval_batch_size=config.batch // pieces,
        gradient_accumulation_steps=config.accumulate,
        eval_strategy="steps",
        eval_steps=config.evaluate_every,
        save_strategy="no",  # AdapterTrainer asks for a checkpoint after each evaluation
        logging_steps=LOG_EVERY_STEPS,
        logging_nan_inf_filter=False,  # it would hide what has to stop the run
        include_num_input_tokens_seen="non_padding",
        prediction_loss_only=True,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=device_kind == "cuda",
        use_cpu=device_kind == "cpu",
        bf16=config.dtype == "bf16",
        seed=seed,
        data_seed=seed,
        report_to="none",
        disable_tqdm=True,
    )
    # One process, one device: several are torchrun's or accelerate's to start, not DataParallel's threads.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class AdapterTrainer(Trainer):
    """Trains what of `model` requires a gradient; after each evaluation the best adapter is on disk.

    `save_best(module)` puts the adapter on disk, `record(entry)` gets every log entry of the main process and
    `passed(step, entry)` is told of each step's end and each evaluation.
    """

    def __init__(
        self,
        *,
        seed: int,
        patience: int,
        save_best: Callable[[Any], None],
        record: Callable[[dict[str, Any]], None],
        passed: Callable[[int, dict[str, Any] | None], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.seed, self.patience = seed, patience
        self.save_best, self.record, self.passed = save_best, record, passed
        self._to_restore: dict[str, torch.Tensor] | None = None
        self._started = time.perf_counter()
        self._resumed_at: float | None = self._started
        self.elapsed_s = self.train_s = 0.0
        for unwanted in ("PrinterCallback", "ProgressCallback"):
            for callback in [one for one in self.callback_handler.callbacks if type(one).__name__ == unwanted]:
                self.remove_callback(callback)
        self.add_callback(_StepsAndEpochs(self))

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluations(self) -> list[dict[str, Any]]:
        """Every evaluation so far, those before a resumption too: step, eval_loss, elapsed_s."""
        return [entry for entry in self.state.log_history if "eval_loss" in entry]

    def best(self) -> dict[str, Any] | None:
        """The first evaluation with the lowest dev loss, of those since the method has its final size; None before."""
        first = trained.settled_at(self.model, self.state.max_steps)
        settled = [entry for entry in self.evaluations() if entry["step"] >= first]
        return min(settled, key=lambda entry: entry["eval_loss"], default=None)

    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations brought no lower dev loss.

        Those that only an epoch's end asked for do not count: with them, patience would end after fewer steps the
        shorter the epochs are.
        """
        best = self.best()
        if best is None:
            return False
        since = [one["step"] for one in self.evaluations() if one["step"] > best["step"]]
        return sum(step % self.args.eval_steps == 0 for step in since) >= self.patience

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, over the tokens of the whole optimiser step; a method's penalty counts once in a step too."""
        pieces = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        with trained.penalty(self.model, 1 / pieces):
            return super().compute_loss(model, self._answers_only(inputs), *args, **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The loss of the answers alone: the mean over all tokens of the dev set, each counted once, however they are
        split into batches and processes."""
        model = self.accelerator.unwrap_model(self.model).eval()
        processes = self.accelerator.num_processes
        examples: Any = self.eval_dataset
        own = examples[self.accelerator.process_index :: processes]
        size = self.args.per_device_eval_batch_size
        total = torch.zeros(2, dtype=torch.float64)  # loss, tokens
        with torch.no_grad(), trained.penalty(self.model, 0):
            for start in range(0, len(own), size):
                batch = self._prepare_inputs(self.data_collator(own[start : start + size]))
                tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
                loss = float(model(**self._answers_only(batch)).loss)
                total += torch.tensor([loss * tokens, tokens], dtype=torch.float64)
        loss, tokens = torch.tensor(gather_object([total.tolist()]), dtype=torch.float64).sum(0).tolist()
        nothing: Any = None
        return EvalLoopOutput(nothing, None, {"eval_loss": loss / tokens}, len(examples))

    def _answers_only(self, batch: Any) -> Any:
        return batch if trained.is_soft(self.accelerator.unwrap_model(self.model)) else answers_only(batch)

    def go_on(self, start: Path | None) -> None:
        """Trains, from the checkpoint `start` where there is one; nothing is left to do where it ended by patience."""
        if start is not None:
            self.state = TrainerState.load_from_json(str(start / checkpoint.TRAINER_STATE))
            self.start_clock()
            if self.out_of_patience():
                return
        self.train(resume_from_checkpoint=None if start is None else str(start))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's; then keeps the best adapter, asks for a checkpoint, and stops where patience is at its end."""
        self._pause()
        metrics = super().evaluate(*args, **kwargs)
        done = self.evaluations()
        best = self.best()
        if best is done[-1]:
            if self.is_world_process_zero():
                self.save_best(self.accelerator.unwrap_model(self.model))
            self.accelerator.wait_for_everyone()
        self.control.should_save = True
        if self.out_of_patience():
            self.control.should_training_stop = True
        if self.is_world_process_zero():
            self.passed(self.state.global_step, {**done[-1], "is_best": best is done[-1]})
        self._go_on()
        return metrics

    # --- steps ------------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As Trainer's. FinetuneError where the loss is not finite: before the optimiser has seen its gradient."""
        loss = super().training_step(*args, **kwargs)
        # Trainer's own filter would look at it here too, so this costs no further synchronisation.
        if not torch.isfinite(loss):
            raise self._not_finite("loss", loss.item())
        return loss

    def _not_finite(self, what: str, value: float) -> FinetuneError:
        best = self.best()
        kept = f"the best adapter, of step {best['step']}, is kept" if best else "no adapter was kept yet"
        step = self.state.global_step + (what == "loss")
        return NotFinite(
            f"seed {self.seed}, step {step}: the {what} is {value}; {kept}; lower learning_rate "
            f"{self.args.learning_rate:g}, or train in dtype fp32"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the seconds since the seed began (`elapsed_s`) and those of training alone.

        FinetuneError for a dev loss that is not finite: it must not count as an evaluation.
        """
        if not math.isfinite(logs.get("eval_loss", 0.0)):
            raise self._not_finite("dev loss", logs["eval_loss"])
        now = time.perf_counter()
        self.elapsed_s += now - self._started
        self._started = now
        logs = {**logs, "elapsed_s": self.elapsed_s, "train_s": self.train_seconds()}
        super().log(logs)
        if self.is_world_process_zero():
            self.record(self.state.log_history[-1])

    def train_seconds(self) -> float:
        """Seconds in training steps: without evaluations and checkpoints."""
        running = 0.0 if self._resumed_at is None else time.perf_counter() - self._resumed_at
        return self.train_s + running

    def _pause(self) -> None:
        self.train_s, self._resumed_at = self.train_seconds(), None

    def _go_on(self) -> None:
        self._resumed_at = time.perf_counter()

    def start_clock(self) -> None:
        """Called when training begins: goes on from where the checkpoint's seconds stand."""
        known = [entry for entry in self.state.log_history if "train_s" in entry]
        self.elapsed_s, self.train_s = (known[-1]["elapsed_s"], known[-1]["train_s"]) if known else (0.0, 0.0)
        self._started = self._resumed_at = time.perf_counter()

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None  # Trainer names the checkpoint's folder
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = trained.training_state(self.accelerator.unwrap_model(self.model))
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / checkpoint.WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._to_restore = load_file(Path(resume_from_checkpoint) / checkpoint.WEIGHTS)

    # Trainer's own write pickle, and what they don't find when they read they leave at its start, without a word.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            checkpoint.write_optimiser(Path(output_dir), self.optimizer, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        if checkpoint_dir is not None:
            checkpoint.read_optimiser(Path(checkpoint_dir), self.optimizer, self.lr_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        checkpoint.write_random(Path(output_dir), self.args.process_index)

    def _load_rng_state(self, checkpoint_dir: str | None) -> None:
        if checkpoint_dir is not None:
            checkpoint.read_random(Path(checkpoint_dir), self.args.process_index)

    def _save_scaler(self, output_dir: str) -> None:
        assert self.accelerator.scaler is None  # fp32 and bf16 need none

    def _load_scaler(self, checkpoint_dir: str | None) -> None:
        assert self.accelerator.scaler is None

    def begin(self) -> None:
        """Called when training begins: tells the method how long it will be, and puts back what a checkpoint had."""
        trained.begin(self.model, self.state.max_steps)
        if self._to_restore is not None:
            trained.restore_training_state(self.model, self._to_restore)
            self._to_restore = None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._pause()
        here = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero() and here.exists():
            shutil.rmtree(here)  # a torn one, whose step was done again
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            checkpoint.seal(here, self.state.global_step)
            checkpoint.keep_two(here)
        self._go_on()


class NotFinite(FinetuneError):
    """A loss became NaN or infinite: the seed can't go on, what it had is kept."""


class _StepsAndEpochs(TrainerCallback):
    """Tells the trainer of each step, and asks for an evaluation at each epoch's end."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin()
        self.trainer.start_clock()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained.after_step(self.trainer.model, state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.trainer.passed(state.global_step, None)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = self.trainer.evaluations()
        if not done or done[-1]["step"] != state.global_step:
            control.should_evaluate = True
