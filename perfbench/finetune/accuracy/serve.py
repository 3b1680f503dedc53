"""Answers to test items through an arm: many tenants in one batch, or one at a time as trained."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from perfbench.errors import AdapterError
from perfbench.finetune.accuracy.paths import ServingPath
from perfbench.finetune.choices import (
    check_length,
    choose,
    decode,
    encode_answer,
    encode_choices,
    read_together,
    scores_of,
)
from perfbench.finetune.tasks.task import Example, Task
from perfbench.finetune.trained_table import served_as
from perfbench.measure.on_device.arms import PLAN_ARMS
from perfbench.methods import parameters
from perfbench.methods.bank import Bank, union_layout
from perfbench.methods.plan import AdapterPlan
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import BackboneShape
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.generation import PAD, Arm, Batch, Generation, generate

# Prompts are padded to a multiple of this, so that few sizes of batch come up: each has a cache of its own.
WIDTH_TOKENS = 16
# Batches' worth of requests of about the same length that are shuffled among each other.
_SHUFFLED = 4
PROBES = 4
SEED = 0  # of the order in which items and tenants are mixed


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
    """What one request asks: an example's prompt, and the tokens of the choices that it scores, from the example's
    choice number `choice` on, of which it is made to say the first; none where it generates."""

    example: Example
    prompt: tuple[int, ...]
    choice: int = 0
    choices: tuple[tuple[int, ...], ...] = ()

    @property
    def forced(self) -> tuple[int, ...]:
        """The tokens that it is made to say."""
        return self.choices[0]


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
    reader = served_as(tenant.method)
    assert reader is not None, tenant.name
    plan = parameters.implementation(reader).load(tenant.folder, shape, METHODS[reader].options())
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
    bank = Bank(
        union_layout([_plan(tenant) for tenant in tenants]),
        len(tenants),
        backbone.dtype,
        backbone.device,
        backbone.linear,
    )
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
            prompt = tokenizer(example.prompt)["input_ids"]
            check_length(example.where, len(prompt) + task.new_tokens, context)
            found.append(Question(example, tuple(prompt)))
            continue
        place = 0
        for scored in read_together(encode_choices(tokenizer, example)):
            check_length(example.where, scored.length, context)
            found.append(Question(example, scored.prompt, place, scored.choices))
            place += len(scored.choices)
    return found


def probes(task: Task, examples: Sequence[Example], tokenizer: Any) -> list[Question]:
    """The first few examples, each made to give its own answer, whatever the task's kind is."""
    found = []
    for example in examples[:PROBES]:
        prompt, answer = encode_answer(tokenizer, example.prompt, example.answer)
        found.append(Question(example, tuple(prompt), 0, (tuple(answer),)))
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
    pairs: Sequence[Asked], slots: Sequence[int], backbone: Backbone, *, new_tokens: int, eos: int | None, beams: int
) -> Batch:
    """The batch that asks `pairs`, padded on the left, as prompts are served; `slots`: of each tenant."""
    width = max(len(pair.question.prompt) for pair in pairs)
    width = max(width, min(-(-width // WIDTH_TOKENS) * WIDTH_TOKENS, backbone.shape.context - new_tokens))
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
        beams=beams,
        new_tokens=new_tokens,
        eos=() if eos is None else (eos,),
    )


def forced_logits(
    arm: Arm, pairs: Sequence[Asked], slots: Sequence[int], backbone: Backbone
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits fp32 [Q, N, V], tokens int64 [Q, N]) of requests that are made to say their `forced` tokens, PAD after
    them, N the longest of them."""
    longest = max(len(pair.question.forced) for pair in pairs)
    rows = [[*pair.question.forced, *[PAD] * (longest - len(pair.question.forced))] for pair in pairs]
    forced = torch.tensor(rows, device=backbone.device)
    batch = batch_of(pairs, slots, backbone, new_tokens=longest, eos=None, beams=1)
    logits = arm.generate(batch, forced=forced, with_logits=True).logits
    assert logits is not None
    return logits, forced


def answer(
    arm: Arm, task: Task, pairs: Sequence[Asked], slots: Sequence[int], backbone: Backbone, tokenizer: Any, beams: int
) -> list[Any]:
    """What each request of one batch gave: the text that it generated, or, for each choice that it scores, the sum of
    the log-probabilities of its tokens after the prompt."""
    if task.kind == "generate":
        eos = tokenizer.eos_token_id
        batch = batch_of(pairs, slots, backbone, new_tokens=task.new_tokens, eos=eos, beams=beams)
        return [decode(tokenizer, tokens, task.stop) for tokens in arm.generate(batch).tokens.tolist()]
    logits, _ = forced_logits(arm, pairs, slots, backbone)
    rows = zip(logits.log_softmax(dim=-1), (pair.question for pair in pairs), strict=True)
    return [scores_of(question.choices, row[: len(question.forced)]) for row, question in rows]


def ask_all(
    arm: Arm,
    task: Task,
    asked: Sequence[Question],
    slots: Sequence[int],
    backbone: Backbone,
    tokenizer: Any,
    *,
    requests: int,
    beams: int,
    advance: Callable[[], object] = lambda: None,
) -> dict[tuple[int, str], str]:
    """The prediction of every tenant on every example, as `predictions` has them, in mixed batches of `requests`;
    `advance` is called after each."""
    given: list[tuple[Asked, Any]] = []
    for pairs in mixed(len(slots), asked, requests, SEED):
        given += zip(pairs, answer(arm, task, pairs, slots, backbone, tokenizer, beams), strict=True)
        advance()
    return predictions(given, task)


def predictions(given: Sequence[tuple[Asked, Any]], task: Task) -> dict[tuple[int, str], str]:
    """{(tenant, id of the example): prediction} of all that was asked; of choices, the one that wins."""
    if task.kind == "generate":
        return {(pair.tenant, pair.question.example.id): text for pair, text in given}
    rows: dict[tuple[int, str], dict[int, float]] = {}
    examples = {}
    for pair, scores in given:
        example = pair.question.example
        rows.setdefault((pair.tenant, example.id), {}).update(enumerate(scores, start=pair.question.choice))
        examples[example.id] = example
    return {key: examples[key[1]].choices[choose([row[at] for at in sorted(row)])] for key, row in rows.items()}
