"""Answers to test items through an arm: many tenants in one batch, or one at a time as trained."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from perfbench.arms import PLAN_ARMS
from perfbench.backbone import Backbone
from perfbench.errors import AdapterError, TaskError
from perfbench.finetune.accuracy.paths import ServingPath
from perfbench.finetune.encoding import encode, place_of
from perfbench.finetune.tasks.task import Example, Task
from perfbench.methods import parameters
from perfbench.methods.bank import Bank, union_layout
from perfbench.methods.plan import AdapterPlan
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import BackboneShape
from perfbench.runtimes.generation import PAD, Arm, Batch, Generation, generate

# Prompts are padded to a multiple of this, so that few sizes of batch come up: each has a cache of its own.
WIDTH_TOKENS = 16
# Batches' worth of requests of about the same length that are shuffled among each other.
_SHUFFLED = 4


@dataclass(frozen=True)
class Tenant:
    """One trained adapter: `label` of its method, `seed`, `folder`, and its `plan` where a bank can hold it."""

    label: str
    method: str
    seed: int
    folder: Path
    plan: AdapterPlan | None = None

    @property
    def name(self) -> str:
        """As messages have it."""
        return f"{self.label} seed {self.seed}"


@dataclass(frozen=True)
class Question:
    """What one request asks: an example's prompt, and the tokens of one of its choices, none where it generates."""

    example: Example
    prompt: tuple[int, ...]
    choice: str = ""
    forced: tuple[int, ...] = ()


@dataclass(frozen=True)
class Asked:
    """One request of a batch: whose it is, and what it asks."""

    tenant: int
    question: Question


class AsTrained:
    """A PEFT model as an arm: whatever the slots say, its one adapter answers."""

    def __init__(self, model: Any):
        self.model: Any = model.eval()

    def generate(self, batch: Batch, **observers: Any) -> Generation:
        """One `generate()` call."""
        return generate(self.model, batch, **observers)

    def tensors(self) -> list[torch.Tensor]:
        """None: the adapter is part of the model."""
        return []

    def close(self) -> None:
        """Drops the model."""
        self.model = None


def with_plan(tenant: Tenant, shape: BackboneShape) -> Tenant:
    """The tenant with what its folder holds. AdapterError where that is missing or of another backbone."""
    plan = parameters.implementation(tenant.method).load(tenant.folder, shape, METHODS[tenant.method].options())
    return replace(tenant, plan=plan)


def banks(tenants: Sequence[Tenant]) -> list[list[Tenant]]:
    """The tenants in as few banks as can hold them: methods share one, unless their generators pool unlike."""
    groups: list[list[Tenant]] = []
    for tenant in tenants:
        for group in groups:
            try:
                union_layout([_plan(one) for one in (*group, tenant)])
            except AdapterError:
                continue
            group.append(tenant)
            break
        else:
            groups.append([tenant])
    return groups


def serve(path: ServingPath, backbone: Backbone, tenants: Sequence[Tenant]) -> tuple[Arm, list[int]]:
    """An arm of `path` over one bank with all of `tenants`, and the slot that each of them got."""
    bank = Bank(union_layout([_plan(tenant) for tenant in tenants]), len(tenants), backbone.dtype, backbone.device)
    slots = [bank.admit(_plan(tenant)) for tenant in tenants]
    return PLAN_ARMS[path.runtime](backbone, bank, path.kernels), slots


def _plan(tenant: Tenant) -> AdapterPlan:
    assert tenant.plan is not None, tenant.name
    return tenant.plan


def questions(task: Task, examples: Sequence[Example], tokenizer: Any, context: int) -> list[Question]:
    """One for each example, or for each of its choices. TaskError, with the record, where one does not fit into the
    `context` of the backbone, in tokens."""
    found = []
    for example in examples:
        if task.kind == "generate":
            prompt = tuple(tokenizer(example.prompt)["input_ids"])
            found.append(Question(example, prompt))
            longest = len(prompt) + task.new_tokens
        else:
            encoded = [encode(replace(example, answer=choice), tokenizer, end=False) for choice in example.choices]
            for choice, one in zip(example.choices, encoded, strict=True):
                found.append(Question(example, one.ids[: one.prompt_tokens], choice, one.ids[one.prompt_tokens :]))
            longest = max(len(one.ids) for one in encoded)
        if longest > context:
            raise TaskError(
                f"{place_of(example)}: prompt and answer take {longest} tokens, more than the backbone's {context}; "
                "leave the record out, or choose a backbone with a longer context"
            )
    return found


def mixed(tenants: int, asked: Sequence[Question], requests: int, seed: int) -> Iterator[list[Asked]]:
    """Every question of every tenant, in batches of `requests` in which tenants and items are mixed; those of about
    the same length come together, so that little is padding. The same seed gives the same batches."""
    pairs = [Asked(tenant, question) for question in asked for tenant in range(tenants)]
    pairs.sort(key=lambda pair: len(pair.question.prompt))
    draw = random.Random(seed)
    block = requests * _SHUFFLED
    for start in range(0, len(pairs), block):
        some = pairs[start : start + block]
        draw.shuffle(some)
        for at in range(0, len(some), requests):
            yield some[at : at + requests]


def batch_of(
    pairs: Sequence[Asked], slots: Sequence[int], task: Task, backbone: Backbone, eos: int, beams: int
) -> Batch:
    """The batch that asks `pairs`; `slots`: of each tenant. Padded on the left, as prompts are served."""
    width = max(len(pair.question.prompt) for pair in pairs)
    room = backbone.shape.context - _new_tokens(pairs, task)
    width = max(width, min(-(-width // WIDTH_TOKENS) * WIDTH_TOKENS, room))
    ids = torch.full((len(pairs), width), PAD, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, pair in enumerate(pairs):
        prompt = torch.tensor(pair.question.prompt)
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return Batch(
        ids.to(backbone.device),
        mask.to(backbone.device),
        tuple(slots[pair.tenant] for pair in pairs),
        beams=beams if task.kind == "generate" else 1,
        new_tokens=_new_tokens(pairs, task),
        eos=(eos,) if task.kind == "generate" else (),
    )


def _new_tokens(pairs: Sequence[Asked], task: Task) -> int:
    if task.kind == "generate":
        return task.new_tokens
    return max(len(pair.question.forced) for pair in pairs)


def forced_tokens(pairs: Sequence[Asked], device: torch.device) -> torch.Tensor:
    """int64 [Q, N], what each request is made to say, PAD after it."""
    rows = [torch.tensor(pair.question.forced) for pair in pairs]
    longest = max(map(len, rows))
    return torch.stack([pad(row, (0, longest - len(row)), value=PAD) for row in rows]).to(device)


def answers(
    arm: Arm, task: Task, batches: Iterator[list[Asked]], slots: Sequence[int], backbone: Backbone, tokenizer: Any,
    beams: int,
) -> Iterator[dict[tuple[int, str], str]]:  # fmt: skip
    """After each batch {(tenant, id of the example): prediction} of what is known so far.

    A choice is scored by the sum of the log-probabilities of its tokens; the highest wins, the first on a tie.
    """
    found: dict[tuple[int, str], str] = {}
    best: dict[tuple[int, str], tuple[float, int]] = {}
    for pairs in batches:
        batch = batch_of(pairs, slots, task, backbone, tokenizer.eos_token_id, beams)
        if task.kind == "generate":
            for pair, tokens in zip(pairs, arm.generate(batch).tokens.tolist(), strict=True):
                found[pair.tenant, pair.question.example.id] = text_of(tokens, tokenizer, task)
        else:
            for pair, score in zip(pairs, choice_scores(arm, batch, pairs), strict=True):
                key, example = (pair.tenant, pair.question.example.id), pair.question.example
                ranked = (score, -example.choices.index(pair.question.choice))
                if key not in best or ranked > best[key]:
                    best[key], found[key] = ranked, pair.question.choice
        yield found


def choice_scores(arm: Arm, batch: Batch, pairs: Sequence[Asked]) -> list[float]:
    """For each request the sum of the log-probabilities of its choice's tokens after the prompt."""
    forced = forced_tokens(pairs, batch.input_ids.device)
    logits = arm.generate(batch, forced=forced, with_logits=True).logits
    assert logits is not None
    chosen = logits.log_softmax(dim=-1).gather(-1, forced.unsqueeze(-1)).squeeze(-1)
    return [float(row[: len(pair.question.forced)].sum()) for row, pair in zip(chosen, pairs, strict=True)]


def text_of(tokens: Sequence[int], tokenizer: Any, task: Task) -> str:
    """The text of new tokens up to the end of the sequence, and up to the first of the task's stop strings."""
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: list(tokens).index(tokenizer.eos_token_id)]
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    for stop in task.stop:
        text = text.partition(stop)[0]
    return text


def scores(
    found: Mapping[tuple[int, str], str], examples: Sequence[Example], metric: Any, tenants: Sequence[Tenant]
) -> Iterator[tuple[Tenant, Example, str, float]]:
    """(tenant, example, prediction, score) in order. ValueError where an answer is missing: every tenant is asked
    everything."""
    for index, tenant in enumerate(tenants):
        for example in examples:
            prediction = found.get((index, example.id))
            if prediction is None:
                raise ValueError(f"{tenant.name}: no answer to {example.id}")
            yield tenant, example, prediction, float(metric(prediction, example))
