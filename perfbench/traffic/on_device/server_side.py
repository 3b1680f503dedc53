"""A side of `perfbench ab` that is a server over HTTP: this process sends it waves of requests and speaks the protocol
of the gate. Started as `python -m perfbench.traffic.on_device.server_side URL`.

A wave is as many requests as the scenario's closed loop keeps open, sent together, and is timed as one batch: a step is
over when the last of them has its token. Both servers stay up from the first pair to the last, so that what differs
between two starts of one and the same server is not in the spread.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perfbench.errors import PerfbenchError
from perfbench.figures.metrics import sample_metrics
from perfbench.machine.device import device_kind
from perfbench.measure.on_device.worker import Emit, serve
from perfbench.runtimes.continuous.engine import Request
from perfbench.serving.extra import need
from perfbench.spec import cases, method_plugins, traffic
from perfbench.spec.backbone_config import shape_of
from perfbench.spec.cases import Case
from perfbench.spec.traffic import Target, TrafficScenario, points_of
from perfbench.traffic.on_device import load
from perfbench.traffic.on_device.traffic_worker import TargetFailedError, Worker
from perfbench.traffic.requests import all_at_once
from perfbench.traffic.started_server import version_of

# Waves of each case before anything is timed.
WARM_WAVES = 2
# And before each wave that is timed. A server that has just answered is slower than one that has rested, and the
# baseline's, which two processes ask, rests less: of two servers alike the candidate seemed 29% faster without them.
UNTIMED_WAVES = 3


@dataclass(frozen=True)
class Wave:
    """What is timed: one arm, so many tenants, so many requests at once."""

    case: Case
    tenants: int
    in_flight: int

    @property
    def id(self) -> str:
        """Such as `http/t8/in-flight-4/lora`."""
        return f"http/t{self.tenants}/in-flight-{self.in_flight}/{self.case.arm}"


def main() -> int:
    """Serves turns until standard input ends; exit code 0, or 1 after an `error` event."""
    return serve(_serve)


def _serve(emit: Emit) -> None:
    job = json.loads(sys.stdin.readline())
    need("a server as a side of perfbench ab")
    method_plugins.load()
    sets = [*job["set"], f"target.openai={sys.argv[1]}"]
    scenario = traffic.load(job["scenario"], sets, device_kind)
    _check(scenario, Path(job["scenario"]))
    points = points_of(scenario.traffic)
    every = [Wave(case, tenants, open_ones) for case in scenario.comparison.cases for tenants, _, open_ones in points]
    waves = {wave.id: wave for wave in every if job["only"] is None or wave.id in job["only"]}
    asked = Asked(scenario)
    if job["prepare"]:
        asked.prove(waves.values(), job["threads"], emit)
    else:
        for wave in waves.values():
            emit("phase", case=wave.id, text="warming up")
            for _ in range(WARM_WAVES):
                asked.sample(wave)
    assert scenario.target is not None
    versions = {"server": version_of(scenario.target)}
    emit("ready", cases=list(waves), requests=max(wave.in_flight for wave in every), versions=versions)
    for line in sys.stdin:
        turn = json.loads(line)
        emit("phase", case=turn["case"], text="timing")
        samples = [asked.sample(waves[turn["case"]]) for _ in range(turn["repetitions"])]
        emit("block", case=turn["case"], samples=samples)


def _check(scenario: TrafficScenario, file: Path) -> None:
    """Raises PerfbenchError where its requests make no waves."""
    given = scenario.traffic
    if not given.in_flight:
        raise PerfbenchError(
            f"{file}: traffic.arrivals: expected closed, with in_flight: two servers are sent the same number of "
            f"requests at once; got {given.arrivals}"
        )
    if given.new_tokens.sigma or given.new_tokens.median < 2:
        raise PerfbenchError(
            f"{file}: traffic.new_tokens: expected one number of at least 2, since a wave is timed step by step, got "
            f"{'a distribution' if given.new_tokens.sigma else given.new_tokens.median}"
        )


class Asked:
    """The server, as the scenario's arms see it."""

    def __init__(self, scenario: TrafficScenario):
        """PerfbenchError where nobody answers there."""
        from perfbench.traffic.on_device.over_http import OverHttp

        assert scenario.target is not None
        self.scenario = scenario
        self.target: Target = scenario.target
        self.vocabulary = shape_of(scenario.comparison.backbone).vocab
        # Prompts that nobody has sent before: of what one side has sent, the server may have kept the prefix.
        self._seeds = itertools.count(time.time_ns() % 2**40)
        self._arms = {
            case.arm: OverHttp(self.target, self.vocabulary, bare=case.method == "none")
            for case in scenario.comparison.cases
        }

    def wave(self, wave: Wave) -> tuple[list[Request], float]:
        """(its requests with what they got, when they were sent, in seconds). TargetFailedError where one failed."""
        import torch

        seed = next(self._seeds)
        due = all_at_once(self.scenario.traffic, wave.tenants, wave.in_flight, str(seed))
        texts = load.prompts(due, self.vocabulary, seed, torch.device("cpu"))
        driven = self._arms[wave.case.arm].drive(due, texts, None)
        if driven.failures:
            first = min(driven.failures)
            raise TargetFailedError(f"{len(driven.failures)} of {len(due)} requests failed: {driven.failures[first]}")
        return driven.requests, driven.start

    def sample(self, wave: Wave) -> dict[str, Any]:
        """The figures of one wave, as of a batch, after some that are not timed."""
        for _ in range(UNTIMED_WAVES):
            self.wave(wave)
        requests, start = self.wave(wave)
        steps = zip(*(request.token_s for request in requests), strict=True)
        times_ms = [(max(step) - start) * 1e3 for step in steps]
        return sample_metrics(times_ms, len(requests), times_ms[-1])

    def prove(self, waves: Any, threads: int, emit: Emit) -> None:
        """Says a `case` for each wave: whether its answers are those of its tenants' own adapters, made again here."""
        heard: dict[str, Any] = {}

        def note(event: str, **fields: Any) -> None:
            heard.update(fields)
            if event == "phase":
                emit(event, **fields)

        worker = Worker(self._opening(threads), note)
        for wave in waves:
            worker.prepare({"arm": wave.case.arm, "tenants": wave.tenants})
            emit("phase", case=wave.id, text="asking")
            worker.arms[wave.case.arm].answers = self.wave(wave)[0]
            worker.prove({"arm": wave.case.arm})
            proof = heard["proof"]
            # Who says that the server has other adapters wants no proof.
            told = proof["status"] == "not_proved" and self.target.adapters == "unknown"
            status = "ok" if told else proof["status"]
            emit("case", case=wave.id, status=status, reason=proof["reason"], check={"passed": status == "ok"})

    def _opening(self, threads: int) -> dict[str, Any]:
        return {
            "comparison": cases.to_json(self.scenario.comparison),
            "target": asdict(self.target),
            "seed": self.scenario.common.seed,
            "threads": threads,
            "plugins": method_plugins.as_json(),
        }


if __name__ == "__main__":
    sys.exit(main())
