"""Two processes that serve one backbone, started once, against one: every method, and how a rank that dies is named."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from perfbench.errors import PerfbenchError
from perfbench.measure.on_device import arms, ranks, worker
from perfbench.methods.registry import METHODS
from perfbench.runtimes.generation import Batch, StepClock
from perfbench.runtimes.static.arm import StaticArm
from perfbench.spec import cases, scenario

OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "road": {"group_size": 2},  # 86 outputs of each rank are no multiple of the default one
    "vera": {"rank": 16},
    "mixed": {"of": ["lora", "fanlora", "ia3", "para", "miss", "ia3-original"]},
    "converted": {"of": "miss", "rank": 8},
}
SERVED = [name for name, method in METHODS.items() if method.in_bank]
RESIDENT, LAYERS, STEPS = 6, 3, 4


def scenario_of(methods: list[str], size: int = 2) -> scenario.Scenario:
    values = {
        "name": "ranks",
        "backbone": "llama-tiny",
        "dtype": "fp32",
        "device": "cpu",
        "runtime": "static",
        "tensor_parallel_size": size,
        "methods": [{name: OWN_OPTIONS[name]} if name in OWN_OPTIONS else name for name in methods],
        "workload": {"prompt_tokens": 9, "new_tokens": STEPS, "requests": 5, "tenants": 5, "resident": RESIDENT},
    }
    return scenario.resolve(scenario.load(values), "cpu")


def job_of(comparisons: tuple[cases.Comparison, ...]) -> dict[str, Any]:
    return {
        "comparisons": [cases.to_json(comparison) for comparison in comparisons],
        "plugins": [],
        "threads": 2,
        "seed": 0,
    }


@pytest.fixture(scope="module")
def session() -> Iterator[worker.Session]:
    """Of all served methods, with the process of rank 1 beside this one."""
    comparisons = cases.expand(scenario_of([name for name in SERVED if name != "none"]))
    opened = worker.open_session(job_of(comparisons), comparisons[0], lambda event, **fields: None)
    opened.cases = {case.method: case for case in comparisons[0].cases}  # type: ignore[attr-defined]
    yield opened
    others = opened.backbone.rank.others
    others.end()
    assert not others._meeting.exists()


def ragged(batch: Batch, beams: int) -> Batch:
    """Prompts of unlike lengths; one request has no adapter, the others' tenants are any of the residents."""
    mask = torch.ones_like(batch.input_ids)
    mask[1, :8] = mask[3, :2] = 0
    return replace(batch, input_ids=batch.input_ids * mask, attention_mask=mask, slots=(2, 5, -1, 3, 1), beams=beams)


def test_where_the_ranks_meet_stays_for_those_who_come_late(session: Any) -> None:
    """A rank that adds up for the first time looks there again: once it was gone by then, and a run waited in vain."""
    assert session.backbone.rank.others._meeting.is_dir()


@pytest.mark.parametrize("method", SERVED)
def test_two_processes_generate_what_one_does(
    session: Any, method: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = session.cases[method]
    whole = replace(session.backbone, rank=None, fused=None)
    one = arms.build(case, whole, session.batch, RESIDENT, 0, tmp_path, figures=False).arm
    two = session._build(case).arm
    assert type(one) is StaticArm
    assert isinstance(two, ranks.LeadingArm)
    sums: list[Any] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", _noting(sums, torch.distributed.all_reduce))
    for beams in (1, 3):
        batch = ragged(session.batch, beams)
        sums.clear()
        assert torch.equal(two.generate(batch).tokens, one.generate(batch).tokens)
        assert len(sums) == 2 * LAYERS * STEPS, "two sums a layer and step, whatever the method"
    two.close()
    one.close()


def _noting(noted: list[Any], own: Any) -> Any:
    def noting(tensor: torch.Tensor) -> None:
        noted.append(tensor.shape)
        own(tensor)

    return noting


def test_ranks_that_choose_other_tokens_are_seen(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of rank 0 is another one, planted: its sums are right, its choices are not."""
    arm = session._build(session.cases["lora"]).arm
    batch = ragged(session.batch, 1)
    arm.generate(batch)
    monkeypatch.setattr(arm.weights, "head", arm.weights.embed.weight)
    arm.generate(batch)
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 chose other tokens than rank 0"):
        arm.close()


class _Killing(StepClock):
    """Ends a process when the second token is there."""

    def __init__(self, process: int):
        super().__init__(torch.device("cpu"))
        self._process = process

    def mark(self) -> None:
        super().mark()
        if len(self._marks) == 2:
            os.kill(self._process, signal.SIGKILL)


def test_a_rank_that_dies_is_named_at_once(session: Any) -> None:
    """Runs last: the session is of no use after it."""
    arm = session._build(session.cases["lora"]).arm
    other = session.backbone.rank.others
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^rank 1 of 2 was ended by SIGKILL$"):
        arm.generate(ragged(session.batch, 1), clock=_Killing(other.processes[0].pid))
    assert time.monotonic() - start < ranks.PATIENCE_S / 2, "it was not waited for"


@pytest.mark.parametrize(
    ("kind", "raised"), [("bad_input", PerfbenchError), ("out_of_memory", MemoryError), ("crashed", RuntimeError)]
)
def test_what_a_rank_says_when_it_errs_is_said_with_its_number(kind: str, raised: type[Exception]) -> None:
    others, there = _of_a_pipe()
    there.send((kind, "a folder: no adapter"))
    with pytest.raises(raised, match=r"^rank 1 of 2: a folder: no adapter$"):
        others._answer_of(1)


def test_a_silent_rank_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    others, _there = _of_a_pipe()  # which would close if nobody had it
    monkeypatch.setattr(ranks, "PATIENCE_S", 0)
    with pytest.raises(RuntimeError, match=r"^rank 1 of 2 has said nothing for 0 s$"):
        others._answer_of(1)


def _of_a_pipe() -> tuple[ranks.Others, Any]:
    others: ranks.Others = object.__new__(ranks.Others)
    others.ranks = 2
    here, there = multiprocessing.Pipe()
    others._links = [here]
    return others, there
