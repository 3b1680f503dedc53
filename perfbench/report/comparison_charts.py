"""The charts of one comparison: speed, time, memory, the roof, and where the overhead arises. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from perfbench.figures.stats import median_bounds
from perfbench.report.chart import Chart
from perfbench.report.columns import arm_name
from perfbench.report.rows import Row
from perfbench.report.steadiness import drift, inter_token_times

MIB = 2**20
Samples = list[dict[str, Any]]


@dataclass(frozen=True)
class Arm:
    """One measured case: its `row` of the table, its valid `samples`, and the bare backbone beside it, if any."""

    name: str
    row: Row
    case: Mapping[str, Any]
    samples: Samples
    bare: Arm | None = None

    def bounds(self, metric: str) -> list[float | None]:
        """[low, high] of the median of `metric` over the repetitions; [None, None] with too few of them."""
        found = median_bounds([sample[metric] for sample in self.samples])
        return list(found) if found else [None, None]

    def over_bare(self, figure: Any) -> list[float]:
        """`figure` of each repetition less that of the bare backbone in the same round."""
        assert self.bare is not None
        bare = {_turn(sample): figure(sample) for sample in self.bare.samples}
        return [figure(one) - bare[_turn(one)] for one in self.samples if _turn(one) in bare]


def arms_of(group: Sequence[Row], cases: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Samples]) -> list[Arm]:
    """The arms of one comparison that were measured, in the order of the table."""
    measured = [row for row in group if row["rounds"] is not None]
    arms: list[Arm] = []
    for row in measured:
        beside = (arm for arm in arms if arm.row["method"] == "none" and arm.row["kernels"] == row["kernels"])
        bare = next(beside, None) if row["method"] != "none" else None
        arms.append(Arm(arm_name(row, group), row, cases[row["case"]], samples[row["case"]], bare))
    return arms


def charts_of(comparison: Mapping[str, Any], arms: Sequence[Arm], drift_points: int) -> list[Chart]:
    """Every chart for which this comparison has figures; `drift_points`: at most so many for an arm."""
    found = [
        _speed(arms),
        _kept(arms),
        _prefill_and_decode(arms),
        inter_token_times([(arm.name, arm.samples) for arm in arms]),
        drift([(arm.name, arm.samples) for arm in arms], drift_points),
        _overhead(arms, comparison["workload"]),
        _memory(comparison, arms),
        _roof(comparison, arms),
    ]
    return [chart for chart in found if chart is not None and chart.rows]


def _speed(arms: Sequence[Arm]) -> Chart:
    metric = "decode_tokens_per_s"
    return Chart(
        "bars",
        "Decode speed of each method",
        "tokens/s, higher is better",
        ("method", "tokens/s", "low", "high"),
        [(arm.name, arm.row[metric], *arm.bounds(metric)) for arm in arms],
        "The median over rounds; the line is its 95% interval.",
    )


def _kept(arms: Sequence[Arm]) -> Chart:
    kept = "kept_decode_tokens_per_s"
    rows = [(arm.name, *percent_kept(arm.row)) for arm in arms if arm.row[kept] is not None]
    return Chart(
        "dots",
        "Share of the bare backbone's decode speed that is kept",
        "% of the bare backbone, higher is better",
        ("method", "kept %", "low", "high"),
        rows,
        "Both in the same round, the median over rounds with its 95% interval. Intervals that overlap are a tie.",
        {"reference": 100, "unit": "%"},
    )


def percent_kept(row: Row) -> list[float | None]:
    """[kept, low, high] in percent; None for what is not known."""
    ends = (row[f"kept_decode_tokens_per_s{end}"] for end in ("", "_low", "_high"))
    return [None if end is None else 100 * end for end in ends]


def _prefill_and_decode(arms: Sequence[Arm]) -> Chart:
    return Chart(
        "stack",
        "Time of a generate call: prefill against decode",
        "ms, lower is better",
        ("method", "prefill (to the first token)", "decode"),
        [
            (arm.name, arm.row["ttft_ms"], median(sample["total_ms"] - sample["ttft_ms"] for sample in arm.samples))
            for arm in arms
            if arm.samples
        ],
        "Medians of the whole batch's call.",
    )


def _overhead(arms: Sequence[Arm], workload: Mapping[str, Any]) -> Chart | None:
    """What an arm takes more than the bare backbone of the same round, by where it arises."""
    rows = []
    steps = workload["new_tokens"] - 1
    for arm in arms:
        if arm.bare is None or not (prefill := arm.over_bare(lambda sample: sample["ttft_ms"])):
            continue
        decode = median(arm.over_bare(lambda sample: sample["total_ms"] - sample["ttft_ms"]))
        least, bare_least = arm.row["least_ms_per_decode_step"], arm.bare.row["least_ms_per_decode_step"]
        must = None if least is None or bare_least is None else (least - bare_least) * steps
        operations, bare_operations = (one.row["aten_ops_per_decode_step"] for one in (arm, arm.bare))
        more = None if operations is None or bare_operations is None else operations - bare_operations
        each_us = None if not more or more < 0 else (decode - (must or 0)) / steps / more * 1e3
        rows.append((arm.name, median(prefill), must, decode - (must or 0), more, each_us))
    if not rows:
        return None
    return Chart(
        "stack",
        "Overhead over the bare backbone: where a call's extra time arises",
        "ms more than the bare backbone, lower is better",
        (
            "method", "prefill", "decode: adapter bytes and products", "decode: the rest",
            "more operations a step", "the rest per operation, us",
        ),
        rows,
        "Medians of the differences within a round. Bytes and products: the least time that the adapters' own "
        "traffic and arithmetic need on this device; the rest is launches, calls and lost efficiency.",
        {"parts": 3, "labels": [_operations(row) for row in rows]},
    )  # fmt: skip


def _operations(row: Sequence[Any]) -> str:
    return "" if row[4] is None else f"{row[4]:+,} ops a step"


def _memory(comparison: Mapping[str, Any], arms: Sequence[Arm]) -> Chart | None:
    """Peak memory as a stack; what a run did not record apart is one part, and the note says so."""
    stacks = [(arm, stack) for arm in arms if (stack := memory_parts(comparison, arm.case))]
    if not stacks:
        return None
    parts = [part for part in MEMORY_PARTS if any(part in stack for _, stack in stacks)]
    notes = ["The stack is the most memory in tensors while a batch runs, that arm alone on the device."]
    if left_out := [arm.name for arm in arms if arm.name not in {one.name for one, _ in stacks}]:
        notes.append(f"Not known, or more in parts than at the peak: {', '.join(left_out)}.")
    if "KV cache and workspace" in parts:
        notes.append("This run did not record the KV cache apart from the workspace.")
    if "workspace" in parts:
        notes.append("KV cache: when it is full. Workspace: the rest at the peak, such as activations and logits.")
    if "other" in parts:
        notes.append("Other: what the process held beyond its tensors, such as the allocator's reserve and the driver.")
    else:
        notes.append("What the process holds beyond its tensors (other) is recorded on GPUs only.")
    return Chart(
        "stack",
        "Peak memory: what it consists of",
        "MiB, lower is better",
        ("method", *parts),
        [(arm.name, *(stack[part] / MIB if part in stack else None for part in parts)) for arm, stack in stacks],
        " ".join(notes),
    )


MEMORY_PARTS = ("weights", "adapters", "KV cache", "workspace", "KV cache and workspace", "other")


def memory_parts(comparison: Mapping[str, Any], case: Mapping[str, Any]) -> dict[str, int] | None:
    """Part of MEMORY_PARTS -> bytes. None where the peak or the weights are not known.

    Runs from before the parts were recorded give the adapters as bytes of a tenant times residents, and the KV cache
    and the workspace as one.
    """
    memory, weights = case["memory"] or {}, comparison.get("backbone_bytes")
    peak = memory.get("peak_allocated_bytes")
    if peak is None or weights is None:
        return None
    adapters, cache = memory.get("adapter_bytes"), memory.get("kv_cache_bytes")
    if adapters is None:
        per_tenant = (case["adapters"] or {}).get("bytes_per_tenant") or 0
        adapters = per_tenant * (comparison["workload"].get("resident") or 0)
    rest = peak - weights - adapters - (cache or 0)
    if rest < 0:
        return None
    found = {"weights": weights, "adapters": adapters}
    found |= {"KV cache and workspace": rest} if cache is None else {"KV cache": cache, "workspace": rest}
    process = memory.get("peak_process_bytes")
    return found | ({"other": process - peak} if process is not None and process >= peak else {})


def _roof(comparison: Mapping[str, Any], arms: Sequence[Arm]) -> Chart | None:
    roof = comparison.get("roof")
    rows = [
        (arm.name, 100 * arm.row["roof_share"], None, None, arm.row["least_ms_per_decode_step"], arm.row["itl_ms"])
        for arm in arms
        if arm.row["roof_share"] is not None
    ]
    if not roof or not rows:
        return None
    return Chart(
        "bars",
        "Share of the roof that a decode step reaches",
        "% of what the device allows, higher is better",
        ("method", "roof %", "low", "high", "least ms a step", "measured ms a step"),
        rows,
        f"The least time of the median step, from what it must read and compute on {roof['name']} "
        f"({roof['source']}), over the median time between tokens.",
        {"unit": "%"},
    )


def comparison_notes(arms: Sequence[Arm]) -> Iterator[str]:
    """What a reader must know about the arms that have no repetitions to draw."""
    lacking = [arm.name for arm in arms if not arm.samples]
    if lacking:
        yield f"No repetition of {', '.join(lacking)} is in samples.jsonl: some of its charts are missing."


def _turn(sample: Mapping[str, Any]) -> tuple[int, int]:
    return sample["process"], sample["round"]
