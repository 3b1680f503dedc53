"""The child process of `perfbench profile`: one case and its bare backbone under torch's profiler.

It reads a job (JSON) on standard input, writes traces and timelines into the job's folder, and events, one line of
JSON each, to what was its standard output; whatever the libraries print goes to standard error.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from perfbench.measure.on_device.worker import Emit, serve

# How often each arm is profiled; the arms take turns, and the last round's traces are kept.
ROUNDS = 5
WARMUP = 3


def main() -> int:
    """Runs the job on standard input; exit code 0 when it came to its end, 1 after an `error` event."""
    return serve(lambda emit: _run(json.load(sys.stdin), emit))


@dataclass(frozen=True)
class Profiled:
    """One arm under the profiler. `label`: the last part of its case's id, which names its files; `check`: the status
    and reason of its check."""

    label: str
    kernels: str
    arm: Any
    batch: Any
    ranges: Any
    check: dict[str, str | None]


def _run(job: dict[str, Any], emit: Emit) -> None:
    import torch
    import transformers

    from perfbench.measure.on_device import workload
    from perfbench.profiling import breakdown
    from perfbench.profiling.on_device import probes
    from perfbench.runtimes import backbone as backbones
    from perfbench.spec import cases, method_plugins

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(job["threads"])
    method_plugins.load_again(job["plugins"])
    comparison = cases.from_json(job["comparison"])
    emit("phase", case=None, text=f"loading {comparison.backbone}")
    backbone = backbones.load(
        comparison.backbone, comparison.dtype, comparison.device, job["seed"], comparison.quantisation
    )
    whole = workload.make(comparison.workload, backbone, job["seed"])
    profiled = [_build(case, comparison, backbone, whole, job, emit) for case in comparison.cases]
    emit("phase", case=None, text="warming up")
    for _ in range(WARMUP):
        for one in profiled:
            one.arm.generate(one.batch)
    unprofiled: dict[str, list[float]] = {one.label: [] for one in profiled}
    calls: dict[str, list[Any]] = {one.label: [] for one in profiled}
    for number in range(ROUNDS):
        emit("phase", case=None, text=f"round {number + 1} of {ROUNDS}")
        for one in profiled:
            unprofiled[one.label] += _step_times_ms(one, backbone.device)
            last = Path(job["out"]) if number == ROUNDS - 1 else None
            calls[one.label].append(_profile(one, backbone.device, last))
    for one in profiled:
        emit("phase", case=None, text="recording memory")
        emit(
            "arm",
            label=one.label,
            check=one.check,
            breakdown=breakdown.typical(calls[one.label]),
            decode_step_spread=breakdown.spread(calls[one.label]),
            replays=probes.replays(one.arm),
            unprofiled_decode_step_ms=median(unprofiled[one.label]),
            memory=_memory(one, backbone),
        )


def _build(case: Any, comparison: Any, backbone: Any, whole: Any, job: dict[str, Any], emit: Emit) -> Profiled:
    """The arm of `case`, checked with the case's own batch, to be profiled with fewer tokens."""
    from perfbench.measure.on_device import arms
    from perfbench.profiling.on_device.ranges import Ranges
    from perfbench.proof import check

    resident, seed = comparison.workload.resident, job["seed"]
    emit("phase", case=case.id, text="admitting tenants")
    with tempfile.TemporaryDirectory(prefix="perfbench-") as scratch:
        built = arms.build(case, backbone, whole, resident, seed, Path(scratch), figures=False)
    emit("phase", case=case.id, text="checking")
    found = check.check(built.arm, built.batch, resident, backbone, seed, built.plan_of)
    return Profiled(
        label=case.id.rsplit("/", 1)[1],
        kernels=case.kernels,
        arm=built.arm,
        batch=replace(built.batch, new_tokens=job["steps"] + 1),
        ranges=Ranges(case.arm),
        check={"status": found.status, "reason": found.reason},
    )


def _memory(one: Profiled, backbone: Any) -> dict[str, Any]:
    """The memory timeline of one call, as `memory_timeline.record` gives it."""
    from perfbench.profiling.on_device import memory_timeline, probes

    def call() -> None:
        _generate(one, backbone.device)

    with probes.on(one.ranges, one.arm, one.kernels):
        call()  # what an arm keeps from call to call is there before
        held = probes.resident(one.arm, backbone)
        opening = f"{one.ranges.method} / "
        return memory_timeline.record(call, backbone.device, held, one.ranges.names, opening)


def _generate(one: Profiled, device: Any) -> None:
    """One call with a range around each phase."""
    import torch

    from perfbench.profiling.on_device.ranges import PhaseClock

    clock = PhaseClock(device, one.ranges, one.batch.new_tokens)
    clock.mark()
    one.arm.generate(one.batch, clock=clock)
    if device.type == "cuda":
        torch.cuda.synchronize()


def _step_times_ms(one: Profiled, device: Any) -> list[float]:
    """The times of the decode steps of one call without ranges and without a profiler."""
    from perfbench.runtimes.generation import StepClock

    one.arm.generate(one.batch)  # ranges that were taken off leave something to be made again
    clock = StepClock(device)
    clock.mark()
    one.arm.generate(one.batch, clock=clock)
    times = clock.elapsed_ms()
    return [later - sooner for sooner, later in pairwise(times)]


def _profile(one: Profiled, device: Any, keep_in: Path | None) -> Any:
    """The phases of one profiled call; its trace is kept in a folder where one is given."""
    from torch.profiler import ProfilerActivity, profile

    from perfbench.profiling import breakdown, trace
    from perfbench.profiling.on_device import probes

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with probes.on(one.ranges, one.arm, one.kernels), tempfile.TemporaryDirectory(prefix="perfbench-") as scratch:
        _generate(one, device)  # what is made once for each decoder is made with the ranges on
        with profile(activities=activities, acc_events=True) as profiler:
            _generate(one, device)
        file = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(file))
        document = json.loads(file.read_text(encoding="utf-8"))
    trace.mark_ranges(document["traceEvents"], one.ranges.names)
    complete = [event for event in document["traceEvents"] if event.get("ph") == "X"]
    if keep_in is not None:
        _write(document, one.label, keep_in)
    return breakdown.of_call(complete, one.ranges.names, one.ranges.method)


def _write(document: dict[str, Any], label: str, folder: Path) -> None:
    """The trace for Perfetto, and the same as a run of a TensorBoard log."""
    document["traceName"] = f"{label}.trace.json"
    file = folder / f"{label}.trace.json.gz"
    with gzip.open(file, "wt", encoding="utf-8", compresslevel=6) as packed:
        json.dump(document, packed, separators=(",", ":"))
    log = folder / "tensorboard" / "plugins" / "profile" / label
    log.mkdir(parents=True)
    shutil.copyfile(file, log / "perfbench.pt.trace.json.gz")


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    sys.exit(main())
