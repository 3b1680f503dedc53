"""What `perfbench evaluate --served` adds: the same adapters as tenants of one mixed batch, asked the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from perfbench.errors import AdapterError
from perfbench.finetune.accuracy.identity import Identity, judge, probe
from perfbench.finetune.accuracy.paths import ServingPath
from perfbench.finetune.accuracy.serve import Tenant, ask_all, banks, probes, questions, serve, with_plan
from perfbench.finetune.tasks.task import Example, Task
from perfbench.methods.checkpoints import adapter_folder
from perfbench.methods.registry import reader_of
from perfbench.runtimes.backbone import Backbone


def tenants_of(adapters: Sequence[str], backbone: Backbone) -> list[Tenant]:
    """The adapters in the folders, ready for a bank. AdapterError for one that no bank can hold."""
    found = []
    for folder in adapters:
        described = adapter_folder.describe(Path(folder))
        method = reader_of(described)
        if method is None:
            kind = described.get("peft_type")
            raise AdapterError(f"{folder}: an adapter of type {kind} is never served here; leave out --served")
        found.append(with_plan(Tenant(folder, method, 0, Path(folder)), backbone.shape))
    return found


def served_predictions(
    path: ServingPath,
    tenants: Sequence[Tenant],
    task: Task,
    examples: Sequence[Example],
    backbone: Backbone,
    tokenizer: Any,
    trained_logits: Mapping[str, torch.Tensor],
    *,
    batch: int,
    beams: int,
) -> dict[str, tuple[list[str], Identity]]:
    """Folder -> the prediction of each example, served on `path` in mixed batches of `batch` requests; and whether the
    adapter that answered is its own, by `trained_logits` on the probes: of each folder, and of NONE."""
    found: dict[str, tuple[list[str], Identity]] = {}
    asked = questions(task, examples, tokenizer, backbone.shape.context)
    for group in banks(tenants):
        arm, slots = serve(path, backbone, group)
        try:
            slot_of = {tenant.label: slot for tenant, slot in zip(group, slots, strict=True)}
            logits = probe(arm, probes(task, examples, tokenizer), slot_of, backbone)
            own = ask_all(arm, task, asked, slots, backbone, tokenizer, requests=batch, beams=beams)
        finally:
            arm.close()
        for index, tenant in enumerate(group):
            identity = judge(logits, trained_logits, [tenant.label], exact=path.dtype == "fp32")
            found[tenant.label] = [own[index, example.id] for example in examples], identity
    return found
