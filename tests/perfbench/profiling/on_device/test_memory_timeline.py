"""The memory timeline: categories of hand-made events, and the peak of a real call against the allocator's."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from perfbench.measure.on_device import arms, memory, workload
from perfbench.profiling import memory_picture
from perfbench.profiling.on_device import memory_timeline, probes
from perfbench.profiling.on_device.ranges import PhaseClock, Ranges
from perfbench.runtimes import backbone
from perfbench.spec import cases, scenario

ROOT = Path(__file__).resolve().parents[4]


def test_what_is_allocated_is_freed_from_its_own_category() -> None:
    events = [
        (1000, "prefill", "", 0, 0, ""),
        (2000, None, "cpu", 10, 100, "kv"),
        (3000, None, "cuda", 10, 999, "kv"),  # of another device
        (4000, None, "cpu", 20, 30, "activations"),
        (5000, None, "cpu", 20, -30, "other"),  # freed where something else is going on
        (6000, None, "cpu", 10, -100, "activations"),
        (7000, None, "cpu", 20, 7, "other"),  # the address again
        (8000, None, "cpu", 66, -5, "other"),  # was there before the call
    ]
    found = memory_timeline.timeline(events, "cpu", {"weights": 1000, "other": 5})
    assert found["times_us"] == [0, 1, 3, 4, 5, 6, 7]
    assert found["bytes"]["kv"] == [0, 100, 100, 100, 0, 0, 0]
    assert found["bytes"]["activations"] == [0, 0, 30, 0, 0, 0, 0]
    assert found["bytes"]["other"] == [5, 5, 5, 5, 5, 12, 7]
    assert found["bytes"]["weights"] == [1000] * 7
    assert (found["peak_bytes"], found["peak_at_us"]) == (1135, 3)
    assert found["phases"] == [["prefill", 0]]


@pytest.fixture(scope="module")
def model() -> backbone.Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


@pytest.mark.parametrize(
    ("runtime", "arm"), [("transformers", "para"), ("static", "lora"), ("transformers", "peft"), ("static", "none")]
)
def test_the_peak_is_the_allocators_and_each_category_is_where_it_should_be(
    model: backbone.Backbone, runtime: str, arm: str, tmp_path: Path
) -> None:
    document = scenario.load(ROOT / "scenarios" / "smoke.yaml", ["runtime=[transformers, static]", "device=cpu"])
    comparisons = cases.expand(scenario.resolve(document, "cpu", "asked for"))
    comparison = next(one for one in comparisons if one.runtime == runtime)
    batch = workload.make(comparison.workload, model, seed=0)
    case = next(one for one in comparison.cases if one.arm == arm)
    built = arms.build(case, model, batch, comparison.workload.resident, 0, tmp_path)
    ranges = Ranges(arm)

    def call() -> None:
        clock = PhaseClock(model.device, ranges, built.batch.new_tokens)
        clock.mark()
        built.arm.generate(built.batch, clock=clock)

    with probes.on(ranges, built.arm, "eager"):
        call()
        held = probes.resident(built.arm, model)
        assert sum(held.values()) == memory.resident_bytes(built.arm)
        found = memory_timeline.record(call, model.device, held, ranges.names, f"{arm} / ")
    built.arm.generate(built.batch)
    peak = memory.peaks(built.arm, built.batch, memory.resident_bytes(built.arm), model.device, None)
    # transformers asks the clock for a tensor of one bool for each row, in lines of 64 bytes.
    assert found["peak_bytes"] == pytest.approx(peak["peak_allocated_bytes"], abs=256)
    assert [name for name, _ in found["phases"]] == ["prefill", "decode step 1", "decode step 2", "decode step 3"]
    highest = {category: max(values) for category, values in found["bytes"].items()}
    assert highest["weights"] == model.bytes
    assert (highest["adapters"] > 0) == (arm != "none")
    shape, rows = model.shape, len(built.batch.slots)
    tokens = built.batch.input_ids.shape[1] + built.batch.new_tokens - 1
    kv = 2 * shape.layers * shape.kv_heads * shape.head_dim * rows * tokens * 4
    # transformers' cache copies a layer's keys as it grows; the static one is as large as it will be.
    assert kv <= highest["kv"] + kv / tokens
    assert highest["kv"] < 2 * kv
    assert highest["activations"] > 0
    last = {category: values[-1] for category, values in found["bytes"].items()}
    assert last["activations"] == 0, "every activation is given back"
    assert torch.is_inference_mode_enabled() is False


def test_the_picture_is_whole_and_needs_nothing_else() -> None:
    events = [(i * 1000, None, "cpu", i, 1000 * i, "activations") for i in range(1, 50)]
    found = memory_timeline.timeline([(0, "prefill", "", 0, 0, ""), *events], "cpu", {"weights": 10**6})
    svg = memory_picture.render(found, "<script>alert('lora')</script> & more")
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert not [node for node in root.iter() if node.tag.endswith("script")]
    assert "href" not in svg
    assert "url(" not in svg
    assert "prefill" in svg


def test_a_picture_of_a_call_that_allocates_nothing() -> None:
    svg = memory_picture.render(memory_timeline.timeline([], "cpu", {"weights": 1}), "nothing")
    assert ElementTree.fromstring(svg).tag.endswith("svg")
