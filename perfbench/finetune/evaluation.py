"""`perfbench evaluate`: a backbone, bare and with adapters of any origin, on the items of one task, as trained."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from perfbench import __version__
from perfbench.errors import RunDirectoryError
from perfbench.files.run_lock import has_files
from perfbench.files.whole import write
from perfbench.finetune import small_backbone, trained
from perfbench.finetune.accuracy.identity import NONE, probe
from perfbench.finetune.accuracy.paired_statistics import Paired, compare
from perfbench.finetune.accuracy.paths import ServingPath
from perfbench.finetune.accuracy.serve import AsTrained, probes
from perfbench.finetune.encoding import fits
from perfbench.finetune.evaluation_served import served_predictions, tenants_of
from perfbench.finetune.predict import predict
from perfbench.finetune.tasks.registry import find, load_splits
from perfbench.finetune.tasks.task import Example, Split, Task
from perfbench.finetune.tasks.task_metrics import METRICS
from perfbench.machine import environment
from perfbench.machine.device import device_kind
from perfbench.methods.checkpoints import adapter_folder
from perfbench.runtimes import backbone as backbones

MANIFEST, ITEMS = "evaluation.json", "items.jsonl"
BARE = "none"


@dataclass(frozen=True)
class Asked:
    """What is asked of each model: `examples` of `split` at most, all where it is None; `batch` rows of one call;
    `served`: the runtime that serves the adapters too, all mixed, "" for none."""

    backbone: str
    task: str
    source: str
    adapters: tuple[str, ...] = ()
    split: Split = "test"
    metric: str | None = None
    examples: int | None = None
    dtype: str = "fp32"
    device: str = "auto"
    batch: int = 8
    beams: int = 1
    served: str = ""


@dataclass(frozen=True)
class Result:
    """One model: `adapter` is its folder, BARE for the backbone alone; `sha256` of the weights; `path`: as trained, or
    how it was served; `score`: the mean of the task's metric; `versus`: the paired difference, over items, for this
    very adapter, as trained to the bare backbone and served to as trained; `changed`: how many served predictions are
    not as trained, and `identity`: whose adapter answered, by its logits; both None as trained."""

    adapter: str
    peft_type: str | None
    sha256: str | None
    path: str
    score: float
    items: int
    versus: Paired | None
    changed: int | None = None
    identity: dict[str, Any] | None = None

    @property
    def sound(self) -> bool:
        """Whether nothing says that it was served otherwise than it was trained."""
        exact = self.path.endswith("-fp32")
        return self.identity is None or (self.identity["status"] == "ok" and not (exact and self.changed))


def evaluate(asked: Asked, out: Path, say: Callable[[str], object] = print) -> list[Result]:
    """Answers of the bare backbone and of each adapter, judged; writes evaluation.json and items.jsonl to `out`, a new
    or empty folder, and says each result in words.

    TaskError, BackboneError, AdapterError, RunDirectoryError, before the first answer where that is possible.
    """
    if out.exists() and (not out.is_dir() or has_files(out)):
        raise RunDirectoryError(f"{out}: expected a new or empty folder; give another --out")
    task = find(asked.task, asked.metric)
    limits: dict[Split, int] = {} if asked.examples is None else {asked.split: asked.examples}
    examples = load_splits(task, asked.source, (asked.split,), limits)[asked.split]
    kinds = [adapter_folder.peft_type(Path(folder)) for folder in asked.adapters]
    kind, _ = device_kind(asked.device)
    loaded = backbones.load(small_backbone.resolve(asked.backbone), asked.dtype, kind, seed=0)
    tokenizer = loaded.tokenizer()
    for example in examples:
        fits(task, example, tokenizer, loaded.shape.context, leave_out=False)
    tenants = tenants_of(asked.adapters, loaded) if asked.served else []  # refused before the first answer
    results: list[Result] = []
    scores: dict[str, list[list[float]]] = {}
    trained_ones: dict[str, list[str]] = {}
    logits: dict[str, Any] = {}
    lines: list[str] = []
    for adapter, peft_type in zip((BARE, *asked.adapters), (None, *kinds), strict=True):
        gc.collect()
        # PEFT leaves the backbone's weights alone; what only perfbench knows may be weights of its own.
        model = copy.deepcopy(loaded.model) if peft_type == trained.OURS else loaded.skeleton()
        model = model if adapter == BARE else trained.load(model, Path(adapter))
        given = predict(model, tokenizer, task, examples, batch=asked.batch, beams=asked.beams)
        if tenants:
            named = {NONE if adapter == BARE else adapter: 0}
            logits |= probe(AsTrained(model), probes(task, examples, tokenizer), named, loaded)
        del model
        items = _items(asked, task, adapter, f"as-trained-{asked.dtype}", examples, given)
        lines += map(_line, items)
        scores[adapter], trained_ones[adapter] = [[item["score"]] for item in items], given
        versus = None if adapter == BARE else compare(scores[adapter], scores[BARE])
        results.append(_result(adapter, peft_type, items, versus))
        say(in_words(asked, task, results[-1]))
    if tenants:
        gc.collect()
        path = ServingPath(asked.served, "eager", asked.dtype)
        served = served_predictions(
            path, tenants, task, examples, loaded, tokenizer, logits, batch=asked.batch, beams=asked.beams
        )
        for adapter, peft_type in zip(asked.adapters, kinds, strict=True):
            answers, identity = served[adapter]
            items = _items(asked, task, adapter, path.id, examples, answers)
            lines += map(_line, items)
            versus = compare([[item["score"]] for item in items], scores[adapter])
            changed = sum(a != b for a, b in zip(answers, trained_ones[adapter], strict=True))
            results.append(
                replace(_result(adapter, peft_type, items, versus), changed=changed, identity=asdict(identity))
            )
            say(in_words(asked, task, results[-1]))
    manifest = {
        "kind": "evaluation",
        "schema_version": 1,
        "perfbench_version": __version__,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": asdict(asked),
        "metric": task.metric,
        "environment": environment.collect(kind, torch.get_num_threads()),
        "results": [asdict(result) for result in results],
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"{out}: can't be made ({error.strerror}); give another --out") from None
    write(out / ITEMS, "".join(lines).encode())
    write(out / MANIFEST, (json.dumps(manifest, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())
    return results


def _line(item: dict[str, Any]) -> str:
    return json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n"


def _result(adapter: str, peft_type: str | None, items: Sequence[dict[str, Any]], versus: Paired | None) -> Result:
    score = sum(item["score"] for item in items) / len(items)
    return Result(adapter, peft_type, _fingerprint(adapter), items[0]["path"], score, len(items), versus)


def _items(
    asked: Asked, task: Task, adapter: str, path: str, examples: Sequence[Example], given: Sequence[str]
) -> list[dict[str, Any]]:
    metric = METRICS[task.metric]
    return [
        {
            "task": asked.task,
            "adapter": adapter,
            "split": asked.split,
            "path": path,
            "id": example.id,
            "prediction": prediction,
            "score": float(metric(prediction, example)),
        }
        for example, prediction in zip(examples, given, strict=True)
    ]


def _fingerprint(adapter: str) -> str | None:
    """SHA-256 of the adapter's weights; None of none."""
    if adapter == BARE:
        return None
    return hashlib.sha256((Path(adapter) / adapter_folder.WEIGHTS).read_bytes()).hexdigest()


def in_words(asked: Asked, task: Task, result: Result) -> str:
    """Such as `copa: accuracy 58.0% of 50 test items, the bare backbone`."""
    text = f"{asked.task}: {task.metric} {result.score:.1%} of {result.items} {asked.split} items"
    if result.versus is None:
        return f"{text}, the bare backbone"
    found = result.versus
    if result.changed is not None:
        said = f"{text}, {result.adapter} served on {result.path}: {result.changed} predictions are not as trained"
        reason = (result.identity or {}).get("reason")
        return f"{said}; {reason}" if reason else said
    points = f"{found.difference * 100:+.1f} [{found.low * 100:+.1f}, {found.high * 100:+.1f}] points"
    return f"{text}, {result.adapter}: {points} to the bare backbone, for this very adapter"
