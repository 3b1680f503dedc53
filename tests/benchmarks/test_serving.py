"""A tenant's admission, a decode step on each runtime, and the loading of a scenario: the methods beside each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perfbench.figures.roof import decode_step
from perfbench.files.yaml_source import read
from perfbench.measure.on_device import counts
from perfbench.methods import parameters
from perfbench.methods.registry import METHODS
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.transformers_plan import PlanArm
from perfbench.spec import scenario
from perfbench.spec.traffic import is_traffic
from tests.benchmarks.conftest import DEVICE, DTYPE, KERNELS, REQUESTS, SERVED, make_bank

PROMPT, NEW = 64, 9
SCENARIOS = [
    path
    for path in sorted((Path(__file__).parents[2] / "scenarios").glob("*.yaml"))
    if not is_traffic(read(path).values)
]
Timed = Callable[..., None]


def make_batch(base: backbone.Backbone) -> Batch:
    ids = torch.randint(3, base.shape.vocab, (REQUESTS, PROMPT), device=DEVICE)
    return Batch(ids, torch.ones_like(ids), tuple(range(REQUESTS)), beams=1, new_tokens=NEW)


def least_bytes(base: backbone.Backbone, method: str) -> int:
    """What the last decode step must read."""
    plan = None if method == "none" else parameters.meta_plan(method, base.shape, METHODS[method].options())
    served = list(range(REQUESTS)) if plan else []
    work = decode_step(
        base.model.config.to_dict(), DTYPE, prompt_tokens=[PROMPT] * REQUESTS, generated_tokens=NEW - 2, beams=1,
        adapters=[(plan, served)] if plan else [],
    )  # fmt: skip
    return work.bytes


@pytest.mark.parametrize("method", [name for name in SERVED if name != "none"])
@pytest.mark.benchmark(group="admission: one tenant's plan into its slot")
def test_admission(timed: Timed, base: backbone.Backbone, method: str) -> None:
    options, module = METHODS[method].options(), parameters.implementation(method)
    bank = make_bank(base, method, residents=1)
    assert bank is not None
    plan = module.plan(parameters.make(method, base.shape, options, seed=9), base.shape, options)
    timed(lambda: bank.admit(plan), 2 * bank.bytes_per_slot, setup=lambda: bank.evict(0))
    with pytest.raises(ValueError, match="holds no adapter"):
        bank.evict(1)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("method", SERVED)
@pytest.mark.benchmark(group="static: one decode step, 8 tenants in 8 requests")
def test_static_decode_step(timed: Timed, base: backbone.Backbone, method: str, kernels: str) -> None:
    arm, batch = StaticArm(base, make_bank(base, method), kernels), make_batch(base)
    tokens = arm.generate(batch).tokens[:, 0]
    decoder = arm.decoder
    assert decoder is not None

    def to_the_last_step() -> None:
        with torch.inference_mode():
            decoder.start(batch)
            decoder.prefill()
            for _ in range(NEW - 2):
                decoder.step(tokens)

    exact = counts.decode_step(arm, batch, DEVICE)
    arm.generate(batch)  # counting was done on other lengths: this batch's decoder is made again
    assert arm.decoder is not None
    decoder = arm.decoder
    timed(lambda: decoder.step(tokens), least_bytes(base, method), setup=to_the_last_step, **exact)
    assert decoder.steps == NEW - 1
    arm.close()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("method", SERVED)
@pytest.mark.benchmark(group="transformers: generate() of 9 tokens, 8 tenants in 8 requests")
def test_transformers_generate(timed: Timed, base: backbone.Backbone, method: str, kernels: str) -> None:
    arm, batch = PlanArm(base, make_bank(base, method), kernels), make_batch(base)
    exact = counts.decode_step(arm, batch, DEVICE)
    timed(lambda: arm.generate(batch), NEW * least_bytes(base, method), **exact)
    assert arm.generate(replace(batch, new_tokens=2)).tokens.shape == (REQUESTS, 2)


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
@pytest.mark.benchmark(group="scenario: read, check and resolve")
def test_loading_a_scenario(benchmark: object, path: Path) -> None:
    def load() -> scenario.Scenario:
        return scenario.resolve(scenario.load(path), "cpu")

    assert benchmark(load).methods  # type: ignore[operator]
