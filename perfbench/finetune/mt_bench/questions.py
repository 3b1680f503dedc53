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


def answer(folder: str, out: Path, model_id: str, generate: Generate, settings: dict[str, Any], whose: str = "") -> int:
    """Answers every question of `folder`, turn by turn, and writes `out` in FastChat's format; returns their number.

    A later turn's prompt has the earlier turns with the answers given. settings: kept as `generate_params`. Questions
    that are answered stand in `out`.part until all are, and are not asked again where the same model (`whose`: its
    backbone and adapter) with the same settings goes on. TaskError where that file is of something else.
    """
    asked = questions(folder)
    _refuse_unwritable(out)  # now, and not after hours of answers
    kept = _part(out)
    head = {"model_id": model_id, "whose": whose, "settings": settings, "questions": [q.turns for q in asked]}
    head = json.loads(json.dumps(head))
    done = _done(kept, head)
    left = [question for question in asked if question.question_id not in done]
    for start in range(0, len(left), settings.get("batch", 4)):
        some = left[start : start + settings.get("batch", 4)]
        lines = [] if done else [head]
        for question, turns in zip(some, _turns(some, generate), strict=True):
            done[question.question_id] = _written(question, turns, model_id, settings)
            lines.append(done[question.question_id])
        _append(kept, lines)
    _write_whole(out, "".join(_line(done[question.question_id]) for question in asked))
    kept.unlink(missing_ok=True)
    return len(asked)


def _turns(asked: Sequence[Question], generate: Generate) -> list[list[str]]:
    """The answers to each question, turn by turn."""
    said: dict[int, list[str]] = {question.question_id: [] for question in asked}
    for turn in range(max(len(question.turns) for question in asked)):
        now = [question for question in asked if turn < len(question.turns)]
        prompts = [
            dialogue_prompt(_dialogue(question.turns[: turn + 1], said[question.question_id])) for question in now
        ]
        texts = generate(prompts, [f"{question.where}, turn {turn + 1}" for question in now])
        for question, text in zip(now, texts, strict=True):
            said[question.question_id].append(text.strip())
    return list(said.values())


def _written(question: Question, turns: list[str], model_id: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The answers to a question as FastChat has them."""
    content = json.dumps([model_id, question.question_id, turns])
    return {
        "question_id": question.question_id,
        "answer_id": hashlib.sha256(content.encode()).hexdigest()[:22],
        "model_id": model_id,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": time.time(),
        "generate_params": settings,
    }


def _part(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


def _done(kept: Path, head: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Question id -> its answers, of those that an earlier start has left; a last line that a kill has torn is not
    among them."""
    try:
        lines = kept.read_bytes().split(b"\n")[:-1] if kept.exists() else []
        found = [json.loads(line) for line in lines]
        if found and found[0] != head:
            raise ValueError("another model, other settings or other questions")
        return {line["question_id"]: line for line in found[1:]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TaskError(f"{kept}: expected answers of this very command ({error}); remove it to start anew") from None


def _append(kept: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Adds whole lines after the last whole one."""
    try:
        before = kept.read_bytes() if kept.exists() else b""
        whole = before[: before.rfind(b"\n") + 1]
        with kept.open("r+b" if before else "wb") as file:
            file.truncate(len(whole))
            file.seek(len(whole))
            file.write("".join(map(_line, lines)).encode())
    except OSError as error:
        raise TaskError(f"{kept}: can't be written: {error.strerror}") from None


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def answer_with(
    model: Any, tokenizer: Any, folder: str, out: Path, model_id: str, whose: str = "", **settings: int
) -> int:
    """As `answer`, by a model of transformers or PEFT. settings: new_tokens, beams, batch, as in predict.generate."""
    from perfbench.finetune import predict

    settings = {"new_tokens": NEW_TOKENS, "beams": BEAMS, "batch": 4, **settings}

    def generate(prompts: Sequence[str], where: Sequence[str]) -> list[str]:
        return predict.generate(model, tokenizer, prompts, stop=(STOP,), where=where, **settings)

    return answer(folder, out, model_id, generate, {"do_sample": False, **settings}, whose)


def _dialogue(asked: Sequence[str], answered: Sequence[str]) -> list[str]:
    """user, assistant, user...; one more of the user's than of the assistant's."""
    turns = [asked[0]]
    for reply, question in zip(answered, asked[1:], strict=True):
        turns += [reply, question]
    return turns


def _refuse_unwritable(path: Path) -> None:
    """TaskError where a file can't be put at `path`."""
    beside = path.with_name(f".{path.name}.probe")
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
        beside = path.with_name(f".{path.name}.new")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise TaskError(f"{path}: can't be written: {error.strerror}") from None
