"""The training that a verdict is about: every method of a task with every seed, after a sweep of learning rates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from perfbench.errors import AdapterError, RunDirectoryError
from perfbench.finetune.accuracy.accuracy_config import AccuracyConfig, Entry
from perfbench.finetune.accuracy.accuracy_folder import AccuracyFolder
from perfbench.finetune.accuracy.serve import Tenant
from perfbench.finetune.finetune_config import FinetuneConfig
from perfbench.finetune.recipe import SeedResult, finetune
from perfbench.finetune.trainer import NotFinite
from perfbench.methods.checkpoints.adapter_folder import WEIGHTS

SWEEP = ".sweep"  # after a method's label: a folder for each learning rate


def train(task: str, config: AccuracyConfig, folder: AccuracyFolder, console: Console) -> tuple[Tenant, ...]:
    """Every method of the task with every seed, those that are trained already as they are; notes what is known of each
    adapter. RunDirectoryError where an adapter is not the one that gave the answers which are there."""
    tenants = []
    for entry in (entry for entry in config.entries if entry.task == task):
        results = _sweep(entry, folder, console) if entry.learning_rates else _all_seeds(entry, folder, console)
        for rate, result in results:
            seed_facts = {key: value for key, value in vars(result).items() if key not in ("seed", "adapter")}
            facts = {"sha256": _fingerprint(result.adapter), "learning_rate": rate, **seed_facts}
            _note(folder, task, entry.method, result.seed, facts)
            tenants.append(Tenant(entry.method, entry.config.method, result.seed, result.adapter))
    folder.write()
    return tuple(tenants)


def _all_seeds(entry: Entry, folder: AccuracyFolder, console: Console) -> list[tuple[float, SeedResult]]:
    out = folder.path / entry.task / entry.method
    results = _finetune(entry.config, out, f"{entry.task}: {entry.method}", console)
    return [(entry.config.learning_rate, result) for result in results]


def _sweep(entry: Entry, folder: AccuracyFolder, console: Console) -> list[tuple[float, SeedResult]]:
    """The first seed with each learning rate, then the others with the one that had the lowest dev loss.

    NotFinite where the loss of all of them stopped being finite.
    """
    first, *others = entry.config.seeds
    out = folder.path / entry.task / entry.method
    found: dict[float, SeedResult] = {}
    failed: NotFinite | None = None
    for rate in entry.learning_rates:
        one = replace(entry.config, learning_rate=rate, seeds=(first,))
        what = f"{entry.task}: {entry.method} with learning rate {rate:g}"
        try:
            (found[rate],) = _finetune(one, out.with_name(out.name + SWEEP) / f"{rate:g}", what, console)
        except NotFinite as error:
            console.print(f"{what}: {error}")
            failed = error
    losses = {f"{rate:g}": found[rate].best_dev_loss if rate in found else None for rate in entry.learning_rates}
    folder.manifest["sweeps"].setdefault(entry.task, {})[entry.method] = losses
    if not found:
        assert failed is not None
        raise failed
    best = min(found, key=lambda rate: found[rate].best_dev_loss)
    results = [(best, found[best])]
    if others:
        rest = replace(entry.config, learning_rate=best, seeds=tuple(others))
        results += [(best, result) for result in _finetune(rest, out, f"{entry.task}: {entry.method}", console)]
    return results


def _finetune(config: FinetuneConfig, out: Path, what: str, console: Console) -> Sequence[SeedResult]:
    started = (out / "run.json").exists()
    console.print(f"{what}: {'going on with' if started else 'training'} {len(config.seeds)} seeds")
    # The test set is asked afterwards, on every path.
    return finetune(replace(config, task=replace(config.task, test_examples=0)), out, resume=started, console=console)


def _note(folder: AccuracyFolder, task: str, method: str, seed: int, facts: dict[str, Any]) -> None:
    """What is known of an adapter. RunDirectoryError where it is not the one that gave the answers which are there."""
    seeds = folder.manifest["adapters"].setdefault(task, {}).setdefault(method, {})
    before = seeds.get(str(seed), facts)
    if before["sha256"] != facts["sha256"] and any(
        method in methods for methods in folder.manifest["paths"].get(task, {}).values()
    ):
        raise RunDirectoryError(
            f"{folder.path / task / method}: the adapter of seed {seed} is not the one that was judged here; "
            "run with another --out"
        )
    seeds[str(seed)] = before | facts


def _fingerprint(adapter: Path) -> str:
    """Of the weights. AdapterError where there are none."""
    file = adapter / WEIGHTS
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        reason = f"can't read the trained adapter ({error.strerror})"
        raise AdapterError(f"{file}: {reason}; remove {adapter.parent.parent} to train it again") from None
