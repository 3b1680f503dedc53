"""The child process of traffic: it holds the backbone and the arms, and measures what it is told, job after job.

It reads jobs, one line of JSON each, until standard input ends, and says `done` after each. Which tenants, which rate
and what follows from the answers is decided by the parent.
"""

from __future__ import annotations

import gc
import json
import random
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import transformers

from perfbench.errors import PerfbenchError
from perfbench.measure.on_device import arms, repetition
from perfbench.measure.on_device.worker import Emit, serve
from perfbench.methods import parameters
from perfbench.methods.bank import Bank, union_layout
from perfbench.proof import as_answered
from perfbench.proof.oracle import Served
from perfbench.runtimes import backbone as backbones
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.continuous.engine import NOBODY, Engine, Request
from perfbench.runtimes.continuous.residency import Residency, Store
from perfbench.runtimes.continuous.rows import Rows
from perfbench.spec import cases, method_plugins
from perfbench.spec.cases import Case
from perfbench.spec.traffic import Targets
from perfbench.traffic.on_device import load
from perfbench.traffic.requests import Due

# Answers that the oracle makes again, at least half of them of requests whose adapter had to be loaded.
PROVED = 8


def main() -> int:
    """Serves jobs until standard input ends; exit code 0, or 1 after an `error` event."""
    return serve(_serve)


@dataclass
class Arm:
    """One method with the adapters of all its tenants, of which the bank holds some."""

    case: Case
    rows: Rows
    bank: Bank | None
    store: Store | None
    plan_of: Any
    answers: list[Request] = field(default_factory=list)  # of the last measurement that was not given up


def _serve(emit: Emit) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    worker: Worker | None = None
    for line in sys.stdin:
        job = json.loads(line)
        if worker is None:
            worker = Worker(job, emit)
        else:
            {"prepare": worker.prepare, "measure": worker.measure, "prove": worker.prove}[job["do"]](job)
        emit("done")


class Worker:
    """What the first job opens."""

    def __init__(self, job: dict[str, Any], emit: Emit):
        method_plugins.load_again(job["plugins"])
        torch.set_num_threads(job["threads"])
        if (fault := repetition.clock_fault()) is not None:
            raise PerfbenchError(f"the clock: {fault}")
        self.job, self.emit = job, emit
        comparison = cases.from_json(job["comparison"])
        emit("phase", case=None, text=f"loading {comparison.backbone}")
        self.backbone: Backbone = backbones.load(comparison.backbone, comparison.dtype, comparison.device, job["seed"])
        self.cases = {case.arm: case for case in comparison.cases}
        self.arms: dict[str, Arm] = {}
        emit("backbone", parameters=self.backbone.parameters, bytes=self.backbone.bytes)

    def prepare(self, job: dict[str, Any]) -> None:
        """An arm: its bank, empty, and its rows. job: `arm`; `tenants`: how many have adapters in folders."""
        case = self.cases[job["arm"]]
        bank, store, plan_of = None, None, None
        if case.method != "none":
            plan_of = partial(arms.plan_of_tenant, case, self.backbone, job["tenants"], self.job["seed"])
            if case.options.adapters is not None:
                layout = union_layout([plan_of(tenant) for tenant in range(job["tenants"])])
            else:
                layout = parameters.meta_plan(case.method, self.backbone.shape, case.options)
            bank = Bank(layout, self.job["resident"], self.backbone.dtype, self.backbone.device)
            store = Store(bank, plan_of)
        rows = Rows(self.backbone, bank, case.kernels, self.job["rows"], self.job["capacity"])
        self.arms[case.arm] = Arm(case, rows, bank, store, plan_of)
        self.emit(
            "prepared",
            bytes_per_tenant=0 if bank is None else bank.bytes_per_slot,
            bank_bytes=0 if bank is None else sum(t.nbytes for t in bank.tensors()),
            cache_bytes=sum(t.nbytes for t in rows.cache.tensors()),
        )

    def measure(self, job: dict[str, Any]) -> None:
        """Requests through an engine whose bank is empty at first. job: `arm`; `due`: the requests; `seed`: of their
        prompts; `targets` and `misses`, after how many of which it is given up, or None."""
        arm, due = self.arms[job["arm"]], [Due(*one) for one in job["due"]]
        self.emit("phase", case=arm.case.arm, text=job["text"])
        residency = None
        if arm.bank is not None and arm.store is not None:
            for tenant in sorted({one.tenant for one in due} - {NOBODY}):
                arm.store.of(tenant)
            residency = Residency(arm.bank, arm.store)
        else:
            due = [Due(one.due_s, NOBODY, one.prompt_tokens, one.new_tokens) for one in due]
        texts = load.prompts(due, self.backbone.shape.vocab, job["seed"], self.backbone.device)
        limit = None if job["misses"] is None else load.Limit(Targets(**job["targets"]), job["misses"])
        gc.collect()
        engine = Engine(arm.rows, residency, self.job["chunk"])
        requests, start, given_up = load.drive(engine, due, texts, limit)
        if given_up:
            self.emit("measured", given_up=True, sent=len(requests), answered=None, loaded_bytes=None)
            return
        arm.answers = requests
        found = [asdict(one) for one in load.answered(requests, due, start)]
        loaded = 0 if residency is None else residency.counted.loaded_bytes
        self.emit("measured", given_up=False, sent=len(requests), answered=found, loaded_bytes=loaded)

    def prove(self, job: dict[str, Any]) -> None:
        """That some answers of the arm's last measurement are those of their adapters."""
        arm = self.arms[job["arm"]]
        self.emit("phase", case=arm.case.arm, text="proving answers")
        sampled = sample(arm.answers, self.job["seed"])
        asked, others = [], []
        for request in sampled:
            plan = other = None
            if arm.plan_of is not None and request.tenant != NOBODY:
                plan, other = arm.plan_of(request.tenant), arm.plan_of(_another(request.tenant, job["tenants"]))
            tokens = torch.tensor(request.tokens, device=self.backbone.device)
            asked.append(Served(request.prompt, tokens, plan, request.tenant))
            others.append(other)
        self.emit("proved", proof=asdict(as_answered.check(self.backbone, asked, others)))


def sample(answers: list[Request], seed: int) -> list[Request]:
    """PROVED answers of different tenants, as far as there are, from the later half of the requests: half of them such
    whose adapter was loaded for them, because what goes wrong there shows there."""
    draw = random.Random(seed)
    later = answers[len(answers) // 2 :]
    order = draw.sample(later, len(later))
    order.sort(key=lambda request: not request.loaded)
    of_tenants = list({request.tenant: request for request in reversed(order)}.values())[::-1]
    loaded = [request for request in of_tenants if request.loaded][: PROVED // 2]
    rest = [request for request in of_tenants if request not in loaded]
    return (loaded + rest)[:PROVED]


def _another(tenant: int, tenants: int) -> int:
    """The next tenant; of one alone, one who is not there."""
    return (tenant + 1) % max(2, tenants)


if __name__ == "__main__":
    sys.exit(main())
