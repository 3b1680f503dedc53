"""What a profile.json holds, typed: `perfbench view` and its tables trust what stands here. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perfbench.profiling.profile_table import PHASES
from perfbench.run_folder.run_schema import ENVIRONMENT, LARGEST, LEAST, Schema

_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number", "minimum": 0, "maximum": LARGEST}
# kind -> figure -> value; the kind `total` with all that the sentences above the tables name.
_NAMED = ("device_ms", "host_ms", "operations", "launches", "gap_ms", "outside_ms")
# A gap, or what a step does outside of operations, is a difference, which rounding takes below 0.
_FIGURE: Schema = {"type": "number", "minimum": -LARGEST, "maximum": LARGEST}
_KINDS: Schema = {
    "type": "object",
    "properties": {"total": {"type": "object", "required": list(_NAMED), "properties": dict.fromkeys(_NAMED, _FIGURE)}},
    "required": ["total"],
    "additionalProperties": {"type": "object", "properties": {}, "additionalProperties": _FIGURE},
}
_ARM: dict[str, Schema] = {
    "check": {
        "type": "object",
        "properties": {"status": _TEXT, "reason": {"type": ["string", "null"]}},
        "required": ["status"],
    },
    "breakdown": {"type": "object", "properties": dict.fromkeys(PHASES, _KINDS), "additionalProperties": _KINDS},
    "replays": {"type": ["boolean", "integer", "null"]},
    "decode_step_spread": _NUMBER,
    "unprofiled_decode_step_ms": {"type": "number", "minimum": LEAST, "maximum": LARGEST},
    "peak_bytes": _NUMBER,
    "trace": _TEXT,
    "memory_picture": _TEXT,
}
PROFILE: Schema = {
    "type": "object",
    "properties": {
        "case": _TEXT,
        "environment": ENVIRONMENT,
        "arms": {
            "type": "object",
            "properties": {},
            "additionalProperties": {"type": "object", "properties": _ARM, "required": list(_ARM)},
        },
    },
    "required": ["case", "arms"],
}


def problem_of_profile(profile: Mapping[str, Any]) -> str | None:
    """`place: what is wrong` of the first thing that no perfbench wrote; None where all is well."""
    from perfbench.files.yaml_source import dotted
    from perfbench.spec.scenario_schema import problems

    for problem in problems(profile, PROFILE):
        return f"{dotted(problem.place)}: {problem.message}" if problem.place else problem.message
    if not 1 <= len(profile["arms"]) <= 2:
        return f"arms: expected the bare backbone and a case, or it alone, got {len(profile['arms'])} arms"
    return None
