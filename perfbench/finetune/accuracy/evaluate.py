"""Every test item on every path: first as trained, then through each arm that serves."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from perfbench.finetune import trained
from perfbench.finetune.accuracy import forgetting
from perfbench.finetune.accuracy.accuracy_config import ZERO_SHOT
from perfbench.finetune.accuracy.accuracy_folder import AccuracyFolder, Item
from perfbench.finetune.accuracy.identity import NONE, judge, probe
from perfbench.finetune.accuracy.paths import ServingPath, as_trained, is_served
from perfbench.finetune.accuracy.serve import (
    AsTrained,
    Question,
    Tenant,
    ask_all,
    banks,
    probes,
    questions,
    serve,
    with_plan,
)
from perfbench.finetune.predict import predict
from perfbench.finetune.tasks.task import Example, Split, Task
from perfbench.finetune.tasks.task_metrics import METRICS
from perfbench.progress import RunProgress
from perfbench.runtimes import backbone as backbones
from perfbench.runtimes.backbone import Backbone


@dataclass(frozen=True)
class TaskData:
    """A task under its label, what is asked of dev and test, and the trained adapters of every method and seed."""

    label: str
    task: Task
    examples: Mapping[Split, Sequence[Example]]
    tenants: Sequence[Tenant]

    @property
    def methods(self) -> tuple[str, ...]:
        """Labels of those that were trained, in order."""
        return tuple(dict.fromkeys(tenant.label for tenant in self.tenants))


@dataclass(frozen=True)
class Setting:
    """What all evaluations share. name: of the backbone, as it is loaded; device: such as `cuda`; elsewhere: another
    task's examples, on which forgetting shows."""

    name: str
    device: str
    dtype: str
    tokenizer: Any
    requests: int
    beams: int
    elsewhere: forgetting.Elsewhere | None = None

    def backbone(self, dtype: str) -> Backbone:
        """The backbone in `dtype`, afresh; what held another one before should be gone by now."""
        gc.collect()
        return backbones.load(self.name, dtype, self.device, seed=0)


Logits = dict[str, dict[str, torch.Tensor]]  # task -> tenant's name, or NONE -> logits on the probes


def evaluate_trained(
    data: Sequence[TaskData], setting: Setting, folder: AccuracyFolder, progress: RunProgress
) -> Logits:
    """Answers of the bare backbone and of every adapter as trained, one tenant at a time, to dev and test items that
    are not there yet; and the logits, on a few probes, of those that can be served, to know them again by."""
    path = as_trained(setting.dtype)
    backbone = setting.backbone(setting.dtype)
    found: Logits = {}
    for one in data:
        if not folder.is_done(one.label, path.id, ZERO_SHOT):
            progress.say(f"{one.label} {ZERO_SHOT}", "the bare backbone")
            model = backbone.skeleton()
            if setting.elsewhere and folder.manifest["forgetting"] is None:
                before = forgetting.loss(model, setting.tokenizer, setting.elsewhere, setting.requests)
                tokens = setting.elsewhere.tokens
                folder.manifest["forgetting"] = {"tokens": tokens, "loss_before": before}
            folder.add(list(_answers_of(model, one, Tenant(ZERO_SHOT, "", 0, Path()), path, setting)))
        progress.advance()
        asked = probes(one.task, one.examples["test"], setting.tokenizer)
        found[one.label] = probe(AsTrained(backbone.skeleton()), asked, {NONE: -1}, backbone)
        for method in one.methods:
            items: list[Item] = []
            done = folder.is_done(one.label, path.id, method)
            for tenant in (tenant for tenant in one.tenants if tenant.label == method):
                if done and not is_served(tenant.method):
                    continue
                progress.say(f"{one.label} {tenant.name}", "as trained")
                # What is never served may train the backbone's own weights: it gets some of its own, once the last
                # model has left its memory.
                model = None
                model = backbone.skeleton() if is_served(tenant.method) else setting.backbone(setting.dtype).model
                model = trained.load(model, tenant.folder)
                if is_served(tenant.method):
                    found[one.label] |= probe(AsTrained(model), asked, {tenant.name: 0}, backbone)
                if not done:
                    items += _answers_of(model, one, tenant, path, setting)
                    if setting.elsewhere:
                        facts = folder.manifest["adapters"][one.label][tenant.label][str(tenant.seed)]
                        after = forgetting.loss(model, setting.tokenizer, setting.elsewhere, setting.requests)
                        facts["loss_elsewhere"] = after
                progress.advance()
            if not done:
                folder.add(items)
    return found


def _answers_of(model: Any, one: TaskData, tenant: Tenant, path: ServingPath, setting: Setting) -> Iterator[Item]:
    splits: tuple[Split, ...] = ("dev", "test")
    for split in splits:
        examples = one.examples[split]
        given = predict(model, setting.tokenizer, one.task, examples, batch=setting.requests, beams=setting.beams)
        for example, prediction in zip(examples, given, strict=True):
            yield _item(one, tenant, path, split, example, prediction)


def evaluate_served(
    data: Sequence[TaskData],
    paths: Sequence[ServingPath],
    logits: Logits,
    setting: Setting,
    folder: AccuracyFolder,
    progress: RunProgress,
) -> None:
    """Answers of every adapter that can be served, all tenants of a task mixed, on each path where they are not there
    yet; and whether each tenant was served its own adapter."""
    for dtype in dict.fromkeys(path.dtype for path in paths):
        backbone = None
        for path in (path for path in paths if path.dtype == dtype):
            for one in data:
                tenants = [tenant for tenant in one.tenants if is_served(tenant.method)]
                if all(folder.is_done(one.label, path.id, tenant.label) for tenant in tenants):
                    progress.already(_batches(one, tenants, setting))
                    continue
                backbone = backbone or setting.backbone(dtype)
                progress.say(f"{one.label} {path.id}", f"{len(tenants)} tenants mixed")
                _serve_all(one, tenants, path, logits[one.label], backbone, setting, folder, progress)


def _serve_all(
    one: TaskData,
    tenants: Sequence[Tenant],
    path: ServingPath,
    trained_logits: Mapping[str, torch.Tensor],
    backbone: Backbone,
    setting: Setting,
    folder: AccuracyFolder,
    progress: RunProgress,
) -> None:
    """All tenants of one task on one path, in as few banks as can hold them."""
    items: list[Item] = []
    identities: dict[str, dict[str, Any]] = {}
    examples = {example.id: example for example in one.examples["test"]}
    exact = path.must_equal(as_trained(setting.dtype))
    for group in banks([with_plan(tenant, backbone.shape) for tenant in tenants]):
        arm, slots = serve(path, backbone, group)
        try:
            asked = probes(one.task, one.examples["test"], setting.tokenizer)
            named = {tenant.name: slot for tenant, slot in zip(group, slots, strict=True)}
            served = probe(arm, asked, named, backbone)
            for method in dict.fromkeys(tenant.label for tenant in group):
                own = [tenant.name for tenant in group if tenant.label == method]
                identities[method] = asdict(judge(served, trained_logits, own, exact=exact))
            predicted = ask_all(
                arm, one.task, _questions(one, setting, backbone), slots, backbone, setting.tokenizer,
                requests=setting.requests, beams=setting.beams, advance=progress.advance,
            )  # fmt: skip
        finally:
            arm.close()
        for (index, identifier), prediction in predicted.items():
            items.append(_item(one, group[index], path, "test", examples[identifier], prediction))
    folder.add(items, identities)


def _questions(one: TaskData, setting: Setting, backbone: Backbone) -> list[Question]:
    return questions(one.task, one.examples["test"], setting.tokenizer, backbone.shape.context)


def _item(one: TaskData, tenant: Tenant, path: ServingPath, split: str, example: Example, prediction: str) -> Item:
    return {
        "task": one.label,
        "method": tenant.label,
        "seed": tenant.seed,
        "split": split,
        "path": path.id,
        "id": example.id,
        "prediction": prediction,
        "score": float(METRICS[one.task.metric](prediction, example)),
    }


def steps(data: Sequence[TaskData], paths: Sequence[ServingPath], setting: Setting) -> int:
    """How often the two functions above move the progress bar."""
    found = 0
    for one in data:
        served = [tenant for tenant in one.tenants if is_served(tenant.method)]
        found += 1 + len(one.tenants) + len(paths) * _batches(one, served, setting)
    return found


def _batches(one: TaskData, tenants: Sequence[Tenant], setting: Setting) -> int:
    # What does not fit the context was refused before anything was trained.
    asked = questions(one.task, one.examples["test"], setting.tokenizer, sys.maxsize)
    return -(-len(tenants) * len(asked) // setting.requests)
