"""The breakdown of hand-made traces, whose every figure is known."""

from __future__ import annotations

from typing import Any

import pytest

from perfbench.profiling.breakdown import Figures, bound, kind_of, of_call, spread, total, typical

NAMES = {"layer 0", "layer 0 / q", "layer 0 / q / lora low rank", "head"}


def event(name: str, start: float, end: float, cat: str = "cpu_op", **args: Any) -> dict[str, Any]:
    """One complete event; times in microseconds."""
    where = (0, 7) if cat in ("kernel", "gpu_memcpy") else (1, 1)
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start,
            "pid": where[0], "tid": where[1], "args": args}  # fmt: skip


def span(name: str, start: float, end: float) -> dict[str, Any]:
    return event(name, start, end, "user_annotation")


HOST = [
    event("aten::ones", 0, 50),  # before any phase: nobody's
    span("lora / prefill", 100, 1100),
    span("layer 0", 200, 800),
    span("layer 0 / q", 300, 600),
    event("aten::linear", 310, 400),
    event("aten::mm", 320, 390),  # inside another operation
    span("layer 0 / q / lora low rank", 410, 560),
    event("aten::bmm", 420, 520),
    event("aten::add", 700, 750),  # of the layer itself
    span("head", 900, 1000),
    event("aten::mm", 910, 990),
    span("lora / decode step 1", 1100, 1300),
    event("aten::argmax", 1200, 1250),
]


def test_each_moment_belongs_to_the_innermost_range() -> None:
    phases = of_call(HOST, NAMES, "lora")
    assert set(phases) == {"prefill", "decode step 1"}
    prefill = phases["prefill"]
    assert prefill == {
        "token loop": Figures(host_ms=pytest.approx(0.3), outside_ms=pytest.approx(0.3)),
        "residual": Figures(host_ms=pytest.approx(0.3), outside_ms=pytest.approx(0.25), operations=1),
        "q": Figures(host_ms=pytest.approx(0.3), outside_ms=pytest.approx(0.11), operations=2),
        "head": Figures(host_ms=pytest.approx(0.1), outside_ms=pytest.approx(0.02), operations=1),
    }
    assert total(prefill).host_ms == pytest.approx(1.0)
    assert phases["decode step 1"]["token loop"].operations == 1


def test_another_threads_events_and_another_arms_phases_are_left_out() -> None:
    others = [dict(one, tid=2) for one in HOST if one["cat"] == "cpu_op"]
    assert of_call(HOST + others, NAMES, "lora") == of_call(HOST, NAMES, "lora")
    assert of_call(HOST, NAMES, "none") == {}


LAUNCHES = [
    span("lora / decode step 1", 0, 100),
    span("layer 0 / q", 10, 40),
    event("cudaLaunchKernel", 20, 25, "cuda_runtime", correlation=1),
    event("cuLaunchKernelEx", 30, 35, "cuda_driver", correlation=2),
    span("head", 50, 60),
    event("cudaMemcpyAsync", 52, 55, "cuda_runtime", correlation=3),
    event("cudaGraphLaunch", 80, 85, "cuda_runtime", correlation=4),
    event("gemm", 100, 150, "kernel", correlation=1),
    event("shrink", 160, 170, "kernel", correlation=2),
    event("copy", 170, 180, "gpu_memcpy", correlation=3),
    event("in a graph", 200, 210, "kernel", correlation=4),
    event("in a graph too", 215, 225, "kernel", correlation=4),
    event("nobody's", 300, 310, "kernel", correlation=99),
]


def test_kernels_belong_to_the_range_that_launched_them() -> None:
    found = of_call(LAUNCHES, NAMES, "lora")["decode step 1"]
    q, head, loop = found["q"], found["head"], found["token loop"]
    assert (q.launches, q.device_ms, q.gap_ms) == (2, pytest.approx(0.06), pytest.approx(0.01))
    assert (head.launches, head.device_ms, head.gap_ms) == (0, pytest.approx(0.01), 0)
    # A captured graph is one launch on the host and many kernels on the device.
    assert (loop.launches, loop.device_ms, loop.gap_ms) == (2, pytest.approx(0.02), pytest.approx(0.025))
    assert total(found).operations == 0


def test_one_more_launch_anywhere_is_counted() -> None:
    before = total(of_call(LAUNCHES, NAMES, "lora")["decode step 1"]).launches
    launch = event("cudaLaunchKernel", 90, 91, "cuda_runtime", correlation=5)
    planted = [launch, event("x", 230, 231, "kernel", correlation=5)]
    assert total(of_call(LAUNCHES + planted, NAMES, "lora")["decode step 1"]).launches == before + 1


def test_a_device_that_waits_is_host_bound_and_a_busy_one_is_not() -> None:
    assert bound(device_ms=6.0, step_ms=8.0) == ("host", 0.25)
    assert bound(device_ms=7.6, step_ms=8.0) == ("device", pytest.approx(0.05))
    assert bound(device_ms=9.0, step_ms=8.0) == ("device", 0.0)  # streams that overlap


def test_the_typical_step_is_the_median_over_calls_and_steps() -> None:
    calls = [
        {"prefill": {"q": Figures(host_ms=9)}, "decode step 1": {"q": Figures(host_ms=first)},
         "decode step 2": {"q": Figures(host_ms=second), "head": Figures(host_ms=1)}}
        for first, second in ((1, 2), (3, 100))
    ]  # fmt: skip
    found = typical(calls)
    assert found["prefill"]["total"]["host_ms"] == 9
    assert found["decode step"]["q"]["host_ms"] == 2.5
    assert (found["decode step"]["q"]["low_ms"], found["decode step"]["q"]["high_ms"]) == (1.75, 27.25)
    assert found["prefill"]["q"]["low_ms"] == found["prefill"]["q"]["high_ms"] == 9
    assert found["decode step"]["head"]["host_ms"] == 0.5
    assert found["decode step"]["total"]["host_ms"] == 3


def test_the_spread_is_that_of_whole_steps() -> None:
    steps = {f"decode step {ms}": {"q": Figures(host_ms=ms), "o": Figures(host_ms=1)} for ms in (1, 2, 3, 4, 5)}
    assert spread([steps]) == pytest.approx(2 / 4)
    assert spread([{"decode step 1": {"q": Figures(host_ms=2)}}] * 4) == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [("layer 3", "layer"), ("layer 3 / q", "q"), ("layer 3 / q / lora low rank", "q"), ("head", "head")],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind
