"""The batch that every arm of a comparison gets: prompts, and which request belongs to which tenant."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from perfbench.errors import ScenarioError
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.generation import Batch
from perfbench.spec.cases import Workload

# Keys of a JSON line under which a prompt is looked for, in this order; `turns` is MT-Bench's, its first counts.
PROMPT_KEYS = ("prompt", "question", "instruction", "text", "turns")

# Keys of a record in a chat's form (OpenAI's, ShareGPT's), which is no prompt before a template has made one of it.
CHAT_KEYS = ("messages", "conversations", "conversation")


def make(workload: Workload, backbone: Backbone, seed: int) -> Batch:
    """The batch of a workload on the backbone's device; the same seed gives the same batch. ScenarioError."""
    if workload.prompts is None:
        if workload.prompt_tokens is None:
            raise ScenarioError("workload: expected prompt_tokens or prompts")
        generator = torch.Generator().manual_seed(seed)
        size = (workload.requests, workload.prompt_tokens)
        ids = torch.randint(3, backbone.shape.vocab, size, generator=generator)
        ids[:, : workload.shared_tokens] = ids[:1, : workload.shared_tokens]
        mask = torch.ones_like(ids)
    else:
        places, texts = zip(*read_records(Path(workload.prompts)), strict=True)
        tokenizer, vocabulary = backbone.tokenizer(), backbone.shape.vocab
        ids, mask = tokenise(
            texts, tokenizer, workload.requests, workload.prompt_tokens, vocabulary=vocabulary, places=places
        )
        second = workload.follow_up_tokens + workload.new_tokens if workload.follow_up_tokens else 0
        longest = ids.shape[1] + workload.new_tokens + second
        if longest > backbone.shape.context:
            follow = workload.new_tokens + second
            raise ScenarioError(
                f"{workload.prompts}: the longest of the prompts takes {ids.shape[1]} tokens, with "
                f"{follow} that follow more than the {backbone.shape.context} of {backbone.name}; "
                f"set workload.prompt_tokens to cut them"
            )
    follow_up = None
    if workload.follow_up_tokens:
        generator = torch.Generator().manual_seed(seed + 1)
        size = (workload.requests, workload.follow_up_tokens)
        follow_up = torch.randint(3, backbone.shape.vocab, size, generator=generator).to(backbone.device)
    return Batch(
        ids.to(backbone.device),
        mask.to(backbone.device),
        assign_slots(workload, seed),
        workload.beams,
        workload.new_tokens,
        follow_up=follow_up,
        shared_tokens=workload.shared_tokens,
    )


def fresh(batch: Batch, seed: int, turn: int) -> Batch:
    """`batch` with other prompts of the same lengths, drawn for this turn from the tokens of its own prompts: nothing
    that an arm kept from another turn can serve it. The same seed and turn give the same prompts to every arm."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + turn + 1)
    pool = batch.input_ids[batch.attention_mask.bool()]

    def drawn(size: torch.Size) -> torch.Tensor:
        return pool[torch.randint(len(pool), size, generator=generator).to(pool.device)]

    follow_up = None if batch.follow_up is None else drawn(batch.follow_up.shape)
    ids = drawn(batch.input_ids.shape)
    ids[:, : batch.shared_tokens] = ids[:1, : batch.shared_tokens].clone()
    return replace(batch, input_ids=ids * batch.attention_mask, follow_up=follow_up)


def assign_slots(workload: Workload, seed: int) -> tuple[int, ...]:
    """The bank slot of each request, -1 for the bare backbone.

    The tenants of the batch lie anywhere among the residents, and the requests without an adapter anywhere in the
    batch: both are drawn with the seed.
    """
    draw = random.Random(seed)
    slots = draw.sample(range(workload.resident), workload.tenants)
    requests = range(workload.requests)
    if workload.tenant_mix == "distinct":
        tenants = [i % workload.tenants for i in requests]
    elif workload.tenant_mix == "identical":
        tenants = [0 for _ in requests]
    else:
        exponent = (workload.zipf_exponent or 0.0) if workload.tenant_mix == "zipf" else 0.0
        weights = [1 / rank**exponent for rank in range(1, workload.tenants + 1)]
        tenants = draw.choices(range(workload.tenants), weights, k=workload.requests)
    bare = set(draw.sample(requests, round(workload.without_adapter * workload.requests)))
    return tuple(-1 if i in bare else slots[tenant] for i, tenant in enumerate(tenants))


def read_prompts(path: Path) -> list[str]:
    """The prompts of a `.txt` (one a line) or `.jsonl` file (see PROMPT_KEYS). ScenarioError."""
    return [text for _, text in read_records(path)]


def read_records(path: Path) -> list[tuple[str, str]]:
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
        return lines
    return [(where, _prompt(line, where)) for where, line in lines]


def _prompt(line: str, where: str) -> str:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise ScenarioError(f"{where}: expected a line of JSON ({why})") from None
    wanted = f"expected a string or an object with one of {', '.join(PROMPT_KEYS)}"
    text = record
    if isinstance(record, dict):
        text = next((record[key] for key in PROMPT_KEYS if record.get(key) is not None), None)
        text = text[0] if isinstance(text, list) and text else text
        chat = next((key for key in CHAT_KEYS if key in record), None)
        if text is None and chat is not None:
            raise ScenarioError(
                f"{where}: {wanted}, got a chat under {chat!r}; write what the model reads as one text under 'prompt'"
            )
    if not isinstance(text, str) or not text.strip():
        raise ScenarioError(f"{where}: {wanted}, each a text that is not blank, got {_shown(record)}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ScenarioError(f"{where}: expected text, got half of a surrogate pair, which is no character; mend it")
    return text


def _shown(record: Any) -> str:
    text = f"an object with {', '.join(map(repr, record)) or 'nothing'}" if isinstance(record, dict) else repr(record)
    return text if len(text) <= 80 else f"{text[:77]}..."


def tokenise(
    texts: Sequence[str],
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
    if len(texts) < requests:
        raise ScenarioError(f"workload.prompts: {requests} requests need as many prompts, got {len(texts)}")
    rows = []
    for index, text in enumerate(texts[:requests]):
        row = _encode(text, tokenizer)[:longest]
        where = places[index] if places else f"workload.prompts: prompt {index + 1}"
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
