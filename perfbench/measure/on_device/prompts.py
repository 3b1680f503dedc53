"""Prompts out of a file: plain texts, or chats, of which the tokenizer's own template makes what the model reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from perfbench.errors import ScenarioError, nearest

# Keys of a JSON line under which a prompt is looked for, in this order; `turns` is MT-Bench's, its first counts.
PROMPT_KEYS = ("prompt", "question", "instruction", "text", "turns")

# Keys of a record in a chat's form -> where a message of it has its role and its text: OpenAI's, then ShareGPT's.
CHAT_KEYS = {"messages": ("role", "content"), "conversations": ("from", "value"), "conversation": ("from", "value")}
# Role -> the template's name for it.
ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
}  # fmt: skip

# A text, or the messages of a chat, each with `role` and `content`.
Prompt = str | list[dict[str, str]]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a `.txt` (one a line) or `.jsonl` file (see PROMPT_KEYS and CHAT_KEYS). ScenarioError."""
    return [prompt for _, prompt in read_records(path)]


def read_records(path: Path) -> list[tuple[str, Prompt]]:
    """Each prompt of `read_prompts`, after its place: file and line. ScenarioError.

    A line ends with \\n or \\r\\n and with nothing else: the other line separators of Unicode may stand in a prompt.
    Blank lines are left out, and counted.
    """
    try:
        whole = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{path}: can't read the prompts: expected UTF-8, got other bytes ({error})") from None
    except OSError as error:
        raise ScenarioError(f"{path}: can't read the prompts ({error})") from None
    lines = [(f"{path}:{number}", line.removesuffix("\r")) for number, line in enumerate(whole.split("\n"), start=1)]
    lines = [(where, line) for where, line in lines if line.strip()]
    if not lines:
        raise ScenarioError(f"{path}: expected at least one prompt, got an empty file")
    if path.suffix != ".jsonl":
        return list(lines)
    return [(where, _prompt(line, where)) for where, line in lines]


def _prompt(line: str, where: str) -> Prompt:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise ScenarioError(f"{where}: expected a line of JSON ({why})") from None
    text = record
    if isinstance(record, dict):
        text = next((record[key] for key in PROMPT_KEYS if record.get(key) is not None), None)
        text = text[0] if isinstance(text, list) and text else text
        chat = next((key for key in CHAT_KEYS if key in record), None)
        if text is None and chat is not None:
            return _chat(record[chat], chat, where)
    if not isinstance(text, str) or not text.strip():
        wanted = f"a string or an object with one of {', '.join((*PROMPT_KEYS, *CHAT_KEYS))}"
        raise ScenarioError(f"{where}: expected {wanted}, each a text that is not blank, got {_shown(record)}")
    return _characters(text, where)


def _chat(messages: Any, key: str, where: str) -> list[dict[str, str]]:
    """The messages up to the last one of the user, whose answer is to be generated."""
    role, content = CHAT_KEYS[key]
    if not isinstance(messages, list) or not messages:
        raise ScenarioError(f"{where}: {key}: expected a list of messages, got {_shown(messages)}")
    found = []
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(name), str) for name in (role, content)):
            raise ScenarioError(f"{where}: {key}: expected {role!r} and {content!r}, both texts, got {_shown(message)}")
        if message[role] not in ROLES:
            raise ScenarioError(f"{where}: {key}: unknown {role} {message[role]!r}; {nearest(message[role], ROLES)}")
        found.append({"role": ROLES[message[role]], "content": _characters(message[content], where)})
    while found and found[-1]["role"] != "user":
        found.pop()
    if not found:
        raise ScenarioError(f"{where}: {key}: expected a message of the user's, got none")
    return found


def _characters(text: str, where: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ScenarioError(f"{where}: expected text, got half of a surrogate pair, which is no character; mend it")
    return text


def _shown(record: Any) -> str:
    text = f"an object with {', '.join(map(repr, record)) or 'nothing'}" if isinstance(record, dict) else repr(record)
    return text if len(text) <= 80 else f"{text[:77]}..."


def tokenise(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    requests: int,
    longest: int | None,
    *,
    vocabulary: int | None = None,
    places: Sequence[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 ids and mask [requests, S] of the first prompts, padded on the left, cut to `longest` tokens.

    `vocabulary`: how many tokens the backbone has; `places`: where each text is from, for messages. ScenarioError where
    the file has fewer prompts than the batch has requests, or a prompt has no tokens or one the backbone lacks.
    """
    if len(prompts) < requests:
        raise ScenarioError(f"workload.prompts: {requests} requests need as many prompts, got {len(prompts)}")
    rows = []
    for index, prompt in enumerate(prompts[:requests]):
        where = places[index] if places else f"workload.prompts: prompt {index + 1}"
        row = (_encode(prompt, tokenizer) if isinstance(prompt, str) else _templated(prompt, tokenizer, where))[
            :longest
        ]
        if not row:
            raise ScenarioError(f"{where}: expected at least one token, got none; the tokenizer leaves all of it out")
        if vocabulary is not None and max(row) >= vocabulary:
            token = tokenizer.convert_ids_to_tokens(max(row))
            raise ScenarioError(
                f"{where}: expected tokens of the backbone, which has {vocabulary}, got {token!r}, token {max(row)} of "
                f"the tokenizer; leave it out, or give the backbone that the tokenizer was made for"
            )
        rows.append(row)
    width = max(map(len, rows))
    ids = torch.zeros(requests, width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids, mask


def _encode(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a prompt. A tokenizer that puts a beginning-of-sequence token first does so once: one that the text
    spells out at its start is that token; elsewhere its letters are text, or nothing where they are no tokens."""
    row: list[int] = tokenizer(text)["input_ids"]
    begin = tokenizer.bos_token_id
    if begin is None or row.count(begin) < 2 or tokenizer("")["input_ids"][:1] != [begin]:
        return row
    while text.startswith(tokenizer.bos_token):
        text = text.removeprefix(tokenizer.bos_token)
    row = tokenizer(text)["input_ids"]
    if row.count(begin) > 1:
        row = tokenizer(text, split_special_tokens=True)["input_ids"]
    return row[:1] + [token for token in row[1:] if token != begin]


def _templated(messages: list[dict[str, str]], tokenizer: Any, where: str) -> list[int]:
    """The tokens of a chat as the tokenizer's template writes it, up to where the answer begins. ScenarioError where
    there is no template, or it takes no such chat."""
    if tokenizer.chat_template is None:
        raise ScenarioError(
            f"{where}: a chat needs a chat template, and the tokenizer has none; write what the model reads as one "
            f"text under 'prompt', or choose a backbone that was made for chats"
        )
    from jinja2 import TemplateError

    try:
        found: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except TemplateError as error:
        raise ScenarioError(f"{where}: the tokenizer's chat template takes no such chat: {error}") from None
    return found
