"""`perfbench fanlora search`: LoRA everywhere, the scores of its modules, and the setting that keeps the best.

OUT/search.json           configuration, environment, all scores, how alike they are
OUT/setting.json          what `methods: fanlora: {setting: FILE}` takes, by the first score of the file
OUT/setting-<score>.json  the same by each other score
OUT/*.svg                 heat maps of the scores and of what is kept, the share of each kind over the layers
OUT/training/             step 1, a fine-tuning run, unless adapters were given
OUT/seed<k>/<score>.jsonl what was measured, a line for each unit of work: where a killed search goes on
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from perfbench import __version__
from perfbench.errors import FinetuneError
from perfbench.files.run_lock import has_files
from perfbench.finetune import recipe, small_backbone
from perfbench.finetune.search import gates, held_out, outcome, setting
from perfbench.finetune.search.compare import compare
from perfbench.finetune.search.gates import GatedModel
from perfbench.finetune.search.held_out import HeldOut
from perfbench.finetune.search.journal import Journal
from perfbench.finetune.search.outcome import MANIFEST, Found
from perfbench.finetune.search.scores import SCORES, Measurement, Scores
from perfbench.finetune.search.search_config import SearchConfig
from perfbench.machine import environment
from perfbench.machine.device import device_kind
from perfbench.methods.checkpoints.adapter_folder import WEIGHTS
from perfbench.progress import RunProgress
from perfbench.runtimes import backbone
from perfbench.spec.backbone_config import shape_of

KIND = "fanlora-search"
# The line of the naive evaluation among those of the batches.
CHECK = (-1,)


def search(config: SearchConfig, out: Path, *, resume: bool = False, console: Console | None = None) -> Found:
    """Steps 1 to 3 of FanLoRA into the folder `out`; with `resume` it goes on where a killed search stopped.

    TaskError, BackboneError, AdapterError, FinetuneError: for what the user can mend, in one line.
    """
    console = console or Console(stderr=True)
    transformers_logging.disable_progress_bar()
    kind, why = device_kind(config.training.device)
    console.print(f"device {config.training.device} -> {kind} ({why})", highlight=False)
    name = small_backbone.resolve(config.training.backbone, console)
    examples = held_out.read(config.training, name, backbone.tokenizer_of(name), config.rows, torch.device(kind))
    if examples.left_out:
        longer = f"longer than max_tokens {config.training.max_tokens}"
        console.print(f"{examples.left_out} held-out examples left out, {longer}", highlight=False)
    for folder in config.adapters:  # refused before anything is written
        gates.read(Path(folder), shape_of(name))
    manifest = _open(config, out, resume, kind, examples)
    adapters = [Path(folder) for folder in config.adapters] or _train(config, out, console)
    bare = backbone.load(name, config.training.dtype, kind, seed=0)
    by_seed, check = {}, None
    for seed, adapter in zip(config.training.seeds, adapters, strict=True):
        model, rank = gates.load(bare, adapter)
        sha256 = hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest()
        # Relative where it is part of the search, so that its folder can be moved.
        place = adapter.relative_to(out) if adapter.is_relative_to(out) else adapter
        manifest["seeds"][str(seed)] = {"adapter": str(place), "adapter_sha256": sha256, "rank": rank}
        one = _Seed(config, out / f"seed{seed}", seed, model, rank, sha256, examples, console)
        by_seed[seed] = one.scores()
        check = check or one.check
    found = outcome.conclude(config, by_seed, check, manifest)
    outcome.write(config, out, found)
    outcome.show(config, out, found, console)
    return found


def _open(config: SearchConfig, out: Path, resume: bool, kind: str, examples: HeldOut) -> dict[str, Any]:
    """The manifest of a new search, `out` made; FinetuneError where something is in it and it is not resumed."""
    if out.exists() and not out.is_dir():
        raise FinetuneError(f"{out}: expected a folder, got a file; give another --out")
    if resume and not (out / MANIFEST).is_file():
        raise FinetuneError(f"{out}: no search to go on with, it has no {MANIFEST}; run without --resume")
    if not resume and out.is_dir() and has_files(out):
        raise FinetuneError(
            f"{out}: expected a new or empty folder, this one has files in it; --resume goes on with the search in "
            "it, another --out starts a new one"
        )
    manifest = {
        "kind": KIND,
        "perfbench_version": __version__,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished_at": None,
        "config": config.to_json(),
        "environment": environment.collect(kind, torch.get_num_threads() if kind == "cpu" else None),
        "held_out": examples.summary(),
        "seeds": {},
    }
    setting.write_json(out / MANIFEST, manifest)
    return manifest


def _train(config: SearchConfig, out: Path, console: Console) -> list[Path]:
    """Step 1: LoRA on every linear of every layer, with each seed; goes on with what is there."""
    folder = out / "training"
    begun = (folder / "run.json").is_file()
    results = recipe.finetune(config.training, folder, resume=begun, console=console)
    return [result.adapter for result in results]


@dataclass
class _Seed:
    """Step 2 for one trained LoRA."""

    config: SearchConfig
    folder: Path
    seed: int
    model: GatedModel
    rank: int
    sha256: str
    examples: HeldOut
    console: Console
    check: dict[str, float] | None = None

    def scores(self) -> dict[str, Scores]:
        """Every score that was asked for; what an earlier run has measured is read."""
        config = self.config
        measurement = Measurement(
            self.model, self.examples.batches, config.tokens_per_forward, config.permutations, self.seed
        )
        found = {}
        for name in config.scores:
            score = SCORES[name]
            journal = Journal(self.folder / f"{name}.jsonl", self._subject(name))
            units = score.units(measurement)
            with RunProgress(len(units), self.console) as progress:
                if name == "ab":
                    self._compare(journal, progress)
                for position, unit in enumerate(units, start=1):
                    if unit not in journal.lines:
                        progress.say(f"seed {self.seed}, {name}", f"{position} of {len(units)}")
                        journal.add(unit, score.measure(measurement, unit))
                    progress.advance()
            found[name] = score.combine([journal.lines[unit] for unit in units])
        return found

    def _subject(self, name: str) -> dict[str, Any]:
        training = self.config.training
        return {
            "score": name,
            "backbone": training.backbone,
            "dtype": training.dtype,
            "adapter": self.sha256,
            "held_out": self.examples.sha256,
            "rows": self.config.rows,
            "seed": self.seed,
        }

    def _compare(self, journal: Journal, progress: RunProgress) -> None:
        """The naive evaluation of one batch: both must agree, and the line says how much time was saved."""
        if CHECK not in journal.lines:
            progress.say(f"seed {self.seed}", "the naive evaluation of one batch, to compare with")
            middle = self.examples.batches[len(self.examples.batches) // 2]
            journal.add(CHECK, compare(self.model, self.rank, middle, self.config.tokens_per_forward))
        self.check = {key: value for key, value in journal.lines[CHECK].items() if key != "unit"}
