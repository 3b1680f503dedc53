"""Where the trained adapters of the tenants lie: in the folders that PEFT, a Trainer or perfbench's training writes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from perfbench.errors import AdapterError
from perfbench.files import strict_json
from perfbench.files.paths import expanded
from perfbench.methods.checkpoints.adapter_folder import CONFIG
from perfbench.methods.registry import METHODS
from perfbench.run_folder.run_directory import MANIFEST, is_finetune

_CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})")


def adapter_folders(given: str | Sequence[str], method: str, resident: int) -> list[Path]:
    """The checkpoint folders of the first `resident` tenants of an arm of `method`, in the order of `all_folders`.

    AdapterError where there are fewer, with what was looked for.
    """
    found = all_folders(given, method)
    if len(found) < resident:
        shown = given if isinstance(given, str) else ", ".join(given)
        there = f" ({', '.join(map(str, found[:4]))}{', ...' if len(found) > 4 else ''})" if found else ""
        raise AdapterError(
            f"{shown}: {resident} resident tenants need as many adapter folders, found {len(found)}{there}; looked for "
            f"{CONFIG} in the folder itself and in those in it, and for what `perfbench finetune` (seed*/adapter) and "
            f"`perfbench accuracy` (TASK/METHOD/seed*/adapter) write"
        )
    return found[:resident]


def all_folders(given: str | Sequence[str], method: str) -> list[Path]:
    """Every adapter folder that an arm of `method` can take from the folder, or from each folder of the list, `given`.

    Of a run of `perfbench finetune` the adapter of each seed, of one of `perfbench accuracy` those of this method,
    task by task. Of any other folder the adapter that lies in it, then those in its sub-folders: numbers in names
    count as numbers, and of a Trainer's checkpoint-N the latest is the first. AdapterError where a run has adapters
    of other methods only.
    """
    return [folder for one in ([given] if isinstance(given, str) else given) for folder in _of_one(one, method)]


def _of_one(given: str, method: str) -> list[Path]:
    root = expanded(given)
    runs = [root] if is_finetune(root) else [p.parent for p in _sorted(root.glob(f"*/*/{MANIFEST}"))]
    trained = {folder: _method_of(folder) for folder in runs if is_finetune(folder)}
    if not trained:
        return [p.parent for p in (root / CONFIG, *_sorted(root.glob(f"*/{CONFIG}"))) if p.is_file()]
    same_module = {name for name, known in METHODS.items() if known.module == METHODS[method].module}
    fitting = [folder for folder, own in trained.items() if own in same_module]
    if not fitting:
        there = ", ".join(sorted(set(trained.values())))
        raise AdapterError(f"{given}: a training of {there}, expected one of {method}; give an arm of what was trained")
    return [p.parent for folder in fitting for p in _sorted(folder.glob(f"seed*/adapter/{CONFIG}"))]


def _method_of(run: Path) -> str:
    """What a run of `perfbench finetune` has trained."""
    return str(strict_json.parse((run / MANIFEST).read_bytes()).get("config", {}).get("method"))


def _sorted(paths: Iterator[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: [_key(part) for part in path.parts])


def _key(name: str) -> tuple[str | int, ...]:
    if match := _CHECKPOINT.fullmatch(name):
        return ("checkpoint-", -int(match[1]))
    parts = re.split(r"(\d{1,18})", name)  # text and numbers take turns, so that like is compared with like
    return tuple(int(part) if place % 2 else part for place, part in enumerate(parts))
