"""A user's own task: JSON lines of `prompt` and `answer`, and a metric's name in the configuration.

source: one file, of which a tenth each becomes dev and test; or a folder with train.jsonl, dev.jsonl and test.jsonl.
A prompt ends and an answer begins exactly as written: where a blank belongs between them, one of them has it.
"""

from __future__ import annotations

from pathlib import Path

from perfbench.errors import TaskError
from perfbench.finetune.tasks.records import Record, find_file, is_local, read_jsonl
from perfbench.finetune.tasks.splits import hold_out
from perfbench.finetune.tasks.task import Example, Split, Task


def load(source: str, split: Split) -> list[Example]:
    """Examples of a split; TaskError names file and record. `references`, a list, stands for more than one answer."""
    if not is_local(source):
        raise TaskError(f"{source}: no such file or folder; expected JSON lines of prompt and answer")
    if Path(source).is_dir():
        return [_example(record) for record in read_jsonl(find_file(source, f"{split}.jsonl"))]
    examples = [_example(record) for record in read_jsonl(Path(source))]
    if len(examples) < 3:
        raise TaskError(f"{source}: expected at least 3 records to make train, dev and test of, got {len(examples)}")
    tenth = max(1, len(examples) // 10)
    rest, test = hold_out(examples, tenth)
    train, dev = hold_out(rest, tenth)
    return {"train": train, "dev": dev, "test": test}[split]


def _example(record: Record) -> Example:
    prompt, answer = record.text("prompt"), record.text("answer")
    references = record.fields.get("references", [answer])
    if not isinstance(references, list) or not references or not all(isinstance(text, str) for text in references):
        raise TaskError(f"{record.where}: references: expected a list of one text or more")
    return Example(record.id, prompt, answer, tuple(references), where=record.where)


TASK = Task(
    "own",
    "your own JSON lines of prompt and answer, with a metric of your choice",
    "generate",
    "exact_match",
    load,
    new_tokens=128,
)
