"""What the files of a traffic run hold, typed: what `show`, `report` and `--resume` trust. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from perfbench.files.plain_text import shown
from perfbench.files.yaml_source import dotted
from perfbench.run_folder.run_schema import ENVIRONMENT, LARGEST, LEAST, Schema
from perfbench.spec.scenario_schema import problems
from perfbench.traffic.outcome import Answered

COLUMNS = tuple(field.name for field in fields(Answered))


def _object(properties: Schema, *, required: tuple[str, ...] | None = None, null: bool = False) -> Schema:
    """With all of these properties, or those `required`; others are let through."""
    names = list(properties if required is None else required)
    return {"type": ["object", "null"] if null else "object", "properties": properties, "required": names}


_TEXT: Schema = {"type": "string"}
_MAYBE_TEXT: Schema = {"type": ["string", "null"]}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_SIZE: Schema = {"type": "number", "minimum": 0, "maximum": LARGEST}
_MAYBE_SIZE: Schema = {**_SIZE, "type": ["number", "null"]}

_LENGTHS = _object({"median": _COUNT, "sigma": _SIZE, "most": _COUNT})
_SCENARIO = _object(
    {
        **dict.fromkeys(("name", "question", "device", "backbone", "dtype", "kernels"), _TEXT),
        "traffic": _object(
            {
                **dict.fromkeys(("prompt_tokens", "new_tokens"), _LENGTHS),
                "tenants": {"type": ["array", "null"], "items": _COUNT},
                **dict.fromkeys(("rate_per_tenant", "zipf_exponent"), _MAYBE_SIZE),
                "arrivals": _TEXT,
                "requests": _COUNT,
            }
        ),
        "server": _object({"rows": _COUNT, "resident": _COUNT}),
        "target": _object({"openai": _TEXT}, null=True),
        "targets": _object(dict.fromkeys(("ttft_ms", "itl_ms", "share"), _SIZE)),
        "repetitions": _COUNT,
        "price_per_hour": {"type": ["number", "null"], "exclusiveMinimum": 0},
    }
)
for _later in ("target", "price_per_hour"):  # earlier runs lack them
    _SCENARIO["required"].remove(_later)
_TAILS = _object(dict.fromkeys(("median", "p95", "p99"), _MAYBE_SIZE), required=())
_FIGURES = _object(
    {
        "counted": _COUNT,
        **dict.fromkeys(("ttft_ms", "itl_ms", "total_ms", "wait_ms"), _TAILS),
        **dict.fromkeys(("kept_share", "loaded_share", "goodput_per_s", "tokens_per_s", "fairness"), _MAYBE_SIZE),
        **dict.fromkeys(("worst_tenant_ttft_ms", "tenants_seen"), _MAYBE_SIZE),
        "wait_growth_ms": {"type": ["number", "null"], "minimum": -LARGEST, "maximum": LARGEST},
    },
    required=("counted", "kept_share"),
    null=True,
)
_FAILED = _object({"requests": _COUNT, "first": _TEXT}, null=True)
_POINT = _object(
    {
        **{"tenants": _COUNT, "rate_per_s": _SIZE, "held": {"type": "boolean"}, "figures": _FIGURES},
        **{"failed": _FAILED, "client_lag_ms": _MAYBE_SIZE, "in_flight": _COUNT},
    },
    required=("tenants", "rate_per_s", "held", "figures"),
)
_ARM = _object(
    {
        "method": _TEXT,
        "status": {"type": "string", "enum": ["pending", "ok", "check_failed", "check_void", "not_proved", "crashed"]},
        "reason": _MAYBE_TEXT,
        "points": {"type": "array", "items": _POINT},
        "most_tenants": _object({"held": _COUNT}, null=True),
        "throughput_per_s": _MAYBE_SIZE,
        "proof": _object({"status": _TEXT, "reason": _MAYBE_TEXT}),
    },
    required=("method", "status"),
)
_MANIFEST = _object(
    {
        "started_at": _TEXT,
        "finished_at": _MAYBE_TEXT,
        "scenario": _SCENARIO,
        "environment": ENVIRONMENT,
        "arms": {"type": "object", "properties": {}, "additionalProperties": _ARM},
    }
)


def problem_of_manifest(manifest: Mapping[str, Any]) -> str | None:
    """`place: what is wrong` of the first thing in a traffic.json that no perfbench wrote; None where all is well."""
    for problem in problems(manifest, _MANIFEST):
        return f"{dotted(problem.place)}: {problem.message}" if problem.place else problem.message
    traffic = manifest["scenario"]["traffic"]
    if traffic["tenants"] is None and traffic["rate_per_tenant"] is None:
        return "scenario.traffic.rate_per_tenant: expected a number where tenants are searched for, got null"
    if not manifest["arms"]:
        return "arms: expected one at least, got none"
    return None


def problem_of_verdicts(manifest: Mapping[str, Any]) -> str | None:
    """The first status in a traffic.json that says more than its proof and its points; None where all is well. A run
    that goes on makes its statuses anew."""
    searched = manifest["scenario"]["traffic"]["tenants"] is None
    for name, arm in manifest["arms"].items():
        proof = (arm.get("proof") or {}).get("status")
        if arm["status"] == "ok" and proof != "ok":
            return f"arms.{name}.status: expected a proof that is ok, got {shown(proof)}"
        if arm["status"] == "ok" and (not arm.get("points") or (searched and not arm.get("most_tenants"))):
            return f"arms.{name}.status: expected points that were measured, got none"
        for number, point in enumerate(arm.get("points", ())):
            if point["held"] and point.get("failed"):
                return f"arms.{name}.points.{number}.held: expected false where requests failed, got true"
    return None


def problem_of_measurement(line: Any) -> str | None:
    """What is wrong with a line of measurements.jsonl; None where all is well."""
    if not isinstance(line, dict):
        return "expected an object"
    counts = {"in_flight": 0, **line}  # older runs have open loops alone
    for name in ("tenants", "repetition", "sent", "in_flight"):
        if type(counts.get(name)) is not int or counts[name] < 0:
            return f"{name}: expected an integer >= 0"
    if not isinstance(line.get("arm"), str):
        return "arm: expected a string"
    if not _is_size(line.get("rate")):
        return "rate: expected a number >= 0"
    if "loaded_bytes" not in line or not (line["loaded_bytes"] is None or _is_size(line["loaded_bytes"])):
        return "loaded_bytes: expected a number >= 0 or null"
    rows, lag_ms, failed = line.get("rows", ()), line.get("lag_ms"), line.get("failed", [])
    if lag_ms is not None and not (
        isinstance(lag_ms, list) and len(lag_ms) == line["sent"] and all(map(_is_size, lag_ms))
    ):
        return f"lag_ms: expected {line['sent']:,} numbers >= 0"
    if not isinstance(failed, list) or not all(map(_is_failure, failed)):
        return "failed: expected a list of place, tenant, and why"
    if rows is None:
        return None
    if line.get("columns") != list(COLUMNS):
        return f"columns: expected {', '.join(COLUMNS)}"
    if not isinstance(rows, list) or not rows or len(rows) + len(failed) != line["sent"]:
        expected = line["sent"] - len(failed)
        return f"rows: expected a list of the {expected:,} requests that were sent and answered, one at least, or null"
    for number, row in enumerate(rows):
        if (
            not isinstance(row, list)
            or len(row) != len(COLUMNS)
            or not _is_answered(dict(zip(COLUMNS, row, strict=True)))
        ):
            return f"rows.{number}: expected {', '.join(COLUMNS)} of a request, times >= 0 that fit together"
    return None


def _is_answered(one: Mapping[str, Any]) -> bool:
    gaps = one["itl_ms"]
    return (
        type(one["tenant"]) is int
        and one["tenant"] >= -1
        and (one["loaded"] is None or type(one["loaded"]) is bool)
        and isinstance(gaps, list)
        and all(map(_is_size, (*gaps, *(one[name] for name in ("due_s", "wait_ms", "ttft_ms", "total_ms")))))
        and LEAST <= one["ttft_ms"] <= one["total_ms"]
        and one["wait_ms"] <= one["ttft_ms"]
    )


def _is_failure(one: Any) -> bool:
    return isinstance(one, list) and [type(value) for value in one] == [int, int, str]


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= LARGEST
