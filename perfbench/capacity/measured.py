"""Step times out of the folders of `perfbench run` and `perfbench traffic`. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perfbench.capacity import turns
from perfbench.capacity.times import MeasuredTimes, reading_line
from perfbench.errors import RunDirectoryError
from perfbench.figures.roof import DEVICES, known_device
from perfbench.run_folder.run_directory import RunDirectory
from perfbench.spec.arms import Arm
from perfbench.traffic import traffic_folder

# The key of `--device` for a machine without a GPU, which only measured runs can speak of.
CPU = "cpu"
# The runtimes whose steps are those of the server that is planned, the server itself first.
_RUNTIMES = ("continuous", "static")


@dataclass(frozen=True)
class Source:
    """A measured run. `folder` as it was given; `manifest`: its run.json or traffic.json; `traffic`: which of them."""

    folder: Path
    manifest: Mapping[str, Any]
    traffic: bool

    @classmethod
    def read(cls, folder: Path, device: str) -> Source:
        """RunDirectoryError where it is no run that can be read, or one of another device."""
        traffic = traffic_folder.is_traffic(folder)
        if traffic:
            manifest: Any = traffic_folder.read_manifest(folder)
            if manifest["scenario"].get("target") is not None:
                raise RunDirectoryError(f"{folder}: was measured over HTTP, where nobody sees the turns of the server")
        else:
            manifest = RunDirectory.open(folder).manifest
        here = _device_of(manifest["environment"])
        if here != device:
            raise RunDirectoryError(f"--run {folder}: expected a run on {device}, got one on {here}")
        return cls(folder, manifest, traffic)

    @property
    def memory_bytes(self) -> int | None:
        """Of the machine, where the run says so."""
        found: int | None = (self.manifest["environment"].get("cpu") or {}).get("memory_bytes")
        return found


def _device_of(environment: Mapping[str, Any]) -> str:
    """The key of the device that a run was measured on, or its name where no table has it."""
    if environment["device_kind"] == "cpu":
        return CPU
    names = [gpu["name"] for gpu in environment["gpus"]] or ["an unknown GPU"]
    found = known_device(names[0])
    return next((key for key, device in DEVICES.items() if device is found), str(names[0]))


def times_of(
    sources: Sequence[Source], backbone: str, dtype: str, arm: Arm, load_bytes: int, host_bytes_per_s: float | None
) -> MeasuredTimes | None:
    """What the runs say of an arm on this backbone; None where none has measured it.

    A traffic run is taken before others, as it has measured the loads of adapters too. With others one takes
    `load_bytes` over `host_bytes_per_s`; None: over the speed of the machine's memory, which the runs have measured.
    """
    for source in sources:
        if source.traffic and (found := _of_traffic(source, backbone, dtype, arm)) is not None:
            return found
    runs = [source for source in sources if not source.traffic]
    for runtime in _RUNTIMES:
        points = [point for source in runs for point in _points(source, runtime, backbone, dtype, arm)]
        if points:
            speed = host_bytes_per_s or min(point.memory_bytes_per_s for point in points)
            return _of_points(points, load_bytes / speed)
    return None


def _of_traffic(source: Source, backbone: str, dtype: str, arm: Arm) -> MeasuredTimes | None:
    scenario = source.manifest["scenario"]
    if (scenario["backbone"], scenario["dtype"]) != (backbone, dtype):
        return None
    own = [one["label"] for one in scenario["methods"] if _is(arm, one["method"], one["options"])]
    proved = [label for label in own if source.manifest["arms"][label]["status"] == "ok"]
    if not proved:
        return None
    measured = traffic_folder.read_measured(source.folder)
    keys = [key for key in measured if key.arm == proved[0]]
    lengths = scenario["traffic"]["prompt_tokens"]["median"], scenario["traffic"]["new_tokens"]["median"]
    text = f"{source.folder}, turns of live traffic, prompts about {lengths[0]}, new about {lengths[1]}"
    return turns.of_run(source.manifest, measured, keys, source.folder).times(text, scenario["server"]["chunk_tokens"])


@dataclass(frozen=True)
class _Point:
    """A case of one batch: seconds of a decode step, and of reading all prompts; `pieces`: as so many.
    memory_bytes_per_s: of the machine."""

    folder: Path
    runtime: str
    rows: int
    prompt_tokens: int
    new_tokens: int
    step_s: float
    read_s: float
    pieces: int
    memory_bytes_per_s: float


def _points(source: Source, runtime: str, backbone: str, dtype: str, arm: Arm) -> Iterator[_Point]:
    for comparison in source.manifest["comparisons"]:
        load = comparison["workload"]
        of_this = (comparison["backbone"], comparison["dtype"], comparison["runtime"]) == (backbone, dtype, runtime)
        lone = load.get("beams", 1) == 1 and load.get("prompt_tokens") and not load.get("follow_up_tokens")
        of_this = of_this and comparison.get("quantisation", "none") == "none"
        if not of_this or not lone or load["tenants"] != load["requests"] or not comparison.get("roof"):
            continue
        for case in (source.manifest["cases"][name] for name in comparison["case_ids"]):
            if case["status"] == "ok" and case["summary"] and _is(arm, case["method"], case["options"]):
                step, first = (case["summary"][name]["median"] / 1e3 for name in ("itl_ms", "ttft_ms"))
                pieces = load["requests"] if runtime == "continuous" else 1
                lengths = load["prompt_tokens"], load["new_tokens"]
                speed = comparison["roof"]["bytes_per_s"]
                yield _Point(source.folder, runtime, load["requests"], *lengths, step, first, pieces, speed)


def _of_points(points: Sequence[_Point], load_s: float) -> MeasuredTimes:
    """Of several with as many rows the quickest: with the kernels that one would serve with."""
    steps: dict[int, float] = {}
    for point in points:
        steps[point.rows] = min(point.step_s, steps.get(point.rows, point.step_s))
    # One after the other each prompt is a piece; side by side all are one.
    reads = [(point.rows * point.prompt_tokens // point.pieces, point.read_s / point.pieces) for point in points]
    folders = " and ".join(dict.fromkeys(str(point.folder) for point in points))
    rows = ", ".join(map(str, sorted(steps)))
    lengths = f"prompts {points[0].prompt_tokens}, new {points[0].new_tokens}"
    source = f"{folders}, runtime {points[0].runtime}, {rows} rows, {lengths}"
    return MeasuredTimes(steps, *reading_line(reads, steps), load_s, source)


def _is(arm: Arm, method: str, options: Mapping[str, Any]) -> bool:
    """Whether a run's arm is this one, whatever its label."""
    own = json.loads(json.dumps(asdict(arm.options)))
    # Options that came later than the run are at their defaults there.
    return method == arm.method and {**own, **options} == own
