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

from perfbench.worker import Emit, run_job

# How often each arm is profiled; the arms take turns, and the last round's traces are kept.
ROUNDS = 5
WARMUP = 3


def main() -> int:
    """Runs the job on standard input; exit code 0 when it came to its end, 1 after an `error` event."""
    return run_job(_run)


@dataclass(frozen=True)
class Profiled:
    """One arm under the profiler. `label`: the last part of its case's id, which names its files."""

    label: str
    kernels: str
    arm: Any
    batch: Any
    ranges: Any


def _run(job: dict[str, Any], emit: Emit) -> None:
    import torch
    import transformers

    from perfbench import arms, breakdown, cases, check, memory_timeline, probes, workload
    from perfbench import backbone as backbones
    from perfbench.ranges import Ranges

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(job["threads"])
    comparison = cases.from_json(job["comparison"])
    emit("phase", case=None, text=f"loading {comparison.backbone}")
    backbone = backbones.load(comparison.backbone, comparison.dtype, comparison.device, job["seed"])
    whole = workload.make(comparison.workload, backbone, job["seed"])
    profiled, checks = [], {}
    for case in comparison.cases:
        emit("phase", case=case.id, text="admitting tenants")
        with tempfile.TemporaryDirectory(prefix="perfbench-") as scratch:
            built = arms.build(
                case, backbone, whole, comparison.workload.resident, job["seed"], Path(scratch)
            )
        emit("phase", case=case.id, text="checking")
        found = check.check(
            built.arm, built.batch, comparison.workload.resident, backbone.dtype, job["seed"],
            has_adapters=case.method != "none",
        )  # fmt: skip
        batch = replace(built.batch, new_tokens=job["steps"] + 1)
        label = case.id.rsplit("/", 1)[1]
        checks[label] = {"status": found.status, "reason": found.reason}
        profiled.append(Profiled(label, case.kernels, built.arm, batch, Ranges(case.arm)))
    emit("phase", case=None, text="warming up")
    unprofiled: dict[str, list[float]] = {one.label: [] for one in profiled}
    for _ in range(WARMUP):
        for one in profiled:
            unprofiled[one.label] = _step_times_ms(one, backbone.device)
    calls: dict[str, list[Any]] = {one.label: [] for one in profiled}
    for number in range(ROUNDS):
        for one in profiled:
            emit("phase", case=None, text=f"round {number + 1} of {ROUNDS}")
            unprofiled[one.label] += _step_times_ms(one, backbone.device)
            last = Path(job["out"]) if number == ROUNDS - 1 else None
            calls[one.label].append(_profile(one, backbone.device, last))
    for one in profiled:
        emit("phase", case=None, text="recording memory")
        with probes.on(one.ranges, one.arm, one.kernels):
            _generate(one, backbone.device)  # what an arm keeps from call to call is there before
            held = probes.resident(one.arm, backbone)
            found_memory = memory_timeline.record(
                lambda one=one: _generate(one, backbone.device), backbone.device, held, one.ranges.names,
                f"{one.ranges.method} / ",
            )  # fmt: skip
        emit(
            "arm",
            label=one.label,
            check=checks[one.label],
            breakdown=breakdown.typical(calls[one.label]),
            decode_step_spread=breakdown.spread(calls[one.label]),
            replays=probes.replays(one.arm),
            unprofiled_decode_step_ms=median(unprofiled[one.label]),
            memory=found_memory,
        )


def _generate(one: Profiled, device: Any) -> Any:
    """One call with a range around each phase; the clock that has opened them."""
    import torch

    from perfbench.ranges import PhaseClock

    clock = PhaseClock(device, one.ranges, one.batch.new_tokens)
    clock.mark()
    one.arm.generate(one.batch, clock=clock)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock


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

    from perfbench import breakdown, probes, trace

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
