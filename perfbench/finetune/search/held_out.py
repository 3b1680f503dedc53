"""The held-out examples as batches: what every score is measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from perfbench.errors import FinetuneError
from perfbench.finetune.encoding import Collator, Encoded, encode_split
from perfbench.finetune.finetune_config import FinetuneConfig
from perfbench.finetune.search.evaluate import Batch
from perfbench.finetune.tasks.registry import find, load_splits
from perfbench.finetune.tasks.task import Split
from perfbench.spec.backbone_config import shape_of


@dataclass(frozen=True)
class HeldOut:
    """batches: examples of about one length side by side; left_out: how many are longer than max_tokens."""

    batches: Sequence[Batch]
    examples: int
    answer_tokens: int
    left_out: int
    sha256: str

    def summary(self) -> dict[str, Any]:
        """The counts, and the hash of the tokens."""
        return {key: value for key, value in vars(self).items() if key != "batches"}


def read(config: FinetuneConfig, name: str, tokenizer: Any, rows: int, device: torch.device) -> HeldOut:
    """The dev split of the configured task in batches of `rows` examples, encoded for the backbone `name`.

    TaskError for data that can't be used, with file and record; FinetuneError for max_tokens past the context.
    """
    context = shape_of(name).context
    if config.max_tokens > context:
        raise FinetuneError(f"max_tokens: expected at most {context}, the context of {name}, got {config.max_tokens}")
    task = find(config.task.name, config.task.metric)
    limits: dict[Split, int] = {} if config.task.dev_examples is None else {"dev": config.task.dev_examples}
    encoded, left_out = encode_split(
        load_splits(task, config.task.source, ("dev",), limits)["dev"],
        tokenizer,
        end=task.kind == "generate",
        max_tokens=config.max_tokens,
        leave_out=config.too_long == "leave-out",
    )
    return of(encoded, rows, device, left_out)


def of(encoded: Sequence[Encoded], rows: int, device: torch.device, left_out: int = 0) -> HeldOut:
    """Encoded examples in batches. Sorted by length, so that little is computed on padding."""
    ordered = sorted(encoded, key=lambda one: (len(one.ids), one.ids))
    collate = Collator(pad_id=0)  # padding stands after all that counts: which token it is makes no difference
    batches, digest = [], hashlib.sha256()
    for start in range(0, len(ordered), rows):
        made = collate(ordered[start : start + rows])
        batches.append(Batch(made["input_ids"].to(device), made["labels"].to(device)))
        for one in ordered[start : start + rows]:
            digest.update(repr((one.prompt_tokens, one.ids)).encode())
    tokens = sum(int(batch.answer_tokens().sum()) for batch in batches)
    return HeldOut(batches, len(ordered), tokens, left_out, digest.hexdigest())
