"""The child process of traffic: it holds the backbone and the arms, and measures what it is told, job after job.

It reads jobs, one line of JSON each, until standard input ends, and says `done` after each. Which tenants, which rate
and what follows from the answers is decided by the parent.
"""

from __future__ import annotations

import gc
import json
import random
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
import transformers

from perfbench.errors import PerfbenchError
from perfbench.measure.on_device import arms, repetition
from perfbench.measure.on_device.worker import Emit, serve
from perfbench.methods.bank import Bank, union_layout
from perfbench.proof import as_answered
from perfbench.proof.oracle import Served
from perfbench.runtimes import backbone as backbones
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.continuous.engine import Engine, Request
from perfbench.runtimes.continuous.residency import Residency, Store
from perfbench.runtimes.continuous.rows import Rows
from perfbench.spec import cases, method_plugins
from perfbench.spec.cases import Case
from perfbench.spec.traffic import NOBODY, Targets
from perfbench.traffic.on_device import load
from perfbench.traffic.requests import Due

# Answers that the oracle makes again, at least half of them of requests whose adapter had to be loaded; and from how
# many of the last ones they are drawn.
PROVED, MOST_ANSWERS = 16, 2000


def main() -> int:
    """Serves jobs until standard input ends; exit code 0, or 1 after an `error` event."""
    return serve(_serve)


@dataclass
class Arm:
    """One method with the adapters of all its tenants, of which the bank holds some, from one measurement to the
    next. answers: of the last measurements that were not given up."""

    case: Case
    rows: Rows
    residency: Residency | None
    plan_of: Any
    answers: list[Request] = field(default_factory=list)


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
        bank, residency, plan_of = None, None, None
        if case.method != "none":
            plan_of = partial(arms.plan_of_tenant, case, self.backbone, job["tenants"], self.job["seed"])
            if getattr(case.options, "adapters", None) is not None:
                layouts = [plan_of(tenant) for tenant in range(job["tenants"])]
            else:
                layouts = arms.random_layouts(case, self.backbone.shape)
            bank = Bank(union_layout(layouts), self.job["resident"], self.backbone.dtype, self.backbone.device)
            residency = Residency(bank, Store(bank, plan_of))
        rows = Rows(self.backbone, bank, case.kernels, self.job["rows"], self.job["capacity"])
        self.arms[case.arm] = Arm(case, rows, residency, plan_of)
        self.emit(
            "prepared",
            bytes_per_tenant=0 if bank is None else bank.bytes_per_slot,
            bank_bytes=0 if bank is None else sum(t.nbytes for t in bank.tensors()),
            rows_bytes=0 if rows.adapters is None else sum(t.nbytes for t in rows.adapters.tensors()),
            cache_bytes=sum(t.nbytes for t in rows.cache.tensors()),
        )

    def measure(self, job: dict[str, Any]) -> None:
        """Requests through an engine. job: `arm`; `due`: the requests; `seed`: of their prompts; `targets`, and after
        how many `misses` it is given up, or None."""
        arm, due = self.arms[job["arm"]], [Due(*one) for one in job["due"]]
        served = due
        self.emit("phase", case=arm.case.arm, text=job["text"])
        residency = arm.residency
        if residency is not None:
            residency.store.keep({one.tenant for one in due} - {NOBODY})
        else:  # the bare backbone serves the same requests of the same tenants
            served = [replace(one, tenant=NOBODY) for one in due]
        loaded_before = 0 if residency is None else residency.loaded_bytes
        texts = load.prompts(due, self.backbone.shape.vocab, job["seed"], self.backbone.device)
        limit = None if job["misses"] is None else load.Limit(Targets(**job["targets"]), job["misses"])
        gc.collect()
        engine = Engine(arm.rows, residency, self.job["chunk"])
        requests, start, given_up = load.drive(engine, served, texts, limit)
        if given_up:
            self.emit("measured", given_up=True, sent=len(requests), answered=None, loaded_bytes=None)
            return
        arm.answers = (arm.answers + requests)[-MOST_ANSWERS:]
        found = [asdict(one) for one in load.answered(requests, due, start)]
        loaded = 0 if residency is None else residency.loaded_bytes - loaded_before
        self.emit("measured", given_up=False, sent=len(requests), answered=found, loaded_bytes=loaded)

    def prove(self, job: dict[str, Any]) -> None:
        """That some of the arm's answers are those of their adapters."""
        arm = self.arms[job["arm"]]
        self.emit("phase", case=arm.case.arm, text="proving answers")
        sampled = sample(arm.answers, self.job["seed"])
        plans: dict[int, Any] = {NOBODY: None}
        for tenant in {request.tenant for request in sampled} - {NOBODY}:
            plans[tenant] = tuple(layer.map(torch.Tensor.cpu) for layer in arm.plan_of(tenant))
        asked = [
            Served(request.prompt, torch.tensor(request.tokens, device=self.backbone.device), plans[request.tenant],
                   request.tenant)
            for request in sampled
        ]  # fmt: skip
        others = [plans[_another(request.tenant, list(plans))] for request in sampled]
        proof = as_answered.check(self.backbone, asked, others, adapters=arm.residency is not None)
        self.emit("proved", proof=asdict(proof))


def sample(answers: list[Request], seed: int) -> list[Request]:
    """PROVED answers of different tenants, as far as there are: half of them such whose adapter was loaded for them,
    because what goes wrong there shows there."""
    draw = random.Random(seed)
    order = draw.sample(answers, len(answers))
    order.sort(key=lambda request: not request.loaded)
    of_tenants = list({request.tenant: request for request in reversed(order)}.values())[::-1]
    loaded = [request for request in of_tenants if request.loaded][: PROVED // 2]
    rest = [request for request in of_tenants if request not in loaded]
    found = (loaded + rest)[:PROVED]
    return found + [request for request in order if request not in found][: PROVED - len(found)]


def _another(tenant: int, tenants: list[int]) -> int:
    """The next of these tenants, NOBODY among them."""
    return tenants[(tenants.index(tenant) + 1) % len(tenants)]


if __name__ == "__main__":
    sys.exit(main())
