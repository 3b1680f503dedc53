"""The batch that every arm of a comparison gets: prompts, and which request belongs to which tenant."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from perfbench.backbone import Backbone
from perfbench.cases import Workload
from perfbench.errors import ScenarioError
from perfbench.runtimes.generation import Batch

# Keys of a JSON line under which a prompt is looked for, in this order; `turns` is MT-Bench's, its first counts.
PROMPT_KEYS = ("prompt", "question", "instruction", "text", "turns")


def make(workload: Workload, backbone: Backbone, seed: int) -> Batch:
    """The batch of a workload on the backbone's device; the same seed gives the same batch. ScenarioError."""
    if workload.prompts is None:
        if workload.prompt_tokens is None:
            raise ScenarioError("workload: expected prompt_tokens or prompts")
        generator = torch.Generator().manual_seed(seed)
        size = (workload.requests, workload.prompt_tokens)
        ids = torch.randint(3, backbone.shape.vocab, size, generator=generator)
        mask = torch.ones_like(ids)
    else:
        texts = read_prompts(Path(workload.prompts))
        ids, mask = tokenise(texts, backbone.tokenizer(), workload.requests, workload.prompt_tokens)
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
    )


def fresh(batch: Batch, seed: int, turn: int) -> Batch:
    """`batch` with other prompts of the same lengths, drawn for this turn from the tokens of its own prompts: nothing
    that an arm kept from another turn can serve it. The same seed and turn give the same prompts to every arm."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + turn + 1)
    pool = batch.input_ids[batch.attention_mask.bool()]

    def drawn(size: torch.Size) -> torch.Tensor:
        return pool[torch.randint(len(pool), size, generator=generator).to(pool.device)]

    follow_up = None if batch.follow_up is None else drawn(batch.follow_up.shape)
    return replace(batch, input_ids=drawn(batch.input_ids.shape) * batch.attention_mask, follow_up=follow_up)


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


def shift_slots(slots: tuple[int, ...], resident: int) -> tuple[int, ...]:
    """The fault that every check plants: each request is given the next resident's adapter.

    With one resident, and for a request without an adapter, the fault is to swap adapter and bare backbone.
    """
    return tuple(0 if slot == -1 else -1 if resident == 1 else (slot + 1) % resident for slot in slots)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a `.txt` (one a line) or `.jsonl` file (see PROMPT_KEYS). ScenarioError."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: can't read the prompts ({error})") from None
    if not lines:
        raise ScenarioError(f"{path}: expected at least one prompt, got an empty file")
    if path.suffix != ".jsonl":
        return lines
    return [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _prompt(line: str, where: str) -> str:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ScenarioError(f"{where}: expected a line of JSON ({error.msg})") from None
    if isinstance(record, dict):
        record = next((record[key] for key in PROMPT_KEYS if key in record), None)
        record = record[0] if isinstance(record, list) and record else record
    if not isinstance(record, str) or not record.strip():
        raise ScenarioError(f"{where}: expected a string or an object with one of {', '.join(PROMPT_KEYS)}")
    return record


def tokenise(
    texts: list[str], tokenizer: Any, requests: int, longest: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 ids and mask [requests, S] of the first prompts, padded on the left, cut to `longest` tokens.

    ScenarioError where the file has fewer prompts than the batch has requests.
    """
    if len(texts) < requests:
        raise ScenarioError(f"workload.prompts: {requests} requests need as many prompts, got {len(texts)}")
    rows = [tokenizer(text)["input_ids"][:longest] for text in texts[:requests]]
    width = max(map(len, rows))
    ids = torch.zeros(requests, width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids, mask
