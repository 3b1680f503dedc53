"""What the files of a run directory hold, typed: the schema of run.json and the check of a sample. Free of torch.

Readers of runs trust what stands here and nothing else. Fields that a later or an earlier perfbench wrote beside these
are let through; `perfbench.run_folder.run_directory` checks first which fields there have to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NotRequired, TypedDict

from perfbench.figures.metrics import PARTS, named, required_of_samples
from perfbench.figures.stats import TAILS, Interval

Schema = dict[str, Any]
# One repetition, a line of samples.jsonl: the metrics of a source "sample" under their names, and whose it is.
Sample = dict[str, Any]


class Case(TypedDict):
    """One case of run.json; None is what is not measured. The parts hold {metric: figure}, `summary` {metric:
    summary of its samples}, the ratios {speed: interval}."""

    id: str
    comparison: str
    arm: str
    method: str
    options: dict[str, Any]
    kernels: str
    status: str
    reason: str | None
    check: dict[str, Any] | None
    memory: dict[str, Any] | None
    adapters: dict[str, Any] | None
    exact: dict[str, Any] | None
    summary: dict[str, Interval] | None
    kept: dict[str, Interval] | None
    versus_lora: dict[str, Interval] | None
    versus_plain: dict[str, Interval] | None


class Comparison(TypedDict):
    """Cases that are measured in turns, and what they share."""

    id: str
    backbone: str
    dtype: str
    device: str
    runtime: str
    workload: dict[str, Any]
    case_ids: list[str]
    quantisation: NotRequired[str]
    tensor_parallel_size: NotRequired[int]
    backbone_parameters: NotRequired[int | None]
    backbone_bytes: NotRequired[int | None]
    roof: NotRequired[dict[str, Any] | None]


class Manifest(TypedDict):
    """run.json, as `RUN` below has it in more detail. `finished_at` is None while it is being written."""

    schema_version: int
    perfbench_version: str
    started_at: str
    finished_at: str | None
    scenario: dict[str, Any]
    environment: dict[str, Any]
    processes: int
    comparisons: list[Comparison]
    cases: dict[str, Case]


# Fields of a sample: numbers > 0, `itl_ms` being a list of them, and numbers >= 0 that may be null or absent.
_NUMBERS = tuple(name for name in required_of_samples() if name != "itl_ms")
_MAYBE_NUMBERS = ("sm_clock_mhz", "energy_mj", *(name for name in named("sample") if name not in required_of_samples()))

# Within these a ratio of two figures, and the square of one, are finite; no machine comes near.
LEAST, LARGEST = 1e-12, 1e24


def _or_null(*types: str, **rules: Any) -> Schema:
    return {"type": [*types, "null"], **rules}


def _object(properties: Schema, *required: str, others: Schema | None = None, null: bool = False) -> Schema:
    schema: Schema = {"type": ["object", "null"] if null else "object", "properties": properties}
    schema |= {"required": list(required)} if required else {}
    return schema | ({"additionalProperties": others} if others is not None else {})


_TEXT: Schema = {"type": "string"}
_MAYBE_TEXT = _or_null("string")
_COUNT: Schema = {"type": "integer", "minimum": 1}
_MAYBE_COUNT = _or_null("integer", minimum=0)
_FIGURE = _or_null("number", minimum=0, maximum=LARGEST)
_SIZE: Schema = {"type": "number", "minimum": 0, "maximum": LARGEST}
_SCALAR = _or_null("string", "number", "boolean")

_SUMMARY = _object(
    {
        **dict.fromkeys(("min", "max", "mean", "median", "iqr", "q1", "q3"), _SIZE),
        **dict.fromkeys(("stddev", *TAILS), _FIGURE),
        "rounds": _COUNT,
    },
    "median",
    "rounds",
)
_RATIO = _object(
    {**dict.fromkeys(("ratio", "low", "high"), _FIGURE), "rounds": _MAYBE_COUNT, "correlated": _or_null("boolean")}
)
_RATIOS = _object({}, others=_RATIO, null=True)
_CASE = _object(
    {
        **dict.fromkeys(("id", "comparison", "arm", "method", "kernels", "status"), _TEXT),
        "options": {"type": "object"},
        "reason": _MAYBE_TEXT,
        "check": _object(
            {"passed": {"type": "boolean"}, "ties": _MAYBE_COUNT, "requests": _MAYBE_COUNT}, "passed", null=True
        ),
        # Of these every figure that is declared is a number; what else a version keeps beside them may be anything.
        **{part: _object(dict.fromkeys(named(part), _FIGURE), null=True) for part in PARTS},
        "summary": _object({"total_ms": _SUMMARY}, "total_ms", others=_SUMMARY, null=True),
        **dict.fromkeys(named("ratio"), _RATIOS),
    }
)
_WORKLOAD = _object(
    {
        "requests": _COUNT,
        **dict.fromkeys(("new_tokens", "beams", "tenants"), _COUNT),
        **dict.fromkeys(("prompt_tokens", "resident", "follow_up_tokens", "own_tokens"), _MAYBE_COUNT),
        **dict.fromkeys(("zipf_exponent", "without_adapter"), _FIGURE),
        **dict.fromkeys(("tenant_mix", "prompts"), _MAYBE_TEXT),
    },
    "requests",
    others=_SCALAR,
)
_SPEED: Schema = {"type": "number", "minimum": 1, "maximum": LARGEST}
_ROOF = _object(
    {
        "name": _TEXT,
        "bytes_per_s": _SPEED,
        "flops_per_s": _object({}, others=_SPEED),
        "memory_bytes": _MAYBE_COUNT,
        "source": _TEXT,
    },
    "name", "bytes_per_s", "flops_per_s", "memory_bytes", "source",
    null=True,
)  # fmt: skip
_CPU = _object(
    {
        **dict.fromkeys(("model", "governor"), _MAYBE_TEXT),
        **dict.fromkeys(("cores", "logical_cores", "usable_cores", "threads", "memory_bytes"), _MAYBE_COUNT),
    },
    null=True,
)
ENVIRONMENT = _object(
    {
        "cpu": _CPU,
        "gpus": {"type": ["array", "null"], "items": _object({"name": _MAYBE_TEXT})},
        "load_average": {"type": ["array", "null"], "items": {"type": "number", "minimum": 0}, "minItems": 1},
        "checkout": _object({"commit": _MAYBE_TEXT, "dirty": _or_null("boolean")}, null=True),
        "versions": _object({}, others=_MAYBE_TEXT, null=True),
        **dict.fromkeys(("python", "os", "device_kind"), _MAYBE_TEXT),
    }
)
_COMPARISON = _object(
    {
        **dict.fromkeys(("id", "backbone", "dtype", "device", "runtime"), _TEXT),
        "quantisation": _TEXT,
        "tensor_parallel_size": {"type": "integer", "minimum": 1},
        "workload": _WORKLOAD,
        "case_ids": {"type": "array", "items": _TEXT, "uniqueItems": True},
        **dict.fromkeys(("backbone_parameters", "backbone_bytes"), _MAYBE_COUNT),
        "roof": _ROOF,
        "machine": ENVIRONMENT,  # of a run on a cluster
    }
)
_SCENARIO = _object(
    {
        **dict.fromkeys(("name", "question", "paper"), _MAYBE_TEXT),
        "notes": {"type": ["array", "null"], "items": _TEXT},
        "repetitions": _or_null("integer", minimum=1),
        "processes": _COUNT,
    }
)
RUN = _object(
    {
        "perfbench_version": _TEXT,
        "started_at": _TEXT,
        "finished_at": _MAYBE_TEXT,
        "scenario": _SCENARIO,
        "environment": ENVIRONMENT,
        "processes": {"type": "integer", "minimum": 0},
        "comparisons": {"type": "array", "items": _COMPARISON},
        "cases": _object({}, others=_CASE),
    },
    "finished_at",
)


def problem_of_run(manifest: Mapping[str, Any]) -> tuple[str, str] | None:
    """(place, what is wrong) of the first thing in a run.json that no perfbench wrote; None where all is well."""
    # jsonschema takes longer to import than most runs to read.
    from perfbench.files.yaml_source import dotted
    from perfbench.spec.scenario_schema import problems

    for problem in problems(manifest, RUN):
        return dotted(problem.place), problem.message
    placed: set[str] = set()
    for index, comparison in enumerate(manifest["comparisons"]):
        if twice := placed & set(comparison["case_ids"]):
            return f"comparisons.{index}.case_ids", f"expected each case in one comparison, got {min(twice)!r} again"
        placed |= set(comparison["case_ids"])
    for case_id, case in manifest["cases"].items():
        if case["id"] != case_id:
            return f"cases.{case_id}.id", f"expected {case_id!r}, got {case['id']!r}"
    return None


def problem_of_sample(sample: Mapping[str, Any]) -> str | None:
    """What is wrong with a line of samples.jsonl that has all of its fields; None where all is well. By hand: a run
    has thousands of them, and a schema takes a hundred times as long."""
    return next(_problems_of_sample(sample), None)


def _problems_of_sample(sample: Mapping[str, Any]) -> Iterator[str]:
    for name in _NUMBERS:
        if not _is_number(sample[name]) or not LEAST <= sample[name] <= LARGEST:
            yield _got(name, "a number > 0", sample[name])
            return
    if sample["ttft_ms"] > sample["total_ms"]:
        yield _got("ttft_ms", f"at most total_ms {sample['total_ms']}", sample["ttft_ms"])
    steps = sample["itl_ms"]
    if not isinstance(steps, list) or not steps or not all(_is_number(step) and 0 <= step <= LARGEST for step in steps):
        yield _got("itl_ms", "a list of numbers >= 0, one at least", steps)
    for name in ("round", "process"):
        if type(sample[name]) is not int or sample[name] < 0:
            yield _got(name, "an integer >= 0", sample[name])
    for name in _MAYBE_NUMBERS:
        value = sample.get(name)
        if value is not None and not (_is_number(value) and 0 <= value <= LARGEST):
            yield _got(name, "a number >= 0 or null", value)
    if not isinstance(sample["case"], str):
        yield _got("case", "a string", sample["case"])
    if not isinstance(sample["void"], str | None):
        yield _got("void", "a string or null", sample["void"])


def _is_number(value: Any) -> bool:
    return type(value) is float or type(value) is int


def _got(name: str, expected: str, value: Any) -> str:
    text = repr(value)
    return f"{name}: expected {expected}, got {text if len(text) <= 60 else f'{text[:57]}...'}"
