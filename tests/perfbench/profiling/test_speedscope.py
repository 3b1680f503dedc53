"""The file that the viewer reads: well nested, in order, whatever the trace looks like."""

from __future__ import annotations

import random
from typing import Any

import pytest

from perfbench.profiling.speedscope import convert


def event(name: str, start: float, duration: float, cat: str = "cpu_op", pid: Any = 1, tid: Any = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": duration, "pid": pid, "tid": tid, "args": {"a": 1}}


def check_nesting(chart: dict[str, Any]) -> None:
    """AssertionError unless events are in order and each closes what was opened last."""
    opened, last = [], chart["startValue"]
    for one in chart["events"]:
        assert one["at"] >= last
        last = one["at"]
        if one["type"] == "O":
            opened.append(one["frame"])
        else:
            assert opened.pop() == one["frame"]
    assert not opened
    assert chart["endValue"] >= last


def test_a_child_ends_no_later_than_its_parent() -> None:
    content = convert([event("parent", 100, 10), event("child", 105, 20), event("next", 110, 5)], "x")
    (chart,) = content["profiles"]
    names = [frame["name"] for frame in content["shared"]["frames"]]
    told = [(one["type"], names[one["frame"]], one["at"]) for one in chart["events"]]
    assert told == [("O", "parent", 0), ("O", "child", 5), ("C", "child", 10), ("C", "parent", 10),
                    ("O", "next", 10), ("C", "next", 15)]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_any_trace_comes_out_well_nested(seed: int) -> None:
    draw = random.Random(seed)
    events = [event(f"op{i % 7}", draw.uniform(1e12, 1e12 + 300), draw.choice([0, 0.001, 3, 50])) for i in range(300)]
    (chart,) = convert(events, "x")["profiles"]
    check_nesting(chart)
    assert len(chart["events"]) == 600


def test_the_check_of_nesting_can_fail() -> None:
    with pytest.raises(AssertionError):
        check_nesting({"startValue": 0, "endValue": 2, "events": [
            {"type": "O", "frame": 0, "at": 0}, {"type": "O", "frame": 1, "at": 1}, {"type": "C", "frame": 0, "at": 2}
        ]})  # fmt: skip


def test_one_chart_for_each_thread_and_stream_the_one_with_ranges_first() -> None:
    content = convert(
        [
            event("gemm", 5, 1, "kernel", 0, 7),
            *[event("aten::mm", i, 0.5, tid=2) for i in range(5)],
            event("lora / prefill", 0, 10, "user_annotation"),
            event("profiler", 0, 99, "Trace", "Spans", "x"),
        ],
        "lora-eager",
    )
    titles = [chart["name"] for chart in content["profiles"]]
    assert titles == ["lora-eager, host thread 1", "lora-eager, host thread 2", "lora-eager, device 0, stream 7"]
    assert "args" not in str(content)


def test_a_trace_of_nothing_to_show_has_no_chart() -> None:
    assert convert([event("profiler", 0, 1, "Trace")], "x")["profiles"] == []
