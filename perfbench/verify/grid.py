"""The speeds: scenarios measured by `perfbench run`'s own means, as far as the time reaches. Free of torch."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from perfbench import cases, run, scenario
from perfbench.result import MANIFEST, RunDirectory
from perfbench.verify.report import FAIL, PASS, SKIPPED, Finding

SCENARIOS = Path(__file__).parents[1] / "scenarios"
# In the order in which they are measured: should the time end, what matters most is there.
QUICK, FULL = ("verify_7b", "verify_corners"), ("verify_full",)
# A piece needs at least this long to load a backbone and measure something.
LEAST_S = 10.0


class OutOfTimeError(Exception):
    """The time that a run was given is over."""


def findings(names: tuple[str, ...], device: str, out: Path, seconds: float | None) -> Iterator[Finding]:
    """One for each case of the scenarios, measured into folders under `out`, where an earlier run goes on.

    seconds: how long all of it may take, None for ever. PerfbenchError as `perfbench run`.
    """
    from time import monotonic

    end = None if seconds is None else monotonic() + seconds
    for name in names:
        left = None if end is None else end - monotonic()
        yield from _scenario(name, device, out / name, left)


def _scenario(name: str, device: str, folder: Path, seconds: float | None) -> Iterator[Finding]:
    resolved = scenario.resolve(scenario.load(SCENARIOS / f"{name}.yaml"), device)
    comparisons = cases.expand(resolved)
    changed = next((note for note in resolved.notes if note.startswith("overrides.") and "->" in note), None)
    if changed:
        yield Finding(f"{name} as written", SKIPPED, f"a small shape stands in: {changed}")
    if seconds is not None and seconds < LEAST_S:
        yield Finding(name, SKIPPED, "the time is over; go on with --resume")
        return
    directory = _measure(resolved, comparisons, folder, seconds)
    for case in directory.manifest["cases"].values():
        yield of_case(name, case)


def _measure(
    resolved: scenario.Scenario, comparisons: tuple[cases.Comparison, ...], folder: Path, seconds: float | None
) -> RunDirectory:
    """The run in `folder`, gone on with until it is whole or the time is over."""
    try:
        with time_limit(seconds):
            return run.execute(resolved, comparisons, folder, resume=(folder / MANIFEST).is_file())
    except OutOfTimeError:
        directory = RunDirectory.open(folder)
        directory.summarise()
        directory.write_manifest()
        return directory


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


def of_case(name: str, case: dict[str, Any]) -> Finding:
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
