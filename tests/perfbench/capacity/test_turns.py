"""The turns of a traffic run are found again from when its requests got their tokens."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from perfbench.capacity.simulation import Serving, simulate
from perfbench.capacity.times import MeasuredTimes
from perfbench.capacity.turns import Asked, of_run
from perfbench.errors import PerfbenchError
from perfbench.spec.traffic import Lengths, Server, Targets, Traffic
from perfbench.traffic.traffic_folder import Key, Measured

TRAFFIC = Traffic(
    prompt_tokens=Lengths(32, 0.7, 128), new_tokens=Lengths(16, 0.5, 48), tenants=None, rate_per_tenant=0.1, rates=(),
    in_flight=(), in_turn=False, zipf_exponent=1.0, without_adapter=0.0, arrivals="poisson", burstiness=1.0,
    requests=400,
)  # fmt: skip
PLANTED = MeasuredTimes(
    {1: 1.3e-3, 2: 1.8e-3, 3: 2.1e-3, 4: 2.6e-3, 5: 3.0e-3, 6: 3.3e-3, 7: 3.7e-3, 8: 4.0e-3}, 2.5e-3, 5e-5, 4e-4, ""
)
KEYS = [Key("lora", 32, 0.0, 0), Key("lora", 400, 40.0, 0), Key("lora", 400, 40.0, 1)]
MANIFEST: Any = {
    "scenario": json.loads(json.dumps({
        "traffic": asdict(TRAFFIC), "server": asdict(Server(8, 16, 64)), "targets": asdict(Targets(100, 10, 0.99)),
        "seed": 0, "repetitions": 2,
    }))
}  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> dict[Key, Measured]:
    """As a run would have measured it on a server with the planted times, to the digits that a file has."""
    asked, found = Asked.of(MANIFEST), {}
    for key in KEYS:
        due = asked.requests(key, 48 if not key.rate else TRAFFIC.requests)
        answered = simulate(due, Serving(8, 16, 64), PLANTED)
        assert answered is not None
        rounded = [
            replace(
                one,
                due_s=round(one.due_s, 7),
                wait_ms=round(one.wait_ms, 4),
                ttft_ms=round(one.ttft_ms, 4),
                itl_ms=tuple(round(gap, 4) for gap in one.itl_ms),
            )
            for one in answered
        ]
        found[key] = Measured(rounded, len(due), 0)
    return found


def test_planted_times_are_found_again(measured: dict[Key, Measured]) -> None:
    found = of_run(MANIFEST, measured, KEYS, Path("run")).times("run", 64)
    assert found.steps == pytest.approx(PLANTED.steps, rel=1e-3)
    assert found.read_s_at_least == pytest.approx(PLANTED.read_s_at_least, rel=1e-3)
    assert found.read_s_per_token == pytest.approx(PLANTED.read_s_per_token, rel=1e-3)
    assert found.load == pytest.approx(PLANTED.load, rel=1e-2)


def test_a_load_that_is_missing_from_the_requests_is_seen(measured: dict[Key, Measured]) -> None:
    """Planted: the run says of no request that its adapter was loaded."""
    silent = {
        key: found._replace(answered=[replace(one, loaded=False) for one in found.answered or ()])
        for key, found in measured.items()
    }
    assert of_run(MANIFEST, silent, KEYS, Path("run")).times("run", 64).load == 0.0


def test_requests_of_another_seed_are_refused(measured: dict[Key, Measured]) -> None:
    other = copy.deepcopy(MANIFEST)
    other["scenario"]["seed"] = 1
    with pytest.raises(PerfbenchError, match=r"^run: the requests of lora with 32 tenants are others than its seed"):
        of_run(other, measured, KEYS, Path("run"))


def test_measurements_that_were_given_up_say_nothing(measured: dict[Key, Measured]) -> None:
    given_up = {key: found._replace(answered=None) for key, found in measured.items()}
    with pytest.raises(PerfbenchError, match=r"^run: expected requests of several tokens that were answered, got none"):
        of_run(MANIFEST, given_up, KEYS, Path("run")).times("run", 64)
