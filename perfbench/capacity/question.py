"""What `perfbench plan` is asked, checked as a traffic scenario is. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfbench.capacity.fit import Memory, bytes_of, plan_of, reads_whole
from perfbench.capacity.fleet import Fleet
from perfbench.capacity.measured import CPU, Source, times_of
from perfbench.capacity.times import MeasuredTimes, RoofTimes, host_bytes_per_s
from perfbench.errors import BackboneError, PerfbenchError, ScenarioError, nearest
from perfbench.figures.roof import DEVICES, Device, find_device
from perfbench.files.plain_text import format_bytes
from perfbench.files.yaml_source import parse, read
from perfbench.methods.dtypes import DTYPES
from perfbench.methods.registry import METHODS
from perfbench.spec import shipped, traffic
from perfbench.spec.arms import Arm
from perfbench.spec.backbone_config import find_config, parameter_count

# Whose lengths, popularity of tenants and number of requests are the defaults.
DEFAULTS = shipped.FOLDER / "traffic.yaml"
_SLO = "such as ttft=500ms,itl=40ms"
_SLO_KEYS = {"ttft": "ttft_ms", "itl": "itl_ms", "share": "share"}
_UNITS_MS = {"ms": 1.0, "s": 1000.0}
# Which option a field of the scenario came from.
_OPTIONS = {
    "traffic.tenants": "--tenants", "traffic.rate": "--rate", "traffic.prompt_tokens": "--prompt-tokens",
    "traffic.new_tokens": "--new-tokens", "traffic.zipf_exponent": "--zipf", "methods": "--methods",
    "dtype": "--dtype", "price_per_hour": "--price-per-hour", "targets": "--slo",
}  # fmt: skip
ROOF = (
    "roof: from the bytes that are read and the operations that are done over the device's speeds ({source}; adapters "
    "over PCI Express at {host:.0f} GB/s), and nothing but weights, cache and adapters takes memory. A server that "
    "schedules as perfbench's does can't be faster: the fleet needs at least so many devices."
)
MEASURED = (
    "measured: the step times of {sources}. No more rows are planned with than were measured, and contexts are taken "
    "to be as long as they were there."
)


@dataclass(frozen=True)
class Question:
    """All of it. prompt_tokens, new_tokens: a number or lengths as a traffic file has them, as YAML; None: those of
    DEFAULTS, which is true of zipf too. slo, methods: as they are written on the command line."""

    model: str
    device: str
    tenants: int
    rate: float
    slo: str
    methods: str
    dtype: str
    prompt_tokens: str | None = None
    new_tokens: str | None = None
    zipf: float | None = None
    price_per_hour: float | None = None
    rows: int | None = None
    runs: Sequence[Path] = ()

    def scenario(self) -> traffic.TrafficScenario:
        """ScenarioError and BackboneError name the option."""
        values: dict[str, Any] = read(DEFAULTS).values
        del values["overrides"], values["traffic"]["rate_per_tenant"]
        values["traffic"] |= {"tenants": self.tenants, "rate": self.rate}
        for name, text in (("prompt_tokens", self.prompt_tokens), ("new_tokens", self.new_tokens)):
            if text is not None:
                values["traffic"][name] = parse(text, f"--{name.replace('_', '-')}").values
        if self.zipf is not None:
            values["traffic"]["zipf_exponent"] = self.zipf
        if self.price_per_hour is not None:
            values["price_per_hour"] = self.price_per_hour
        methods = parse(f"[{self.methods}]", "--methods").values
        values |= {"backbone": self.model, "dtype": self.dtype, "methods": methods, "targets": targets(self.slo)}
        values["kernels"] = "eager"  # they are there on every device; none is run
        try:
            found = traffic.load(values, (), lambda _: ("cpu" if self.device == CPU else "cuda", ""))
            if traffic.is_hub_id(self.model):
                traffic.check_against_backbone(found)
        except BackboneError as error:
            raise BackboneError(f"--model: {error}") from None
        except ScenarioError as error:
            raise ScenarioError(_as_option(str(error))) from None
        return found


def _as_option(message: str) -> str:
    for field, option in _OPTIONS.items():
        message = re.sub(rf"^traffic: {re.escape(field)}\b", option, message)
    return message


def targets(text: str) -> dict[str, float]:
    """The targets of a traffic scenario, in ms. PerfbenchError on another key, a missing one or a missing unit."""
    found: dict[str, float] = {}
    for part in text.split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        if key not in _SLO_KEYS:
            raise PerfbenchError(f"--slo: unknown target {key!r}; {nearest(key, _SLO_KEYS)} ({_SLO})")
        if _SLO_KEYS[key] in found:
            raise PerfbenchError(f"--slo: expected {key} once, got it twice")
        units = {"": 1.0} if key == "share" else _UNITS_MS
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", value)
        if match is None or match[2] not in units:
            expected = "a number such as 0.99" if key == "share" else f"a number with its unit, ms or s, {_SLO}"
            raise PerfbenchError(f"--slo: {key}: expected {expected}, got {value!r}")
        found[_SLO_KEYS[key]] = float(match[1]) * units[match[2]]
    for key in ("ttft", "itl"):
        if _SLO_KEYS[key] not in found:
            raise PerfbenchError(f"--slo: expected {key} too, {_SLO}")
    return found


@dataclass(frozen=True)
class Asked:
    """One line of the answer: a method with step times of one origin, roof or measured."""

    arm: Arm
    fleet: Fleet
    origin: str


@dataclass(frozen=True)
class Planned:
    """The question with all that it needs. `device` None: a machine of which only the runs speak; `notes`: where the
    figures are from."""

    question: Question
    scenario: traffic.TrafficScenario
    device: Device | None
    asked: tuple[Asked, ...]
    notes: tuple[str, ...]


def prepare(question: Question) -> Planned:
    """Everything but the simulation. PerfbenchError, one line, for what can't be planned."""
    if question.device not in (known := [*DEVICES, CPU]):
        raise PerfbenchError(f"--device: unknown device {question.device!r}; {nearest(question.device, known)}")
    if question.device == CPU and not question.runs:
        raise PerfbenchError(f"--device {CPU}: no table has its speeds; give a measured run of that machine with --run")
    scenario = question.scenario()
    config = find_config(question.model)
    sources = [Source.read(folder, question.device) for folder in question.runs]
    device = None if question.device == CPU else find_device(question.device)
    memory = device.memory_bytes if device is not None else max(source.memory_bytes or 0 for source in sources)
    weights = parameter_count(config) * DTYPES[question.dtype].bytes
    if memory and weights > memory:
        raise PerfbenchError(
            f"--model: {question.model} in {question.dtype} has {format_bytes(weights)} of weights, and "
            f"{question.device} {format_bytes(memory)} of memory; choose another device, or another model"
        )
    if not memory:
        raise PerfbenchError("--run: none of the runs says how much memory its machine has; measure anew")
    asked = [
        Asked(arm, _fleet(question, scenario, config, memory, arm, times), times.origin)
        for arm in scenario.common.methods
        for times in _times(question, config, sources, device, arm)
    ]
    return Planned(question, scenario, device, tuple(asked), _notes(device, question.device, asked))


def _plan(question: Question, config: Mapping[str, Any], arm: Arm) -> Sequence[Any]:
    if not METHODS[arm.method].has_one_size or getattr(arm.options, "adapters", None) is not None:
        raise PerfbenchError(f"--methods: {arm.label}: expected a method whose options say how large an adapter is")
    return plan_of(arm.method, arm.options, config)


def _times(
    question: Question, config: Mapping[str, Any], sources: Sequence[Source], device: Device | None, arm: Arm
) -> list[RoofTimes | MeasuredTimes]:
    """Of an arm: from the roof, where the device has one, and from what was measured."""
    found: list[RoofTimes | MeasuredTimes] = []
    plan, host = _plan(question, config, arm), None
    load_bytes = bytes_of(plan, question.dtype)
    if device is not None:
        host = host_bytes_per_s(question.device)
        found.append(RoofTimes(config, question.dtype, device, plan, load_bytes, host))
    measured = times_of(sources, question.model, question.dtype, arm, load_bytes, host)
    if measured is not None:
        found.append(measured)
        if question.rows is not None and question.rows > measured.most_rows:
            most = measured.most_rows
            raise PerfbenchError(f"--rows: expected at most {most}, as many as were measured, got {question.rows}")
    elif device is None and arm.method != "none":
        folders = ", ".join(str(source.folder) for source in sources)
        raise PerfbenchError(
            f"--run {folders}: expected a run that has measured {arm.label} on {question.model} in {question.dtype}"
        )
    return found


def _fleet(
    question: Question, scenario: traffic.TrafficScenario, config: Mapping[str, Any], memory: int, arm: Arm,
    times: RoofTimes | MeasuredTimes,
) -> Fleet:  # fmt: skip
    plan = _plan(question, config, arm)
    return Fleet(
        traffic=scenario.traffic,
        tenants=question.tenants,
        rate=question.rate,
        targets=scenario.targets,
        times=times,
        memory=Memory.of(config, question.dtype, scenario.traffic, memory, bytes_of(plan, question.dtype)),
        chunk_tokens=None if reads_whole(plan) else times.chunk_tokens or scenario.server.chunk_tokens,
        rows=question.rows,
    )


def _notes(device: Device | None, key: str, asked: Sequence[Asked]) -> tuple[str, ...]:
    """Where the figures are from."""
    roof = [] if device is None else [ROOF.format(source=device.source, host=host_bytes_per_s(key) / 1e9)]
    times = [one.fleet.times for one in asked]
    sources = dict.fromkeys(one.source for one in times if isinstance(one, MeasuredTimes))
    return (*roof, *([MEASURED.format(sources="; ".join(sources))] if sources else []))
