"""What a process of `perfbench ab` may say: one line of JSON for each event. Free of torch.

perfbench/ab_worker.py speaks it, of every revision, and so may a command of the user's. The process reads a job, one
line of JSON, on standard input: `protocol`, `scenario` (the file that the command line names), `prepare` and others
that it may leave aside. Where `prepare` is true it says a `case` for everything that it can measure, then `ready`, and
ends. Else it says `ready` once it is warm, and then, for every line {"case": ..., "repetitions": N}, one `block` with N
samples, until standard input ends.
"""

from __future__ import annotations

import json
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from perfbench.figures.metrics import required_of_samples

# What this process speaks; the job says it to the other one.
PROTOCOL = 1

_TEXT, _NUMBER = {"type": "string"}, {"type": "number"}
# `itl_ms` has a value for each step.
_FIGURES = {
    name: {"type": "array", "items": _NUMBER} if name == "itl_ms" else _NUMBER for name in required_of_samples()
}
_SAMPLE = {
    "type": "object",
    "required": list(_FIGURES),
    "properties": {
        **_FIGURES,
        "energy_mj": {"type": ["number", "null"]},
        "sm_clock_mhz": {"type": ["number", "null"], "minimum": 0},
        "throttle_reasons": {"type": ["array", "null"], "items": _TEXT},
        "void": {"type": ["string", "null"]},
    },
}
_PASSED = {"type": "object", "required": ["passed"], "properties": {"passed": {"type": "boolean"}}}
# Event -> what it has to hold; more is no fault, since revisions speak to each other.
EVENTS: dict[str, dict[str, Any]] = {
    "phase": {},
    "error": {"required": ["kind", "message"], "properties": {"kind": _TEXT, "message": _TEXT}},
    "backbone": {},
    "case": {"required": ["case", "status", "check"], "properties": {"case": _TEXT, "status": _TEXT}},
    "counted": {"required": ["case", "exact"]},
    "ready": {
        "required": ["cases", "requests"],
        "properties": {
            "cases": {"type": "array", "minItems": 1, "items": _TEXT},
            "requests": {"type": "integer", "minimum": 1},
        },
    },
    "block": {"required": ["samples"], "properties": {"samples": {"type": "array", "items": _SAMPLE}}},
    "done": {},
}
# Of a `case` that is ok.
_CASE_OK = {"properties": {"check": _PASSED, "exact": {"type": "object"}}}
# What a case may leave out, and is then this.
_OF_A_CASE: dict[str, Any] = {"reason": None, "memory": {}, "adapters": {}, "exact": {}}
# And a sample.
_OF_A_SAMPLE: dict[str, Any] = {"energy_mj": None, "sm_clock_mhz": None, "throttle_reasons": None, "void": None}


def event_of(line: bytes) -> dict[str, Any]:
    """The event of one line. ValueError says what was expected and what came."""
    try:
        event = json.loads(line)
    except ValueError:
        raise ValueError(f"expected a line of JSON, got {line[:60].decode(errors='replace').strip()!r}") from None
    kind = event.get("event") if isinstance(event, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"expected an object with `event`, got {str(event)[:60]}")
    schema = EVENTS.get(kind, {})
    if kind == "case" and event.get("status") == "ok":
        schema = schema | {"allOf": [_CASE_OK]}
    if (fault := best_match(Draft202012Validator(schema).iter_errors(event))) is not None:
        place = ".".join(map(str, [kind, *fault.absolute_path]))
        raise ValueError(f"{place}: {fault.message[:200]}")
    return event


def samples_of(event: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples of a `block`, with what they may leave out."""
    return [_OF_A_SAMPLE | sample for sample in event["samples"]]


def prepared(event: dict[str, Any]) -> dict[str, Any]:
    """What a `case` found, with what it may leave out."""
    return _OF_A_CASE | {key: event[key] for key in event if key not in ("event", "case")}
