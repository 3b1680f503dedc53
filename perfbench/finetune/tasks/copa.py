"""COPA: which of two sentences is the cause or the effect of a premise. Validation is halved, as in the papers.

Folder: SuperGLUE's train.jsonl and val.jsonl. Hub: aps/super_glue. The prompt is lm-eval's.
"""

from __future__ import annotations

from perfbench.finetune.tasks.records import Record, find_file, is_local, read_hub, read_jsonl
from perfbench.finetune.tasks.splits import halve
from perfbench.finetune.tasks.task import Example, Split, Task

CONNECTORS = ("cause", "effect")
WORDS = (" because", " therefore")


def load(source: str, split: Split) -> list[Example]:
    """Examples of a split; TaskError names file and record."""
    if is_local(source):
        records = read_jsonl(find_file(source, "train.jsonl" if split == "train" else "val.jsonl"))
    else:
        records = read_hub(source, "copa", "train" if split == "train" else "validation")
    if split != "train":
        dev, test = halve(records)
        records = dev if split == "dev" else test
    return [_example(record) for record in records]


def _example(record: Record) -> Example:
    word = WORDS[record.label("question", CONNECTORS)]
    choices = (_choice(record.text("choice1")), _choice(record.text("choice2")))
    answer = choices[record.label("label", (0, 1))]
    # Without the premise's full stop, as lm-eval has it.
    prompt = record.text("premise").strip()[:-1] + word
    return Example(record.id, prompt, answer, (answer.strip(),), choices, record.where)


def _choice(text: str) -> str:
    """As lm-eval 0.4.13 gives it to the model: a small letter first, and two blanks, of which one is its delimiter."""
    return f"  {text[0].lower()}{text[1:]}"


TASK = Task("copa", "cause or effect, one of two (accuracy; validation halved)", "choose", "accuracy", load)
