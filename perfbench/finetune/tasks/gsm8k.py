"""GSM8K, the public stand-in for the papers' HSM10K: a word problem, worked out, and `#### ` before the final number.

Folder: train.jsonl and test.jsonl, as published. Hub: openai/gsm8k. Dev is 600 of train. The prompt is lm-eval's.
"""

from __future__ import annotations

from perfbench.errors import TaskError
from perfbench.finetune.tasks.records import Record, find_file, is_local, read_hub, read_jsonl
from perfbench.finetune.tasks.splits import hold_out
from perfbench.finetune.tasks.task import Example, Split, Task
from perfbench.finetune.tasks.task_metrics import final_number

DEV_EXAMPLES = 600


def load(source: str, split: Split) -> list[Example]:
    """Examples of a split; TaskError names file and record."""
    name = "test" if split == "test" else "train"
    records = read_jsonl(find_file(source, f"{name}.jsonl")) if is_local(source) else read_hub(source, "main", name)
    examples = [_example(record) for record in records]
    if split == "test":
        return examples
    train, dev = hold_out(examples, min(DEV_EXAMPLES, len(examples) // 10))
    return train if split == "train" else dev


def _example(record: Record) -> Example:
    answer = record.text("answer")
    if final_number(answer) is None:
        raise TaskError(f"{record.where}: answer: expected `#### ` and a number at its end, got {answer[-40:]!r}")
    prompt = f"Question: {record.text('question')}\nAnswer:"
    return Example(record.id, prompt, f" {answer}", (answer,), where=record.where)


TASK = Task(
    "gsm8k",
    "word problems with worked answers (final number)",
    "generate",
    "final_answer",
    load,
    new_tokens=256,
    stop=("Question:",),
)
