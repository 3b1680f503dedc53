"""SQuAD v1.1: a question on a paragraph, answered by a piece of it. Dev is 1,000 of train, test the official dev set.

Folder: train-v1.1.json and dev-v1.1.json, as published (a file that holds part of train may have more in its name:
train-v1.1.first12.json). Hub: rajpurkar/squad. Paragraphs stay whole when dev is cut out. The prompt is the one that
lm-eval has for SQuAD 2.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perfbench.errors import TaskError
from perfbench.finetune.tasks.records import Record, find_file, is_local, read_hub, read_json
from perfbench.finetune.tasks.splits import hold_out
from perfbench.finetune.tasks.task import Example, Split, Task

DEV_EXAMPLES = 1000


def load(source: str, split: Split) -> list[Example]:
    """Examples of a split; TaskError names file and question."""
    if is_local(source):
        path = find_file(source, "dev-v1.1.json" if split == "test" else "train-v1.1*.json")
        records = list(_questions(path))
    else:
        records = read_hub(source, None, "validation" if split == "test" else "train")
    examples = [_example(record) for record in records]
    if split == "test":
        return examples
    count = min(DEV_EXAMPLES, len(examples) // 10)
    train, dev = hold_out(examples, count, lambda example: str(example.extra["context"]))
    return train if split == "train" else dev


def _questions(path: Path) -> Iterator[Record]:
    """The published file is articles of paragraphs of questions; each becomes a record as on the hub."""
    number = 0
    for article in _list(read_json(path), "data", str(path)):
        for paragraph in _list(article, "paragraphs", str(path)):
            for question in _list(paragraph, "qas", str(path)):
                number += 1
                where = f"{path}:question {number}"
                answers = _list(question, "answers", where)
                fields = {
                    **question,
                    "title": article.get("title"),
                    "context": paragraph.get("context"),
                    "answers": {"text": [answer.get("text") for answer in answers if isinstance(answer, dict)]},
                }
                yield Record(fields, f"{path.stem}:{number}", where)


def _list(value: Any, name: str, where: str) -> list[Any]:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise TaskError(f"{where}: expected the list {name!r} of SQuAD v1.1's layout")
    return found


def _example(record: Record) -> Example:
    answers = record.get("answers")
    texts = answers.get("text") if isinstance(answers, dict) else None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise TaskError(f"{record.where}: answers: expected one or more, each with its text (SQuAD 2.0 is another set)")
    title = record.text("title").replace("_", " ")
    context = record.text("context")
    prompt = f"Title: {title}\n\nBackground: {context}\n\nQuestion: {record.text('question')}\n\nAnswer:"
    identity, extra = record.text("id"), {"context": context}
    return Example(identity, prompt, f" {texts[0]}", tuple(texts), where=record.where, extra=extra)


TASK = Task(
    "squad",
    "SQuAD v1.1: a question on a paragraph (mean of F1 and exact match)",
    "generate",
    "squad",
    load,
    new_tokens=48,
    stop=("\n",),
)
