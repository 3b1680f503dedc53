"""MMLU, zero-shot: four choices in 57 subjects. Measured only: there is no split to train on.

Folder: the original's dev/ and test/ of <subject>_dev.csv and <subject>_test.csv (question, four choices, letter), or
such files with a header and the answer as a number from 0. Hub: cais/mmlu. The prompt is lm-eval's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from perfbench.errors import TaskError
from perfbench.finetune.tasks.records import Record, is_local, read_csv, read_hub
from perfbench.finetune.tasks.task import Example, Split, Task

LETTERS = ("A", "B", "C", "D")
CHOICES = (" A", " B", " C", " D")
HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]


def load(source: str, split: Split) -> list[Example]:
    """Examples of a split; TaskError names file and record."""
    if split == "train":
        raise TaskError("mmlu: has no training set: train on `instructions`, and measure mmlu on dev or test")
    if not is_local(source):
        return [_example(record) for record in read_hub(source, "all", split)]
    files = sorted((Path(source) / split).glob(f"*_{split}.csv"))
    if not files:
        raise TaskError(f"{source}: expected {split}/<subject>_{split}.csv of one subject or more, found none")
    return [_example(record) for path in files for record in _rows(path, split)]


def _rows(path: Path, split: str) -> Iterator[Record]:
    subject = path.stem.removesuffix(f"_{split}")
    labels: tuple[str, ...] = LETTERS
    for number, cells in read_csv(path):
        where = f"{path}:{number}"
        if number == 1 and cells == HEADER:
            labels = ("0", "1", "2", "3")
            continue
        if len(cells) != len(HEADER):
            raise TaskError(f"{where}: expected 6 cells (question, four choices, answer), got {len(cells)}")
        answer = Record({"answer": cells[5].strip()}, "", where).label("answer", labels)
        fields = {"question": cells[0], "choices": cells[1:5], "answer": answer, "subject": subject}
        yield Record(fields, f"{path.stem}:{number}", where)


def _example(record: Record) -> Example:
    subject, choices = record.text("subject"), record.get("choices")
    if not isinstance(choices, list) or len(choices) != 4:
        raise TaskError(f"{record.where}: choices: expected a list of four")
    answer = CHOICES[record.label("answer", range(4))]
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    prompt = about + "\n".join([record.text("question").strip(), *lines, "Answer:"])
    return Example(record.id, prompt, answer, (answer.strip(),), CHOICES, record.where, {"subject": subject})


TASK = Task("mmlu", "57 subjects, four choices, zero-shot (accuracy; dev and test only)", "choose", "accuracy", load)
