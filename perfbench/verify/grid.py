"""The speeds: scenarios measured by `perfbench run`'s own means, as far as the time reaches. Free of torch."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any, Literal

from perfbench.measure import run
from perfbench.measure.children import Children
from perfbench.run_folder.run_directory import MANIFEST, RunDirectory
from perfbench.spec import cases, scenario
from perfbench.verify.verify_report import FAIL, PASS, SKIPPED, Finding

SCENARIOS = Path(__file__).parents[1] / "scenarios"
# In the order in which they are measured: should the time end, what matters most is there.
QUICK, FULL = ("verify_7b", "verify_corners"), ("verify_full",)
# What is worth most comes before all else: so many requests, each of another tenant.
FOREMOST_REQUESTS = 8
# A piece needs at least this long to load a backbone and measure something.
LEAST_S = 10.0

# Which comparisons are meant: all, the foremost one of the first scenario, or all but that.
Part = Literal["all", "foremost", "rest"]


class OutOfTimeError(Exception):
    """The time that a run was given is over."""


def findings(
    names: tuple[str, ...],
    device: str,
    out: Path,
    seconds: float | None,
    part: Part = "all",
    children: Children | None = None,
) -> Iterator[Finding]:
    """One for each case of the scenarios, measured into folders under `out`, where an earlier run goes on.

    seconds: how long all of it may take, None for ever. children: where processes come from, by default a fresh one
    for each job. PerfbenchError as `perfbench run`.
    """
    end = None if seconds is None else monotonic() + seconds
    for i, name in enumerate(names):
        resolved = scenario.resolve(scenario.load(SCENARIOS / f"{name}.yaml"), device)
        comparisons = cases.expand(resolved)
        chosen = comparisons
        if part != "all":
            first = foremost(comparisons) if i == 0 else ()
            chosen = first if part == "foremost" else tuple(one for one in comparisons if one not in first)
        if chosen:
            left = None if end is None else end - monotonic()
            yield from _scenario(name, resolved, comparisons, chosen, out / name, left, children)


def foremost(comparisons: Sequence[cases.Comparison]) -> tuple[cases.Comparison, ...]:
    """What is measured first: FOREMOST_REQUESTS requests of as many tenants with the fewest beams, or, where there is
    no such workload, the first one; in every runtime, since runtimes take turns."""
    alike = [
        one for one in comparisons if one.workload.requests == one.workload.tenants == FOREMOST_REQUESTS
    ] or comparisons[:1]
    best = min(alike, key=lambda one: one.workload.beams)
    return tuple(one for one in comparisons if one.workload == best.workload)


def _scenario(
    name: str,
    resolved: scenario.Scenario,
    comparisons: tuple[cases.Comparison, ...],
    chosen: tuple[cases.Comparison, ...],
    folder: Path,
    seconds: float | None,
    children: Children | None,
) -> Iterator[Finding]:
    changed = next((note for note in resolved.notes if note.startswith("overrides.") and "->" in note), None)
    if changed:
        yield Finding(f"{name} as written", SKIPPED, f"a small shape stands in: {changed}")
    begun = (folder / MANIFEST).is_file()
    if seconds is None or seconds >= LEAST_S:
        only = {one.id for one in chosen}
        try:
            with time_limit(seconds):
                directory = run.execute(resolved, comparisons, folder, resume=begun, only=only, children=children)
        except OutOfTimeError:
            directory = RunDirectory.open(folder)
            directory.summarise()
            directory.write_manifest()
    elif begun:
        directory = RunDirectory.open(folder)
    else:
        yield Finding(name, SKIPPED, "the time is over; go on with --resume")
        return
    for case in (case for one in chosen for case in one.cases):
        yield of_case(name, directory.manifest["cases"][case.id])


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """OutOfTimeError in what runs within it, once that long is over. In the main thread only."""
    if seconds is None:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def of_case(name: str, case: Mapping[str, Any]) -> Finding:
    """A case of scenario `name` with its speed; out of memory or time is no fault of the code, anything else is."""
    what = f"{name}: {case['id'].split('/', 1)[1]}"
    if case["status"] == "out_of_memory":
        return Finding(what, SKIPPED, f"out of memory: {case['reason']}")
    if case["status"] == "pending" or (case["status"] == "ok" and case["summary"] is None):
        return Finding(what, SKIPPED, "the time was over before its last round; go on with --resume")
    if case["status"] != "ok":
        return Finding(what, FAIL, f"{case['status']}: {case['reason']}")
    figures = {metric: case["summary"][metric]["median"] for metric in ("decode_tokens_per_s", "itl_ms", "ttft_ms")}
    text = f"{figures['decode_tokens_per_s']:,.0f} tokens/s, {figures['itl_ms']:.2f} ms a step"
    if case["kept"]:
        kept, bound = case["kept"]["decode_tokens_per_s"], case["exact"]["kept_bound"]
        figures |= {"kept": kept, "kept_bound": bound}
        between = "" if kept["low"] is None else f" [{kept['low'] * 100:.1f}, {kept['high'] * 100:.1f}]"
        text += f", kept {kept['ratio'] * 100:.1f}%{between}, the bytes allow {bound * 100:.1f}"
    launches = case["exact"]["kernel_launches_per_decode_step"]
    if launches is not None:
        figures["kernel_launches_per_decode_step"] = launches
        text += f", {launches:,} launches"
    return Finding(what, PASS, text, figures)
