"""BoolQ: a passage and a question that yes or no answers. Validation is halved into dev and test, as in the papers.

Folder: SuperGLUE's train.jsonl and val.jsonl, or the original release's train.jsonl and dev.jsonl (`answer` in place
of `label`); FewGLUE's 32 of train as train32.jsonl. Hub: google/boolq, aps/super_glue. The prompt is lm-eval's.
"""

from __future__ import annotations

from perfbench.finetune.tasks.records import Record, find_file, is_local, read_hub, read_jsonl
from perfbench.finetune.tasks.splits import halve
from perfbench.finetune.tasks.task import Example, Split, Task

CHOICES = (" no", " yes")


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


def _example(record: Record) -> Example:
    name = "label" if "label" in record.fields or "answer" not in record.fields else "answer"
    known = (False, True) if isinstance(record.get(name), bool) else (0, 1)
    answer = CHOICES[record.label(name, known)]
    prompt = f"{record.text('passage')}\nQuestion: {record.text('question')}?\nAnswer:"
    return Example(record.id, prompt, answer, (answer.strip(),), CHOICES, record.where)


TASK = Task("boolq", "yes or no on a passage (accuracy; validation halved)", "choose", "accuracy", load)
