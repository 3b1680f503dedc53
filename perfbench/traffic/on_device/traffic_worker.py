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
from perfbench.proof import as_answered
from perfbench.proof.oracle import Served
from perfbench.runtimes import backbone as backbones
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.continuous.engine import Request
from perfbench.spec import cases, method_plugins
from perfbench.spec.cases import Case
from perfbench.spec.traffic import NOBODY, Target, Targets
from perfbench.traffic.on_device import load
from perfbench.traffic.on_device.answering import Answering, OnEngine
from perfbench.traffic.requests import Due

# Answers that the oracle makes again, at least half of them of requests whose adapter had to be loaded; and from how
# many of the last ones they are drawn.
PROVED, MOST_ANSWERS = 16, 2000


def main() -> int:
    """Serves jobs until standard input ends; exit code 0, or 1 after an `error` event."""
    return serve(_serve)


@dataclass
class Arm:
    """One method, the adapters of all its tenants, and who answers. answers: of the last measurements that were not
    given up."""

    case: Case
    plan_of: Any
    answering: Answering
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


class TargetFailedError(Exception):
    """A server failed most of its requests: there is nothing to measure."""


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
        self.target = None if job.get("target") is None else Target(**job["target"])
        emit("backbone", parameters=self.backbone.parameters, bytes=self.backbone.bytes)

    def prepare(self, job: dict[str, Any]) -> None:
        """An arm: its bank, empty, and its rows, or the server that is to have it. job: `arm`; `tenants`: how many have
        adapters in folders."""
        case, tenants = self.cases[job["arm"]], job["tenants"]
        plan_of = partial(arms.plan_of_tenant, case, self.backbone, tenants, self.job["seed"])
        answering: Answering
        if self.target is None:
            answering = OnEngine(case, self.backbone, plan_of, tenants, self.job)
        else:
            from perfbench.traffic.on_device.over_http import OverHttp

            answering = OverHttp(self.target, self.backbone.shape.vocab, bare=case.method == "none")
        self.arms[case.arm] = Arm(case, plan_of, answering)
        self.emit("prepared", **answering.sizes())

    def measure(self, job: dict[str, Any]) -> None:
        """Requests to whoever answers. job: `arm`; `due`: the requests; `seed`: of their prompts; `targets`, and after
        how many `misses` it is given up, or None;
        `in_flight`: of a closed loop, or 0."""
        arm, due = self.arms[job["arm"]], [Due(*one) for one in job["due"]]
        self.emit("phase", case=arm.case.arm, text=job["text"])
        texts = load.prompts(due, self.backbone.shape.vocab, job["seed"], self.backbone.device)
        limit = None if job["misses"] is None else load.Limit(Targets(**job["targets"]), job["misses"])
        gc.collect()
        driven = arm.answering.drive(due, texts, limit, job["in_flight"])
        sent = len(driven.requests)
        failed = [[place, due[place].tenant, why] for place, why in sorted(driven.failures.items())]
        about = {
            "given_up": driven.given_up,
            "sent": sent,
            "lag_ms": driven.lag_ms,
            "failed": failed,
            "loaded_bytes": driven.loaded_bytes,
        }
        if driven.given_up:
            self.emit("measured", answered=None, **{**about, "loaded_bytes": None})
            return
        if 2 * len(failed) > sent:
            raise TargetFailedError(f"{len(failed)} of {sent} requests failed, the first so: {failed[0][2]}")
        whole = [place for place in range(sent) if place not in driven.failures]
        requests = [driven.requests[place] for place in whole]
        arm.answers = (arm.answers + requests)[-MOST_ANSWERS:]
        answered = load.answered(requests, [driven.due[place] for place in whole], driven.start)
        if self.target is not None:
            answered = [replace(one, loaded=None) for one in answered]
        found = [asdict(one) for one in answered]
        self.emit("measured", answered=found, **about)

    def prove(self, job: dict[str, Any]) -> None:
        """That some of the arm's answers are those of their adapters."""
        arm = self.arms[job["arm"]]
        if (why := self._unprovable(arm)) is not None:
            self.emit("proved", proof={"status": "not_proved", "reason": why, "requests": 0})
            return
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
        proof = as_answered.check(self.backbone, asked, others, adapters=arm.case.method != "none")
        self.emit("proved", proof=asdict(proof))

    def _unprovable(self, arm: Arm) -> str | None:
        """Why the answers of an arm can't be made again here; None where they can."""
        if self.target is None:
            return None
        if self.target.adapters == "unknown":
            return "target.adapters says that the server has others than the scenario's, with which nothing is compared"
        if not all(request.tokens for request in arm.answers):
            return f"{self.target.openai} gives no token_ids, so that its answers can't be compared"
        return None


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
