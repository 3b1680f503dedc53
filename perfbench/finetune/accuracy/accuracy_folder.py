"""An accuracy run on disk.

OUT/accuracy.json         configuration, environment, adapters, which paths are done, the verdict
OUT/items.jsonl           every answer: task, method, seed, split, path, id, prediction, score; read too where it was
                          packed to items.jsonl.gz
OUT/<task>/<method>/      a fine-tuning run (perfbench.finetune.finetune_folder)
OUT/<task>/<method>.sweep/<learning rate>/   one of the first seed, where several rates are tried
OUT/index.html            the page
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perfbench import __version__
from perfbench.errors import RunDirectoryError
from perfbench.files import strict_json
from perfbench.files.run_lock import has_files
from perfbench.files.whole import write
from perfbench.files.yaml_source import dotted
from perfbench.finetune.accuracy.accuracy_config import AccuracyConfig
from perfbench.finetune.accuracy.accuracy_schema import ACCURACY
from perfbench.finetune.accuracy.paths import as_trained
from perfbench.finetune.accuracy.verdict import Verdict, judge
from perfbench.machine import environment
from perfbench.run_folder.run_directory import ACCURACY_MANIFEST as MANIFEST
from perfbench.spec import method_plugins
from perfbench.spec.scenario_schema import problems

KIND, SCHEMA_VERSION = "accuracy", 1
ITEMS, PAGE = "items.jsonl", "index.html"

Item = dict[str, Any]


class AccuracyFolder:
    """One run. Change `manifest`, then `write()`; `add` the items of a path when all of them are there."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest

    @classmethod
    def create(cls, path: Path, config: AccuracyConfig, device_kind: str, threads: int) -> AccuracyFolder:
        """A new run in `path`, a new or empty folder. RunDirectoryError where it is neither."""
        if path.exists() and (not path.is_dir() or has_files(path)):
            what = "has files in it" if path.is_dir() else "is a file"
            raise RunDirectoryError(
                f"{path}: expected a new or empty folder, this one {what}; --resume continues the run in it, "
                "another --out starts a new one"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirectoryError(f"{path}: can't be made ({error.strerror}); give another --out") from None
        manifest = {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "perfbench_version": __version__,
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "finished_at": None,
            "name": config.name,
            "question": config.question,
            "config": resolved(config),
            "environment": environment.collect(device_kind, threads),
            "plugins": method_plugins.as_json(),
            "adapters": {},
            "sweeps": {},
            "forgetting": None,
            "left_out": [],
            "paths": {},
            "verdict": None,
        }
        folder = cls(path, manifest)
        folder.write()
        return folder

    @classmethod
    def open(cls, path: Path) -> AccuracyFolder:
        """The run in `path`. RunDirectoryError where there is none that can be read."""
        file = path / MANIFEST
        try:
            manifest = strict_json.parse(file.read_bytes())
        except FileNotFoundError:
            what = f"not an accuracy run, it has no {MANIFEST}" if path.is_dir() else "no such folder"
            raise RunDirectoryError(f"{path}: {what}; give the folder that `perfbench accuracy` wrote") from None
        except OSError as error:
            raise RunDirectoryError(f"{file}: can't be read ({error.strerror}); check its permissions") from None
        except ValueError as error:
            raise RunDirectoryError(f"{file}: not valid JSON ({error}); run again with another --out") from None
        version = manifest.get("schema_version") if isinstance(manifest, dict) else None
        if version != SCHEMA_VERSION or manifest.get("kind") != KIND:
            raise RunDirectoryError(f"{file}: expected an accuracy run of schema {SCHEMA_VERSION}; give another --out")
        for problem in problems(manifest, ACCURACY):
            raise RunDirectoryError(f"{file}: {dotted(problem.place)}: {problem.message}; give another --out")
        return cls(path, manifest)

    def check_same(self, config: AccuracyConfig) -> None:
        """RunDirectoryError, naming the first field, where this is a run of another configuration."""
        old, new = self.manifest["config"], resolved(config)
        for field in sorted({*old, *new}):
            if old.get(field) != new.get(field):
                raise RunDirectoryError(
                    f"{self.path}: holds a run with {field} {_short(old.get(field))}, not {_short(new.get(field))}; "
                    "give it the same configuration, or another --out"
                )

    def write(self) -> None:
        """Puts `manifest` in the place of accuracy.json, as a whole or not at all."""
        text = json.dumps(self.manifest, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        write(self.path / MANIFEST, text.encode())

    def is_done(self, task: str, path: str, method: str) -> bool:
        """Whether every answer of this method, with every seed, on this path is there."""
        return method in self.manifest["paths"].get(task, {}).get(path, {})

    def add(self, items: Sequence[Item], identities: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Appends all items of some methods on one path of one task, then notes that they are done; `identities`:
        method -> whose logits were served."""
        lines = [json.dumps(item, allow_nan=False, ensure_ascii=False).encode() + b"\n" for item in items]
        try:
            with (self.path / ITEMS).open("ab") as file:
                file.write(b"".join(lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            reason = f"can't be written ({error.strerror}); free some space and go on with --resume"
            raise RunDirectoryError(f"{self.path / ITEMS}: {reason}") from None
        for (task, path, method), count in Counter(map(_place, items)).items():
            paths = self.manifest["paths"].setdefault(task, {})
            paths.setdefault(path, {})[method] = {"items": count, "identity": (identities or {}).get(method)}
        self.write()

    def items(self) -> list[Item]:
        """The items of every path that is done. RunDirectoryError, with its line, where one is not readable or
        where a path has another number of them than was noted."""
        file = self.path / ITEMS
        found: list[Item] = []
        lines = self._answers().split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                item = strict_json.parse(line)
                if self.is_done(*_place(item)):
                    found.append(item)
            except (ValueError, KeyError, TypeError):
                if number == len(lines):
                    break  # torn by a kill: its path was not noted as done
                raise RunDirectoryError(f"{file}:{number}: not an item; run again with another --out") from None
        counted = Counter(map(_place, found))
        for task, paths in self.manifest["paths"].items():
            for path, methods in paths.items():
                for method, facts in methods.items():
                    if counted[task, path, method] != facts["items"]:
                        got = f"got {counted[task, path, method]}; run again with another --out"
                        raise RunDirectoryError(
                            f"{file}: expected {facts['items']} items of {task} {path} {method}, {got}"
                        )
        return found

    def _answers(self) -> bytes:
        """What items.jsonl holds; empty where there is none. RunDirectoryError where a packed one is damaged."""
        file, packed = self.path / ITEMS, self.path / f"{ITEMS}.gz"
        if file.exists():
            return file.read_bytes()
        try:
            return gzip.decompress(packed.read_bytes()) if packed.exists() else b""
        except (OSError, EOFError, zlib.error) as error:
            raise RunDirectoryError(f"{packed}: can't be unpacked ({error}); restore the file") from None

    def judge(self) -> Verdict:
        """The verdict on every answer that is here. RunDirectoryError as `items`, and where not all are here yet."""
        config, paths = self.manifest["config"], self.manifest["paths"]
        trained_path = as_trained(config["entries"][0]["finetune"]["dtype"])
        anchors: dict[str, str] = {}
        identities = {}
        for task, done in paths.items():
            # In fp32 all must agree: with the trained model where that is fp32, else with the first that is served so.
            fp32 = [path for path in (trained_path.id, *done) if path.endswith("-fp32")]
            anchors |= {path: fp32[0] for path in fp32[1:] if path != fp32[0]}
            for path, methods in done.items():
                for method, facts in methods.items():
                    identities[task, path, method] = facts["identity"] or {}
        tasks, methods = (list(dict.fromkeys(one[key] for one in config["entries"])) for key in ("task", "method"))
        for task in tasks:
            known = self.manifest["adapters"].get(task, {})
            there = [one["method"] for one in config["entries"] if one["task"] == task and known.get(one["method"])]
            if missing := [one for one in methods if one not in there or not self.is_done(task, trained_path.id, one)]:
                why = f"{task}: {', '.join(missing)} did not answer yet; go on with perfbench accuracy --resume"
                raise RunDirectoryError(f"{self.path}: not finished: {why}")
        return judge(
            self.items(),
            tasks=tasks,
            methods=methods,
            reference=config["reference"],
            margin=config["margin"],
            trained_path=trained_path.id,
            anchors=anchors,
            identities=identities,
        )

    def drop_unfinished(self) -> None:
        """Rewrites items.jsonl with the paths that are done: a kill leaves some of one that is not."""
        kept = [json.dumps(item, ensure_ascii=False).encode() + b"\n" for item in self.items()]
        if kept or (self.path / ITEMS).exists():
            write(self.path / ITEMS, b"".join(kept))


def _place(item: Item) -> tuple[str, str, str]:
    return item["task"], item["path"], item["method"]


def resolved(config: AccuracyConfig) -> dict[str, Any]:
    """What decides the outcome, as plain JSON data."""
    data: dict[str, Any] = json.loads(
        json.dumps(
            {
                "reference": config.reference,
                "margin": config.margin,
                "serve": vars(config.serving),
                "forgetting": config.forgetting and vars(config.forgetting),
                "entries": [
                    {
                        "method": entry.method,
                        "task": entry.task,
                        "learning_rates": entry.learning_rates,
                        "finetune": entry.config.to_json(),
                    }
                    for entry in config.entries
                ],
            }
        )
    )
    return data


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
