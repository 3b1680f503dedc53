"""`perfbench accuracy`: trains what is not trained yet, asks every test item on every path, judges, writes the page."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from perfbench.errors import FinetuneError
from perfbench.files.whole import write
from perfbench.finetune import small_backbone
from perfbench.finetune.accuracy import forgetting, verdict_page
from perfbench.finetune.accuracy.accuracy_config import AccuracyConfig, Entry
from perfbench.finetune.accuracy.accuracy_folder import PAGE, AccuracyFolder
from perfbench.finetune.accuracy.evaluate import Setting, TaskData, evaluate_served, evaluate_trained, steps
from perfbench.finetune.accuracy.paths import LeftOut, ServingPath, is_served, served
from perfbench.finetune.accuracy.serve import questions, with_plan
from perfbench.finetune.accuracy.train import train
from perfbench.finetune.accuracy.verdict import Verdict
from perfbench.finetune.recipe import check_against_backbone
from perfbench.finetune.tasks.registry import find, load_splits
from perfbench.finetune.tasks.task import Example, Split, Task
from perfbench.machine.device import device_kind
from perfbench.methods.plan import plan_bytes
from perfbench.methods.shape import BackboneShape
from perfbench.progress import RunProgress
from perfbench.runtimes import backbone as backbones
from perfbench.spec.backbone_config import find_config


def execute(
    config: AccuracyConfig, out: Path, *, resume: bool, run: Path | None = None, console: Console | None = None
) -> tuple[AccuracyFolder, Verdict]:
    """All that is not done yet in the run folder `out`; `run`: a `perfbench run` directory whose arms have these
    methods, for the page.

    TaskError, BackboneError, FinetuneError, AdapterError, RunDirectoryError, before anything is trained where that is
    possible; what was done stays.
    """
    console = console or Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    measured = verdict_page.read_run(run, {entry.config.method for entry in config.entries}) if run else None
    common = config.common
    kind, _ = device_kind(common.device)
    name = small_backbone.resolve(common.backbone, console)
    for entry in config.entries:  # found out now, and not when its turn comes after hours of the others' training
        check_against_backbone(entry.config, name)
    backbone_config = find_config(name)
    tokenizer = backbones.tokenizer_of(name)
    examples = _read_examples(config, tokenizer, BackboneShape.of_config(backbone_config).context)
    other = config.forgetting
    elsewhere = None if other is None else forgetting.read(other, tokenizer, common.max_tokens)
    if resume:
        folder = AccuracyFolder.open(out)
        folder.check_same(config)
        folder.drop_unfinished()
    else:
        folder = AccuracyFolder.create(out, config, kind, torch.get_num_threads())
    asked = list(served(config.serving, backbone_config, kind))
    paths = [path for path in asked if isinstance(path, ServingPath)]
    folder.manifest["left_out"] = [asdict(path) for path in asked if isinstance(path, LeftOut)]
    for path in folder.manifest["left_out"]:
        console.print(f"left out: {path['id']}: {path['reason']}")
    data = [TaskData(task, *examples[task], train(task, config, folder, console)) for task in config.tasks]
    _describe(data, folder, BackboneShape.of_config(backbone_config))
    setting = Setting(name, kind, common.dtype, tokenizer, config.serving.requests, common.beams, elsewhere)
    with RunProgress(steps(data, paths, setting), console) as progress:
        logits = evaluate_trained(data, setting, folder, progress)
        gc.collect()
        evaluate_served(data, paths, logits, setting, folder, progress)
    verdict = folder.judge()
    folder.manifest["verdict"] = verdict.to_json()
    folder.manifest["finished_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    folder.write()
    write(out / PAGE, verdict_page.render(folder.manifest, verdict, measured).encode())
    return folder, verdict


def _read_examples(
    config: AccuracyConfig, tokenizer: Any, context: int
) -> dict[str, tuple[Task, dict[Split, list[Example]]]]:
    """Task label -> the task, its dev and test examples. TaskError for what can't be asked, before anything is
    trained."""
    found = {}
    for entry in _first_of_each_task(config):
        source = entry.config.task
        task = find(source.name, source.metric)
        counts: dict[Split, int | None] = {"dev": source.dev_examples, "test": source.test_examples}
        if source.test_examples == 0:
            raise FinetuneError(f"tasks: {entry.task}: expected test examples to judge by, got test_examples 0")
        limits = {split: count for split, count in counts.items() if count is not None}
        splits = load_splits(task, source.source, limits=limits)
        for split in counts:
            questions(task, splits[split], tokenizer, context)
        found[entry.task] = (task, splits)
    return found


def _first_of_each_task(config: AccuracyConfig) -> Sequence[Entry]:
    return [next(entry for entry in config.entries if entry.task == task) for task in config.tasks]


def _describe(data: Sequence[TaskData], folder: AccuracyFolder, shape: BackboneShape) -> None:
    """Bytes of one adapter as it is stored in a bank in 16 bits, for those that are served. AdapterError where a
    folder can't be served: before the long part."""
    for one in data:
        for tenant in one.tenants:
            facts = folder.manifest["adapters"][one.label][tenant.label][str(tenant.seed)]
            plan = with_plan(tenant, shape).plan if is_served(tenant.method) else None
            facts["method"] = tenant.method
            facts["bytes_per_tenant_16_bit"] = None if plan is None else plan_bytes(plan, torch.bfloat16)
