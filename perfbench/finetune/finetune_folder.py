"""A fine-tuning run on disk: `run.json`, `samples.jsonl`, and a folder for each seed.

OUT/run.json            kind `finetune`: configuration, environment, and what came out for each seed
OUT/samples.jsonl       every logged step and every evaluation on the dev set
OUT/seed0/adapter/      the best dev checkpoint
OUT/seed0/predictions.jsonl  every item of the test set: prediction and score
OUT/seed0/checkpoints/  what a killed run goes on from; deleted when the seed is done
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perfbench import __version__
from perfbench.errors import RunDirectoryError
from perfbench.files import strict_json
from perfbench.files.run_lock import has_files
from perfbench.finetune.finetune_config import FinetuneConfig
from perfbench.finetune.finetune_schema import problem_of_finetune
from perfbench.machine import environment
from perfbench.run_folder.run_directory import MANIFEST, SCHEMA_VERSION, RunDirectory
from perfbench.spec import method_plugins

KIND = "finetune"
# Of a seed: what there is before it was trained.
PENDING: dict[str, Any] = {
    "status": "pending",
    "reason": None,
    "best_step": None,
    "best_dev_loss": None,
    "steps": None,
    "train_s": None,
    "time_to_best_s": None,
    "tokens_per_s": None,
    "peak_bytes": None,
    "trainable_parameters": None,
    "test_score": None,
    "test_items": None,
}


class FinetuneFolder:
    """One run. Change `manifest`, then `write()`."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._directory = RunDirectory(path, manifest)

    @classmethod
    def create(
        cls,
        path: Path,
        config: FinetuneConfig,
        device_kind: str,
        threads: int,
        processes: int,
        examples: Mapping[str, Any],
    ) -> FinetuneFolder:
        """A new run in the folder `path`; RunDirectoryError where something is in it, or it can't be written."""
        if path.is_dir() and has_files(path):
            raise RunDirectoryError(
                f"{path}: expected a new or empty folder, this one has files in it; --resume continues the run in it, "
                "another --out starts a new one"
            )
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "perfbench_version": __version__,
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "finished_at": None,
            "config": config.to_json(),
            "environment": environment.collect(device_kind, threads),
            "plugins": method_plugins.as_json(),
            "processes": processes,
            "examples": dict(examples),
            "seeds": {str(seed): dict(PENDING) for seed in config.seeds},
            "test": None,
        }
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirectoryError(f"{path}: can't be made ({error.strerror}); choose another --out") from None
        folder = cls(path, manifest)
        folder.write()
        return folder

    @classmethod
    def open(cls, path: Path) -> FinetuneFolder:
        """The run in the folder `path`; RunDirectoryError where there is none, or one of another kind."""
        file = path / MANIFEST
        try:
            manifest = strict_json.parse(file.read_bytes())
        except OSError as error:
            raise RunDirectoryError(f"{file}: can't be read ({error.strerror}); run without --resume") from None
        except ValueError as error:
            raise RunDirectoryError(f"{file}: not valid JSON ({error}); run with another --out") from None
        kind = manifest.get("kind", "run") if isinstance(manifest, dict) else "none"
        if kind != KIND:
            raise RunDirectoryError(f"{path}: expected a fine-tuning run, got kind {kind!r}; choose another --out")
        if problem := problem_of_finetune(manifest):
            raise RunDirectoryError(f"{file}: {problem}; restore the file or run with another --out")
        return cls(path, manifest)

    def check_same(self, config: FinetuneConfig, processes: int) -> None:
        """RunDirectoryError, naming the first field, where the run here is one of another configuration."""
        old = self.manifest["config"] | {"processes": self.manifest["processes"]}
        new = config.to_json() | {"processes": processes}
        for field in sorted({*old, *new}):
            if old.get(field) != new.get(field):
                raise RunDirectoryError(
                    f"{self.path}: holds a run with {field} {json.dumps(old.get(field))}, not "
                    f"{json.dumps(new.get(field))}; give it the same configuration, or another --out"
                )

        if self.manifest["seeds"].keys() != {str(seed) for seed in config.seeds}:
            found = ", ".join(self.manifest["seeds"]) or "none"
            wanted = ", ".join(map(str, config.seeds))
            raise RunDirectoryError(
                f"{self.path / MANIFEST}: seeds: expected those of its configuration, {wanted}, got {found}; restore "
                "the file or run with another --out"
            )

    def write(self) -> None:
        """Puts `manifest` in the place of run.json, as a whole or not at all."""
        self._directory.write_manifest()

    def append(self, sample: dict[str, Any]) -> None:
        """Appends one whole line to samples.jsonl."""
        self._directory.append_line(sample)

    def samples(self) -> list[dict[str, Any]]:
        """Every whole line of samples.jsonl."""
        file = self._directory.samples_path
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                sample = strict_json.parse(line)
                if not (isinstance(sample["seed"], int) and isinstance(sample["step"], int)):
                    raise ValueError("expected integers as seed and step")
            except (ValueError, KeyError, TypeError) as error:
                raise RunDirectoryError(f"{file}:{number}: not a sample ({error}); delete that line") from None
            found.append(sample)
        return found

    def cut_samples(self, seed: int, after_step: int) -> None:
        """Drops the samples that `seed` wrote after the step it goes on from: it will write them again."""
        kept = [one for one in self.samples() if one["seed"] != seed or one["step"] <= after_step]
        file = self._directory.samples_path
        if not file.exists():
            return
        temporary = file.with_name(f".{file.name}.tmp")
        with temporary.open("wb") as out:
            out.write(b"".join(json.dumps(one).encode() + b"\n" for one in kept))
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
        self._directory.samples_replaced()
