"""A tokenizer of bytes and a made-up set, for tests of fine-tuning."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BEGIN, END = "<s>", "</s>"


def byte_tokenizer() -> Any:
    """One token for each byte, `<s>` before a text; no token for padding, as many a checkpoint has none."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({word: index for index, word in enumerate((BEGIN, END, *letters))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=BEGIN, eos_token=END)


def write_own(folder: Path, counts: dict[str, int], start: int = 0) -> Path:
    """A set of one's own in `folder`: sums of one digit, no prompt twice."""
    folder.mkdir(parents=True, exist_ok=True)
    number = start
    for split, count in counts.items():
        lines = []
        for _ in range(count):
            lines.append({"prompt": f"{number // 10}+{number % 10}=", "answer": str(number // 10 + number % 10)})
            number += 1
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_boolq(folder: Path) -> None:
    """A few records in BoolQ's format."""
    for name, start in (("train.jsonl", 0), ("val.jsonl", 10)):
        lines = [
            {"passage": f"There are {n} hens.", "question": f"are there {n} hens", "label": n % 2 == 0}
            for n in range(start, start + 4)
        ]
        write_lines(folder / name, lines)


def write_squad(folder: Path) -> None:
    """A few questions in SQuAD's format."""
    for name, start, count in (("train-v1.1.json", 0, 12), ("dev-v1.1.json", 50, 2)):
        paragraphs = [
            {
                "context": f"Farm {n} has {n} hens.",
                "qas": [{"id": f"{name}-{n}", "question": "How many hens?", "answers": [{"text": str(n)}]}],
            }
            for n in range(start, start + count)
        ]
        content = {"data": [{"title": "Farms", "paragraphs": paragraphs}]}
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def write_copa(folder: Path) -> None:
    """A few records in COPA's format."""
    for name, start in (("train.jsonl", 0), ("val.jsonl", 10)):
        lines = [
            {
                "premise": f"Hen {n} laid an egg.",
                "choice1": "It was fed.",
                "choice2": "It was ill.",
                "question": ("cause", "effect")[n % 2],
                "label": n % 2,
            }
            for n in range(start, start + 4)
        ]
        write_lines(folder / name, lines)


def write_gsm8k(folder: Path) -> None:
    """A few problems in GSM8K's format."""
    for name, start, count in (("train.jsonl", 0, 12), ("test.jsonl", 50, 2)):
        lines = [
            {"question": f"{n} hens and one more?", "answer": f"{n}+1={n + 1}\n#### {n + 1}"}
            for n in range(start, start + count)
        ]
        write_lines(folder / name, lines)


def write_text2sql(folder: Path) -> None:
    """A few questions on a small database."""
    connection = sqlite3.connect(folder / "farm.sqlite")
    connection.execute("CREATE TABLE hen (name TEXT, eggs INTEGER)")
    connection.executemany("INSERT INTO hen VALUES (?, ?)", [("Ada", 3), ("Bea", 5)])
    connection.commit()
    connection.close()
    lines = [
        {"question": f"hens with {n} eggs?", "sql": f"SELECT name FROM hen WHERE eggs = {n}", "split": split}
        for n, split in enumerate(["train"] * 4 + ["dev"] * 2 + ["test"] * 2)
    ]
    write_lines(folder / "questions.jsonl", lines)


def write_instructions(folder: Path) -> None:
    """A few instructions in Alpaca's format, one of them too long for any recipe."""
    lines = [{"instruction": f"Count to {n}.", "input": "", "output": str(n)} for n in range(6)]
    write_lines(folder / "made.jsonl", [*lines, {"instruction": "Cry.", "input": "", "output": "hen " * 600}])


WRITERS = {
    "boolq": write_boolq,
    "squad": write_squad,
    "copa": write_copa,
    "gsm8k": write_gsm8k,
    "text2sql": write_text2sql,
    "instructions": write_instructions,
}
