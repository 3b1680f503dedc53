"""Instruction tuning: one prompt, one response. Dev is one in a hundred of the openings; there is no test split.

source: a .json or .jsonl file, or a folder with one or more, of any of these records: Alpaca's (instruction, input,
output), Self-Instruct's (instruction, instances), UltraChat's (data: user and assistant by turns), chat messages
(messages: role and content). Hub: such as tatsu-lab/alpaca, stingning/ultrachat. Each response of a dialogue is an
example of its own, with the turns before it in the prompt: no loss falls on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perfbench.errors import TaskError
from perfbench.finetune.tasks.records import Record, is_local, read_hub, read_json_list, read_jsonl
from perfbench.finetune.tasks.splits import hold_out
from perfbench.finetune.tasks.task import Example, Split, Task

HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
STOP = "\n### Instruction:"


def dialogue_prompt(turns: Sequence[str]) -> str:
    """Alpaca's template over user, assistant, user...; it ends where the next response begins."""
    parts = [HEAD]
    for number, text in enumerate(turns):
        parts.append(f"### Instruction:\n{text}\n\n### Response:" if number % 2 == 0 else f"\n{text}\n\n")
    return "".join(parts)


def load(source: str, split: Split) -> list[Example]:
    """Examples of a split; TaskError names file and record."""
    if split == "test":
        raise TaskError("instructions: has no test split: measure with mmlu, or with `perfbench mtbench`")
    records = _local(Path(source)) if is_local(source) else read_hub(source, None, "train")
    examples = [example for record in records for example in _examples(record)]
    train, dev = hold_out(examples, max(1, len(examples) // 100), lambda example: str(example.extra["opening"]))
    return train if split == "train" else dev


def _local(source: Path) -> list[Record]:
    files = sorted([*source.glob("*.json"), *source.glob("*.jsonl")]) if source.is_dir() else [source]
    if not files:
        raise TaskError(f"{source}: expected a .json or .jsonl file of instructions, found none")
    return [r for path in files for r in (read_jsonl(path) if path.suffix == ".jsonl" else read_json_list(path))]


def _examples(record: Record) -> list[Example]:
    turns = _turns(record)
    return [
        Example(
            id=f"{record.id}.{number // 2}",
            prompt=dialogue_prompt(turns[:number]),
            answer=f"\n{turns[number]}",
            references=(turns[number],),
            where=record.where,
            extra={"opening": turns[0]},
        )
        for number in range(1, len(turns), 2)
        # Some sets have empty responses: nothing to learn, and no loss could be taken on them.
        if turns[number].strip()
    ]


def _turns(record: Record) -> list[str]:
    """user, assistant, user, assistant... of a record of any layout."""
    fields = record.fields
    if "data" in fields:
        turns: Any = fields["data"]
    elif "messages" in fields:
        turns = _messages(record)
    elif "instances" in fields:
        first = fields["instances"][0] if isinstance(fields["instances"], list) and fields["instances"] else {}
        turns = _pair(record, first if isinstance(first, dict) else {})
    else:
        turns = _pair(record, fields)
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(text, str) for text in turns):
        raise TaskError(f"{record.where}: expected the texts of user and assistant by turns, two or more")
    return turns


def _pair(record: Record, fields: Any) -> list[Any]:
    instruction, given = record.text("instruction"), fields.get("input") or ""
    if "output" not in fields:
        raise TaskError(f"{record.where}: no field 'output'; expected instruction, input and output")
    return [f"{instruction}\n\n### Input:\n{given}" if given else instruction, fields["output"]]


def _messages(record: Record) -> list[Any]:
    """The contents, where user and assistant take turns; a system message goes in front of the first."""
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise TaskError(f"{record.where}: messages: expected a list of role and content")
    system = [str(message.get("content")) for message in messages if message.get("role") == "system"]
    rest = [message for message in messages if message.get("role") != "system"]
    for number, message in enumerate(rest):
        expected = "user" if number % 2 == 0 else "assistant"
        if message.get("role") != expected:
            raise TaskError(f"{record.where}: message {number + 1}: expected {expected}, got {message.get('role')!r}")
    contents: list[Any] = [message.get("content") for message in rest]
    if system and contents:
        contents[0] = "\n\n".join([*system, str(contents[0])])
    return contents


TASK = Task(
    "instructions",
    "instruction tuning on Alpaca's or UltraChat's format (99:1; token F1 is a rough figure, dev loss decides)",
    "generate",
    "f1",
    load,
    new_tokens=256,
    stop=(STOP,),
)
