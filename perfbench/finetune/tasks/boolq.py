"""BoolQ: a passage and a question that yes or no answers. Validation is halved into dev and test, as in the papers.

`boolq-resplit` is another task, for those who have the validation set alone: its 3,270 records are split anew.

Folder: SuperGLUE's train.jsonl and val.jsonl, or the original release's train.jsonl and dev.jsonl (`answer` in place
of `label`); FewGLUE's 32 of train as train32.jsonl. Hub: google/boolq, aps/super_glue. The prompt is lm-eval's.
"""

from __future__ import annotations

from perfbench.finetune.tasks.records import Record, find_file, is_local, read_hub, read_jsonl
from perfbench.finetune.tasks.splits import halve, hold_out
from perfbench.finetune.tasks.task import Example, Split, Task

CHOICES = (" no", " yes")
# Records of the validation set that boolq-resplit holds out, the rest trains: about 1,600 of 3,270.
RESPLIT_TEST, RESPLIT_DEV = 1070, 600


def load(source: str, split: Split) -> list[Example]:
    """Examples of a split; TaskError names file and record."""
    if is_local(source):
        files = ("train.jsonl", "train32.jsonl") if split == "train" else ("val.jsonl", "dev.jsonl")
        records = read_jsonl(find_file(source, *files))
    else:
        config = "boolq" if source.endswith("super_glue") else None
        records = read_hub(source, config, "train" if split == "train" else "validation")
    if split != "train":
        dev, test = halve(records)
        records = dev if split == "dev" else test
    return [_example(record) for record in records]


def load_resplit(source: str, split: Split) -> list[Example]:
    """The validation set's own train, dev and test: whole passages to each, by the hashes of their texts. TaskError as
    `load`."""
    if is_local(source):
        records = read_jsonl(find_file(source, "val.jsonl", "dev.jsonl"))
    else:
        records = read_hub(source, "boolq" if source.endswith("super_glue") else None, "validation")
    examples = [_example(record) for record in records]
    shares = (RESPLIT_TEST / 3270, RESPLIT_DEV / 3270)
    others, test = hold_out(examples, round(shares[0] * len(examples)), _passage)
    train, dev = hold_out(others, round(shares[1] * len(examples)), _passage)
    return {"train": train, "dev": dev, "test": test}[split]


def _passage(example: Example) -> str:
    return example.prompt[: example.prompt.rindex("\nQuestion: ")]


def _example(record: Record) -> Example:
    name = "label" if "label" in record.fields or "answer" not in record.fields else "answer"
    known = (False, True) if isinstance(record.get(name), bool) else (0, 1)
    answer = CHOICES[record.label(name, known)]
    prompt = f"{record.text('passage')}\nQuestion: {record.text('question')}?\nAnswer:"
    return Example(record.id, prompt, answer, (answer.strip(),), CHOICES, record.where)


TASK = Task("boolq", "yes or no on a passage (accuracy; validation halved)", "choose", "accuracy", load)
RESPLIT = Task(
    "boolq-resplit", "BoolQ's validation set, split anew into train, dev and test", "choose", "accuracy", load_resplit
)
