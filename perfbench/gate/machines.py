"""What of hardware, driver and clocks differs between the machines of two runs. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

# What a timed figure rests on -> where it stands in the environment. Versions of software are told, not refused:
# what an upgrade costs is a thing that people gate.
_MACHINE = (
    ("device", ("device_kind",)),
    ("CPU", ("cpu", "model")),
    ("usable cores", ("cpu", "usable_cores")),
    ("threads", ("cpu", "threads")),
    ("CPU features", ("cpu", "isa")),
    ("memory", ("cpu", "memory_bytes")),
    ("highest CPU clock", ("cpu", "max_clock_mhz")),
    ("frequency governor", ("cpu", "governor")),
    ("limits", ("limits",)),
)
_GPU = ("name", "memory_bytes", "driver", "max_sm_clock_mhz", "power_limit_watts")
# Memory that a virtual machine reports differs by some pages from boot to boot, and a clock by its steps.
_SLACK = 0.02


def machine_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What of hardware, driver and clocks differs between two environments of run.json, in words."""
    found = _differences(one, other, dict(_MACHINE))
    ours, theirs = _gpus(one), _gpus(other)
    if len(ours) != len(theirs):
        found.append(f"{len(ours)} and {len(theirs)} GPUs")
    for number, (old, new) in enumerate(zip(ours, theirs, strict=False)):
        found += [f"GPU {number} {key} {old[key]} and {new[key]}" for key in _GPU if old[key] != new[key]]
    return found


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Which of these `names` of _MACHINE differ between two environments of run.json, in words."""
    places, found = dict(_MACHINE), []
    for name in names:
        ours, theirs = _at(one, places[name]), _at(other, places[name])
        if ours != theirs and not (name == "memory" and nearly(ours, theirs)):
            found.append(f"{name} {word(ours)} and {word(theirs)}")
    return found


def workspace_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs between two environments on which the memory depends that an operation works in, in words."""
    ours, theirs = ([word(gpu["name"]) for gpu in _gpus(environment)] for environment in (one, other))
    gpus = [f"GPU {' '.join(ours) or 'none'} and {' '.join(theirs) or 'none'}"] if ours != theirs else []
    return _differences(one, other, ("device", "CPU", "threads", "CPU features")) + gpus


def _gpus(environment: Mapping[str, Any]) -> list[dict[str, Any]]:
    gpus = environment.get("gpus")
    return [{key: _at(gpu, (key,)) for key in _GPU} for gpu in gpus] if isinstance(gpus, list) else []


def _at(environment: Mapping[str, Any], place: tuple[str, ...]) -> Any:
    value: Any = environment
    for key in place:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def mapping_of(value: Any) -> dict[str, Any]:
    """`value` where it is a mapping; what a foreign file has there instead says nothing."""
    return value if isinstance(value, dict) else {}


def word(value: Any) -> str:
    """`value`, or that it is not known."""
    return "unknown" if value is None else str(value)


def nearly(one: Any, other: Any) -> bool:
    """Whether two numbers differ by no more than their slack."""
    return isinstance(one, int | float) and isinstance(other, int | float) and math.isclose(one, other, rel_tol=_SLACK)
