"""MT-Bench's judge: an OpenAI-compatible endpoint that the user names rates each answer from 1 to 10.

Single-answer grading as in FastChat: its prompts (judge_prompts.jsonl), references for maths, reasoning and coding,
and its format of judgments, one JSON line each, so that its own scripts read them. A run that was stopped goes on.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfbench.errors import TaskError
from perfbench.finetune.mt_bench.judge_endpoint import Endpoint, ask
from perfbench.finetune.mt_bench.questions import Question, questions
from perfbench.finetune.tasks.records import Record, find_file, read_jsonl

# Categories whose answers are rated beside a reference.
WITH_REFERENCE = ("math", "reasoning", "coding")
NO_RATING = -1
# What a line of --out begins with, as `judge` writes it.
_FIRST = b'{"judge": '
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


@dataclass(frozen=True)
class Summary:
    """score: mean rating of all turns that have one, None without; turns: the same turn by turn; unrated: judgments
    without a rating from 1 to 10, which count in no mean (as in FastChat)."""

    score: float | None
    turns: Mapping[int, float]
    judged: int
    unrated: int


def judge(
    folder: str, answers: Path, out: Path, endpoint: Endpoint, progress: Callable[[str], None] = lambda text: None
) -> Summary:
    """Has every turn of `answers` rated and appends each judgment to `out` at once; turns that are there are kept.

    TaskError where an answer is missing, `out` has another judge's or answer's ratings, or the endpoint gives none.
    """
    endpoint.check()
    asked = {question.question_id: question for question in questions(folder)}
    said, references = _answers(answers, asked), _references(folder, asked)
    prompts = _prompts(folder)
    done = _done(out, endpoint.model)
    for question in asked.values():
        model, turns = said[question.question_id]
        for turn in range(1, len(turns) + 1):
            name = _prompt_name(question, turn)
            if name not in prompts:
                raise TaskError(f"judge_prompts.jsonl: no prompt {name!r}; take FastChat's file")
            system = str(prompts[name].get("system_prompt"))
            user = _fill(prompts[name].text("prompt_template"), question, turns, references.get(question.question_id))
            at = (question.question_id, turn)
            if at in done:
                if done[at].get("user_prompt") != user:
                    raise TaskError(f"{done[at].where}: is a judgment of another answer; give another file for --out")
                continue
            reply = ask(endpoint, system, user, f"question {question.question_id}, turn {turn}")
            judgment = {
                "judge": [endpoint.model, name],
                "question_id": question.question_id,
                "model": model,
                "user_prompt": user,
                "judgment": reply,
                "score": rating(reply),
                "turn": turn,
                "tstamp": time.time(),
            }
            _append(out, judgment)
            progress(f"question {question.question_id}, turn {turn}: {judgment['score']:g}")
    return summary(out)


def summary(out: Path) -> Summary:
    """The ratings of a file of judgments."""
    scores: dict[tuple[int, int], float] = {}
    for record in read_jsonl(out):
        score = record.get("score")
        if not isinstance(score, int | float):
            raise TaskError(f"{record.where}: score: expected a number, got {score!r}")
        scores[record.get("question_id"), record.get("turn")] = score
    rated = {at: score for at, score in scores.items() if score != NO_RATING}
    turns: dict[int, list[float]] = {}
    for (_, turn), score in sorted(rated.items()):
        turns.setdefault(turn, []).append(score)
    means = {turn: sum(found) / len(found) for turn, found in turns.items()}
    mean = sum(rated.values()) / len(rated) if rated else None
    return Summary(mean, means, len(scores), len(scores) - len(rated))


def rating(reply: str) -> float:
    """The first [[number]] of the reply, or else [number]; NO_RATING without one, or where it is not from 1 to 10."""
    for pattern in _RATINGS:
        found = pattern.search(reply)
        if found:
            value = float(found[1])
            return value if 1 <= value <= 10 else NO_RATING
    return NO_RATING


def _prompts(folder: str) -> dict[str, Record]:
    """FastChat has judge_prompts.jsonl beside mt_bench; in it is as good."""
    beside = Path(folder).resolve().parent / "judge_prompts.jsonl"
    inside = Path(folder) / "judge_prompts.jsonl"
    path = beside if beside.is_file() and not inside.is_file() else find_file(folder, "judge_prompts.jsonl")
    return {record.text("name"): record for record in read_jsonl(path)}


def _prompt_name(question: Question, turn: int) -> str:
    reference = "math-" if question.category in WITH_REFERENCE else ""
    return f"single-{reference}v1" + ("" if turn == 1 else "-multi-turn")


def _fill(template: str, question: Question, turns: list[str], reference: list[str] | None) -> str:
    """The judge's prompt. Replaced in one pass, so that an answer with braces or a field's name in it stays as is."""
    values = {"question": question.turns[0], "answer": turns[0]}
    for name, texts in (("question", question.turns), ("answer", turns), ("ref_answer", reference or [])):
        values |= {f"{name}_{number}": text for number, text in enumerate(texts, start=1)}
    wanted = set(re.findall(r"\{(\w+)\}", template))
    if missing := sorted(wanted - set(values)):
        raise TaskError(f"{question.where}: the judge's prompt needs {missing[0]}, which is not there")
    return re.sub(r"\{(\w+)\}", lambda found: values[found[1]], template)


def _answers(path: Path, asked: Mapping[int, Question]) -> dict[int, tuple[str, list[str]]]:
    """question_id -> (model_id, the text of each turn)."""
    found = {identity: (model, turns) for identity, model, turns in _choices(path)}
    for question in asked.values():
        given = len(found[question.question_id][1]) if question.question_id in found else 0
        if given != len(question.turns):
            raise TaskError(
                f"{path}: expected {len(question.turns)} turns for question {question.question_id} ({question.where}), "
                f"got {given}"
            )
    return found


def _references(folder: str, asked: Mapping[int, Question]) -> dict[int, list[str]]:
    """question_id -> the reference of each turn; of the categories that need one, every question has to have it."""
    needed = [question for question in asked.values() if question.category in WITH_REFERENCE]
    if not needed:
        return {}
    path = find_file(folder, "reference_answer/gpt-4.jsonl", "reference_answer_gpt-4.jsonl")
    found = {identity: turns for identity, _, turns in _choices(path)}
    for question in needed:
        if question.question_id not in found:
            raise TaskError(f"{path}: no reference for question {question.question_id} ({question.where})")
    return found


def _choices(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """(question_id, model_id, turns) of a file in FastChat's answer format."""
    for record in read_jsonl(path):
        try:
            turns = record.get("choices")[0]["turns"]
        except (KeyError, IndexError, TypeError):
            turns = None
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise TaskError(f"{record.where}: expected choices[0].turns, a list of texts")
        identity = record.get("question_id")
        if not isinstance(identity, int):
            raise TaskError(f"{record.where}: question_id: expected an integer, got {identity!r}")
        yield identity, record.text("model_id"), turns


def _done(out: Path, judge_model: str) -> dict[tuple[int, int], Record]:
    """(question_id, turn) -> the judgment that `out` has already. A last line that was cut off is taken away, once the
    file has shown that it is this judge's: a wrong --out loses nothing."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("ab+") as file:
            file.seek(0)
            text = file.read()
            found = _judgments(out, judge_model)
            end = text.rfind(b"\n") + 1
            if not (text[end:].startswith(_FIRST) or _FIRST.startswith(text[end:])):
                raise TaskError(f"{out}: its last line is no judgment; give another file for --out")
            file.truncate(end)
    except OSError as error:
        raise TaskError(f"{out}: can't be written: {error.strerror}") from None
    return found


def _judgments(out: Path, judge_model: str) -> dict[tuple[int, int], Record]:
    """Those of the file's whole lines."""
    found: dict[tuple[int, int], Record] = {}
    for record in read_jsonl(out, torn=True):
        by, at = record.get("judge"), (record.get("question_id"), record.get("turn"))
        if not isinstance(by, list) or by[:1] != [judge_model]:
            raise TaskError(f"{record.where}: is a judgment by {by!r}, not {judge_model}; give another file for --out")
        if not all(isinstance(number, int) for number in at):
            raise TaskError(f"{record.where}: expected integers as question_id and turn, got {at[0]!r} and {at[1]!r}")
        found[at] = record
    return found


def _append(out: Path, judgment: dict[str, Any]) -> None:
    try:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(judgment) + "\n")  # ASCII, so that no character can be cut in two
    except OSError as error:
        raise TaskError(f"{out}: can't be written: {error.strerror}") from None
