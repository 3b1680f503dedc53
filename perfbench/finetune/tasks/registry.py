"""Every task by name, and its examples, checked: no empty split, no id twice, no prompt of dev or test in train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from perfbench.errors import TaskError, nearest
from perfbench.finetune.tasks import boolq, copa, gsm8k, instructions, mmlu, own, skills, squad, text2sql
from perfbench.finetune.tasks.splits import refuse_leak, take
from perfbench.finetune.tasks.task import SPLITS, Example, Split, Task
from perfbench.finetune.tasks.task_metrics import METRICS

TASKS: dict[str, Task] = {
    "squad": squad.TASK,
    "boolq": boolq.TASK,
    "boolq-resplit": boolq.RESPLIT,
    "copa": copa.TASK,
    "gsm8k": gsm8k.TASK,
    "text2sql": text2sql.TASK,
    "mmlu": mmlu.TASK,
    "instructions": instructions.TASK,
    "own": own.TASK,
    "skills": skills.TASK,
}


def find(name: str, metric: str | None = None) -> Task:
    """The task `name`; `metric` is for `own` alone. TaskError on an unknown name of either."""
    if name == "mt_bench":
        raise TaskError("mt_bench has no metric of its own: `perfbench mtbench` writes its answers and has them judged")
    if name not in TASKS:
        raise TaskError(f"unknown task {name!r}; {nearest(name, TASKS)}")
    task = TASKS[name]
    if metric is None or metric == task.metric:
        return task
    if name != "own":
        raise TaskError(f"{name}: its metric is {task.metric}, not {metric}; only `own` takes one")
    if metric not in METRICS:
        raise TaskError(f"unknown metric {metric!r}; {nearest(metric, METRICS)}")
    return replace(task, metric=metric)


def load_splits(
    task: Task, source: str, splits: Sequence[Split] = SPLITS, limits: Mapping[Split, int] | None = None
) -> dict[Split, list[Example]]:
    """The examples of `splits`, at most `limits[split]` of each. TaskError where a split is empty, an id stands twice,
    or a prompt of dev or test is in train (looked for in the whole sets, before the limits)."""
    found: dict[Split, list[Example]] = {}
    for split in splits:
        found[split] = task.load(source, split)
        if not found[split]:
            raise TaskError(f"{source}: {task.name} has no record for {split}; expected one or more")
        _refuse_twice(found[split])
    if "train" in found:
        refuse_leak(found["train"], {split: examples for split, examples in found.items() if split != "train"})
    return {split: take(examples, (limits or {}).get(split, len(examples))) for split, examples in found.items()}


def _refuse_twice(examples: Sequence[Example]) -> None:
    places: dict[str, str] = {}
    for example in examples:
        if example.id in places:
            raise TaskError(f"{example.where}: the id {example.id!r} is that of {places[example.id]} too")
        places[example.id] = example.where
