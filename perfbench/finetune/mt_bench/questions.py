"""MT-Bench: two-turn questions, answered with three beams as in the papers and written in FastChat's answer format.

It has no metric of its own, so it is not in the registry: `perfbench mtbench answer` writes the answers, and judge.py
has them rated. Folder: FastChat's data/mt_bench (question.jsonl, reference_answer/gpt-4.jsonl) and judge_prompts.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfbench.errors import TaskError
from perfbench.finetune.tasks.instructions import STOP, dialogue_prompt
from perfbench.finetune.tasks.records import Record, find_file, read_jsonl

BEAMS = 3
NEW_TOKENS = 1024

# (prompts, where each stands) -> the text that follows each; predict.generate has it.
Generate = Callable[[Sequence[str], Sequence[str]], list[str]]


@dataclass(frozen=True)
class Question:
    """One question: `question_id`, category, what the user says turn by turn, and `file:record`."""

    question_id: int
    category: str
    turns: tuple[str, ...]
    where: str


def questions(folder: str) -> list[Question]:
    """The questions of question.jsonl; TaskError names file and record."""
    found: dict[int, Question] = {}
    for record in read_jsonl(find_file(folder, "question.jsonl")):
        question = _question(record)
        if question.question_id in found:
            first = found[question.question_id].where
            raise TaskError(f"{question.where}: question_id {question.question_id} is that of {first} too")
        found[question.question_id] = question
    if not found:
        raise TaskError(f"{folder}/question.jsonl: expected one question or more, got none")
    return list(found.values())


def _question(record: Record) -> Question:
    identity, turns = record.get("question_id"), record.get("turns")
    if not isinstance(identity, int):
        raise TaskError(f"{record.where}: question_id: expected an integer, got {identity!r}")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise TaskError(f"{record.where}: turns: expected a list of one text or more")
    return Question(identity, record.text("category"), tuple(turns), record.where)


def answer(folder: str, out: Path, model_id: str, generate: Generate, settings: dict[str, Any]) -> int:
    """Answers every question of `folder`, turn by turn, and writes `out` in FastChat's format; returns their number.

    A later turn's prompt has the earlier turns with the answers given. settings: kept as `generate_params`.
    """
    asked = questions(folder)
    _refuse_unwritable(out)  # now, and not after hours of answers
    said: dict[int, list[str]] = {question.question_id: [] for question in asked}
    for turn in range(max(len(question.turns) for question in asked)):
        now = [question for question in asked if turn < len(question.turns)]
        prompts = [
            dialogue_prompt(_dialogue(question.turns[: turn + 1], said[question.question_id])) for question in now
        ]
        texts = generate(prompts, [f"{question.where}, turn {turn + 1}" for question in now])
        for question, text in zip(now, texts, strict=True):
            said[question.question_id].append(text.strip())
    lines = []
    for question in asked:
        turns = said[question.question_id]
        content = json.dumps([model_id, question.question_id, turns])
        written = {
            "question_id": question.question_id,
            "answer_id": hashlib.sha256(content.encode()).hexdigest()[:22],
            "model_id": model_id,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
            "generate_params": settings,
        }
        lines.append(json.dumps(written, ensure_ascii=False) + "\n")
    _write_whole(out, "".join(lines))
    return len(lines)


def answer_with(model: Any, tokenizer: Any, folder: str, out: Path, model_id: str, **settings: int) -> int:
    """As `answer`, by a model of transformers or PEFT. settings: new_tokens, beams, batch, as in predict.generate."""
    from perfbench.finetune import predict

    settings = {"new_tokens": NEW_TOKENS, "beams": BEAMS, "batch": 4, **settings}

    def generate(prompts: Sequence[str], where: Sequence[str]) -> list[str]:
        return predict.generate(model, tokenizer, prompts, stop=(STOP,), where=where, **settings)

    return answer(folder, out, model_id, generate, {"do_sample": False, **settings})


def _dialogue(asked: Sequence[str], answered: Sequence[str]) -> list[str]:
    """user, assistant, user...; one more of the user's than of the assistant's."""
    turns = [asked[0]]
    for reply, question in zip(answered, asked[1:], strict=True):
        turns += [reply, question]
    return turns


def _refuse_unwritable(path: Path) -> None:
    """TaskError where a file can't be put at `path`."""
    beside = path.with_name(f"{path.name}.part")
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch()
        beside.unlink()
    except OSError as error:
        raise TaskError(f"{path}: can't be written: {error.strerror}") from None


def _write_whole(path: Path, text: str) -> None:
    """The file appears complete or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.part")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise TaskError(f"{path}: can't be written: {error.strerror}") from None
