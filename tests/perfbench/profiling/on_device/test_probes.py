"""Ranges around what a runtime calls: every kind is there, the result is the same, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers.cache_utils import Cache

from perfbench.kernels import low_rank, qkv_epilogue
from perfbench.measure.on_device import arms, workload
from perfbench.profiling import breakdown, trace
from perfbench.profiling.on_device import probes
from perfbench.profiling.on_device.ranges import PhaseClock, Ranges
from perfbench.runtimes import backbone
from perfbench.runtimes.static import forward as static_forward
from perfbench.runtimes.static.adapters import Adapters
from perfbench.spec import cases, scenario

ROOT = Path(__file__).resolve().parents[4]
LINEARS = {"q", "k", "v", "o", "gate", "up", "down"}
HUGGING_FACE = {*LINEARS, "attention, rest", "mlp, rest", "norm", "residual", "embed", "rotation", "head", "kv cache",
                "model, rest", breakdown.LOOP}  # fmt: skip
STATIC = {"qkv", "o", "gate_up", "down", "head", "qkv epilogue", "attention", "residual norm", "swiglu epilogue",
          breakdown.LOOP}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> backbone.Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


def build(model: backbone.Backbone, runtime: str, arm: str, beams: int, folder: Path) -> arms.BuiltArm:
    changes = ["runtime=[transformers, static]", "device=cpu", f"workload.beams={beams}"]
    document = scenario.load(ROOT / "scenarios" / "smoke.yaml", changes)
    comparisons = cases.expand(scenario.resolve(document, "cpu", "asked for"))
    comparison = next(one for one in comparisons if one.runtime == runtime)
    case = next(one for one in comparison.cases if one.arm == arm)
    batch = workload.make(comparison.workload, model, seed=0)
    return arms.build(case, model, batch, comparison.workload.resident, 0, folder)


def phases(built: arms.BuiltArm, method: str, folder: Path) -> tuple[breakdown.Phases, list[trace.Event], Any]:
    """(phases, events, tokens) of one call under the profiler, through a trace in a file."""
    ranges = Ranges(method)
    clock = PhaseClock(torch.device("cpu"), ranges, built.batch.new_tokens)
    with probes.on(ranges, built.arm, "eager"), profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        clock.mark()
        found = built.arm.generate(built.batch, clock=clock)
    profiler.export_chrome_trace(str(folder / "a.trace.json"))
    events = trace.read(folder / "a.trace.json").events
    trace.mark_ranges(events, ranges.names)
    return breakdown.of_call(events, ranges.names, method), events, found.tokens


@pytest.mark.parametrize(
    ("runtime", "arm", "beams", "in_prefill", "in_decode"),
    [
        ("transformers", "none", 1, HUGGING_FACE, HUGGING_FACE),
        ("transformers", "lora", 3, HUGGING_FACE | {"bind adapters"}, HUGGING_FACE),
        ("transformers", "para", 1, HUGGING_FACE | {"bind adapters", "prompt vectors"}, HUGGING_FACE),
        ("transformers", "peft", 1, HUGGING_FACE, HUGGING_FACE),
        ("static", "none", 3, STATIC, STATIC),
        ("static", "lora", 1, STATIC | {"bind adapters", "shrink", "expand"}, STATIC | {"shrink"}),
        ("static", "para", 3, STATIC | {"bind adapters", "prompt vectors"}, STATIC),
    ],
)
def test_every_kind_is_found_and_the_tokens_are_the_same(
    model: backbone.Backbone,
    tmp_path: Path,
    runtime: str,
    arm: str,
    beams: int,
    in_prefill: set[str],
    in_decode: set[str],
) -> None:
    built = build(model, runtime, arm, beams, tmp_path / "adapters")
    expected = built.arm.generate(built.batch).tokens
    found, events, tokens = phases(built, arm, tmp_path)
    assert torch.equal(tokens, expected)
    steps = [f"decode step {step}" for step in range(1, built.batch.new_tokens)]
    assert list(found) == ["prefill", *steps]
    # The bare arm's range around binding is there, and empty.
    assert set(found["prefill"]) - in_prefill <= {"bind adapters"}
    assert in_prefill <= set(found["prefill"])
    for step in steps:
        assert set(found[step]) == in_decode
    names = {event["name"] for event in events if event["cat"] == "user_annotation"}
    assert {f"{arm} / prefill", f"{arm} / {steps[-1]}"} <= names
    for layer in range(model.shape.layers):
        assert f"layer {layer} / o" in names


def test_a_replayed_step_is_profiled_launch_by_launch(model: backbone.Backbone, tmp_path: Path) -> None:
    built = build(model, "static", "lora", 1, tmp_path)
    assert not probes.replays(built.arm)
    expected = built.arm.generate(built.batch).tokens
    captured = []

    def capture(step: Any) -> Any:
        captured.append(step)
        return step

    built.arm.capture, built.arm.decoder = capture, None
    assert probes.replays(built.arm)
    found, _, tokens = phases(built, "lora", tmp_path)
    assert torch.equal(tokens, expected)
    assert set(found["decode step 2"]) == STATIC | {"shrink"}
    assert not captured
    assert torch.equal(built.arm.generate(built.batch).tokens, expected)
    assert captured, "afterwards it is captured as before"


def test_adapters_own_ranges_name_the_method(model: backbone.Backbone, tmp_path: Path) -> None:
    for arm, expected in (("lora", "lora low rank"), ("ia3", "ia3 row scale"), ("peft", "peft lora_B")):
        _, events, _ = phases(build(model, "transformers", arm, 1, tmp_path / arm), arm, tmp_path)
        assert f"layer 0 / q / {expected}" in {event["name"] for event in events}


def test_a_time_planted_in_one_kind_shows_there(model: backbone.Backbone, tmp_path: Path) -> None:
    """An operation added inside o of the static runtime's decoder is counted for o, and for nothing else."""
    built = build(model, "static", "lora", 1, tmp_path)
    before = phases(built, "lora", tmp_path)[0]["decode step 2"]
    with _one_more_operation(built.arm):
        after = phases(built, "lora", tmp_path)[0]["decode step 2"]
    changed = {kind: after[kind].operations - before[kind].operations for kind in before}
    assert changed.pop("o") == model.shape.layers
    assert not any(changed.values())


@contextmanager
def _one_more_operation(arm: Any) -> Iterator[None]:
    real = static_forward.OF_FEW_ROWS["eager"]
    products = [layer.projections["o"].weight for layer in arm.weights.layers]

    def slower(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Any:
        if any(weight is product for product in products):
            x = x.add(0)
        return real(x, weight, *rest)

    static_forward.OF_FEW_ROWS["eager"], arm.decoder = slower, None
    try:
        yield
    finally:
        static_forward.OF_FEW_ROWS["eager"], arm.decoder = real, None


@pytest.mark.parametrize(("runtime", "arm"), [("transformers", "lora"), ("transformers", "peft"), ("static", "para")])
def test_nothing_is_left_behind_even_after_an_error(
    model: backbone.Backbone, tmp_path: Path, runtime: str, arm: str
) -> None:
    built = build(model, runtime, arm, 1, tmp_path)

    def state() -> Any:
        modules = [
            (name, sorted(vars(module)), list(module._forward_hooks), list(module._forward_pre_hooks))
            for name, module in built.arm.model.named_modules()
        ]
        shared = (static_forward.product, static_forward.scaled_dot_product_attention, Adapters.take,
                  Cache.update, static_forward.Forward._product, static_forward.Forward._generate_scales,
                  dict(low_rank.SHRINKS), dict(qkv_epilogue.FORMS))  # fmt: skip
        return modules, shared, sorted(vars(built.arm))

    before = state()
    seen = []

    def call() -> None:
        with probes.on(Ranges(arm), built.arm, "eager"):
            seen.append(state())
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        call()
    assert seen[0] != before
    assert state() == before
