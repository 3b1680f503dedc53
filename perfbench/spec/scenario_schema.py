"""What a scenario may say: its JSON Schema (draft 2020-12), and its errors in one line each. Free of torch.

`schema()` is the only place that lists keys, types and ranges, those of a method's options being its dataclass's;
`perfbench validate --schema` prints it.
What depends on several fields at once is checked in `perfbench.spec.scenario`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, ValidationError, validators

from perfbench.errors import nearest
from perfbench.files.plain_text import shown
from perfbench.files.yaml_source import Place, Source
from perfbench.methods.dtypes import DTYPES, QUANTISATIONS
from perfbench.methods.options import NoOptions
from perfbench.methods.registry import METHODS, Method
from perfbench.spec.option_schema import schema_of

DEVICES = ("auto", "cpu", "cuda")

# Name -> what it is. A runtime generates tokens, a kernel set does the adapters' arithmetic.
RUNTIMES = {
    "transformers": "the Hugging Face model and its generate()",
    "static": "our own decode loop over fused weights and a fixed cache, for the Llama family",
    "continuous": "the same arithmetic for requests that join and leave between decode steps, without beams",
}
KERNELS = {
    "eager": "plain torch",
    "triton": "fused Triton kernels, on a CUDA device",
    "compiled": "plain torch through torch.compile, on runtime static",
}

ISOLATION = {
    "shared": "all arms of a comparison take turns in one child process",
    "per-arm": "each arm in a child process of its own, together with `none`",
}
PAPERS = {"para_table4": "PARA, Table 4", "fanlora_table3": "FanLoRA, Table 3"}
TENANT_MIXES = {
    "distinct": "the tenants take turns: request i belongs to tenant i mod tenants",
    "identical": "all requests belong to one tenant",
    "uniform": "each request's tenant is drawn, all with the same probability",
    "zipf": "each request's tenant is drawn, the one of rank k with a probability proportional to 1 / k^zipf_exponent",
}

Schema = dict[str, Any]

_NAME: Schema = {
    "type": "string",
    "pattern": r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$",
    "title": "a name of at most 40 letters, digits, '.', '_' and '-' that starts with a letter or digit",
}
# What every arm but `none` may have beside its method's options.
LABEL: Schema = {"label": {**_NAME, "description": "how tables name this arm; default: the name of its method"}}


def _options(method: Method) -> Schema:
    """The options of `method`, and the label."""
    return {
        "type": "object",
        "properties": {**schema_of(method.options), **({} if method.options is NoOptions else LABEL)},
        "additionalProperties": False,
        "description": method.summary,
    }


def _methods(known: dict[str, Method]) -> Schema:
    """The arms of a scenario: names of `known` methods, with their options."""
    with_options = {
        "type": "object",
        "properties": {name: _options(method) for name, method in known.items()},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
        "title": "method",
    }
    return {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_one_of("method", known), with_options]},
        "description": "the methods to compare: names, or {name: {options}}; the baseline `none` is always added",
    }


def _axis(value: Schema, description: str, **more: Any) -> Schema:
    """One `value`, or a list of them, which makes an axis of the cases."""
    several = {"type": "array", "items": value, "minItems": 1, "uniqueItems": True}
    return {"anyOf": [value, several], "description": f"{description} (a list: each value is measured)", **more}


def _integer(minimum: int) -> Schema:
    return {"type": "integer", "minimum": minimum}


def _one_of(title: str, names: Any) -> Schema:
    return {"type": "string", "enum": list(names), "title": title}


_WORKLOAD_FIELDS: Schema = {
    "prompt_tokens": _axis(
        _integer(1), "how many tokens each random prompt has; with `prompts`, how many of a prompt are used at most"
    ),
    "prompts": {
        "type": "string",
        "pattern": r"\.(txt|jsonl)$",
        "title": "the path of a .txt or .jsonl file",
        "description": "a file of prompts, looked for from the current folder and then from the folder of the scenario",
    },
    "new_tokens": _axis(
        _integer(2), "how many tokens each request generates; an end-of-sequence token does not stop it"
    ),
    "follow_up_tokens": _axis(
        _integer(0),
        "how many random tokens each request says in a second turn, after which it generates new_tokens again; 0: "
        "there is no second turn. It needs runtime static and beams 1",
        default=0,
    ),
    "own_tokens": _axis(
        _integer(0),
        "so many last tokens of each random prompt are its own, while those before are the same for all requests, such "
        "as a document that all tenants ask about; 0: all are its own",
        default=0,
    ),
    "beams": _axis(_integer(1), "how many beams each request searches with; 1 is greedy search", default=1),
    "requests": _axis(_integer(1), "how many prompts share a batch, which has requests x beams rows"),
    "tenants": _axis(_integer(1), "how many tenants the requests of a batch belong to"),
    "resident": _axis(
        _integer(1), "how many tenants' adapters are held in memory, at least `tenants`; default: `tenants`"
    ),
    "tenant_mix": _axis(
        _one_of("tenant_mix", TENANT_MIXES),
        "; ".join(f"{name}: {what}" for name, what in TENANT_MIXES.items()),
        default="distinct",
    ),
    "zipf_exponent": _axis(
        {"type": "number", "exclusiveMinimum": 0}, "the exponent of tenant_mix zipf, allowed with it only; default 1.1"
    ),
    "without_adapter": _axis(
        {"type": "number", "minimum": 0, "maximum": 1},
        "the share of the requests that belong to no tenant and get no adapter",
        default=0,
    ),
}

_POINTS: Schema = {"type": "object", "properties": _WORKLOAD_FIELDS, "additionalProperties": False}


def _workload(required: list[str]) -> Schema:
    """A workload, or a list of them; an override need not repeat what is required of the file."""
    points = {**_POINTS, "required": WORKLOAD_REQUIRED}
    several = {"type": "array", "items": points, "minItems": 1}
    return {
        "anyOf": [{**_POINTS, "required": required}, several],
        "description": "what one batch holds (a list: each of them is measured)",
    }


WORKLOAD_REQUIRED = ["new_tokens", "requests", "tenants"]

_FIELDS: Schema = {
    "name": {**_NAME, "description": "the name of the run; default: the file's name without .yaml"},
    "question": {"type": "string", "description": "the question that this scenario answers, in one sentence"},
    "backbone": _axis(
        {"type": "string", "minLength": 1},
        "the shared model: a named shape with random weights, a folder, or a hub id owner/model",
    ),
    "dtype": _axis(_one_of("dtype", DTYPES), "the type of the weights and of the arithmetic"),
    "quantisation": _axis(
        _one_of("quantisation", QUANTISATIONS),
        "how the weights of the backbone's linears are kept; int8: in 8 bits with a scale for each output, on a CPU",
        default="none",
    ),
    "runtime": _axis(_one_of("runtime", RUNTIMES), "what generates the tokens", default="transformers"),
    "tensor_parallel_size": _axis(
        _integer(1),
        "over how many devices, or processes of one CPU, runtime static spreads the heads and columns of each layer",
        default=1,
    ),
    "kernels": _axis(_one_of("kernels", KERNELS), "what computes the adapters' part", default="eager"),
    "workload": _workload(WORKLOAD_REQUIRED),
    "warmup": {**_integer(1), "description": "how often each arm runs before it is timed", "default": 3},
    "repetitions": {**_integer(1), "description": "how often each arm is timed", "default": 100},
    "processes": {
        **_integer(1),
        "description": "how many fresh processes measure, one after the other, each with all repetitions",
        "default": 1,
    },
    "seed": {
        "type": "integer",
        "minimum": 0,
        "maximum": 2**32 - 1,
        "description": "the seed of prompts, tenants, random weights and the order of the arms",
        "default": 0,
    },
    "isolation": {
        **_one_of("isolation", ISOLATION),
        "description": "; ".join(f"{name}: {what}" for name, what in ISOLATION.items()),
        "default": "shared",
    },
    "paper": {
        **_one_of("paper", PAPERS),
        "description": "the paper whose published numbers are shown beside the measured ones",
    },
}


def schema() -> Schema:
    """The schema of a scenario: with the methods that are known now, those of plugins included."""
    return _schema(tuple(METHODS.items()))


@lru_cache(maxsize=4)
def _schema(known: tuple[tuple[str, Method], ...]) -> Schema:
    fields = {**_FIELDS, "methods": _methods(dict(known))}
    override = {
        "type": "object",
        "properties": {**fields, "workload": _workload([])},
        "additionalProperties": False,
        "description": "what changes on this kind of device: mappings are merged, lists and single values replaced",
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "description": "a perfbench scenario",
        "type": "object",
        "properties": {
            **fields,
            "device": {
                **_one_of("device", DEVICES),
                "description": "where it runs; auto: on a GPU where there is one",
                "default": "auto",
            },
            "overrides": {
                "type": "object",
                "properties": {"cpu": override, "cuda": override},
                "additionalProperties": False,
                "description": "what is different on a CPU (`cpu`) and on a GPU (`cuda`)",
            },
        },
        "required": ["backbone", "dtype", "methods", "workload"],
        "additionalProperties": False,
    }


@dataclass(frozen=True)
class Problem:
    """What is wrong at one place: `message` says what was expected and what came."""

    place: Place
    message: str


# JSON has one kind of number: without this, 2.0 and (under some rules) true would pass as integers.
_TYPES = Draft202012Validator.TYPE_CHECKER.redefine_many(
    {
        "integer": lambda _, value: type(value) is int,
        "number": lambda _, value: type(value) in (int, float),
    }
)


def _pattern(_: Any, pattern: str, value: Any, __: Schema) -> Iterator[ValidationError]:
    """As JSON Schema has it: `$` is the end, where Python's also stands before a line break at the end."""
    if isinstance(value, str) and not re.search(re.sub(r"\$$", r"\\Z", pattern), value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


_Validator = validators.extend(Draft202012Validator, {"pattern": _pattern}, type_checker=_TYPES)
_MOST_UNKNOWN = 20


def problems(value: Any, rules: Schema | None = None) -> list[Problem]:
    """All that is wrong with `value` by `rules` (None: those of a scenario), in no particular order; empty if nothing
    is."""
    validator = _Validator(schema() if rules is None else rules)
    return [problem for error in validator.iter_errors(value) for problem in _explain(error)]


def first_written(source: Source, found: Sequence[Problem]) -> Problem:
    """The first of these problems in the order of writing; what is missing comes last: a misspelt key may be why."""
    rank = {place: number for number, place in enumerate(source.origins)}
    return min(found, key=lambda problem: rank.get(problem.place, len(rank)))


def _explain(error: ValidationError) -> Iterator[Problem]:
    """The problems behind one error of `jsonschema`."""
    place: Place = tuple(error.absolute_path)
    value: Any = error.instance
    limit: Any = error.validator_value
    schema: Any = error.schema
    got = f"got {shown(value)}"
    match error.validator:
        case "anyOf":
            yield from _explain_branches(value, schema, place)
        case "additionalProperties":
            known = schema["properties"]
            noun = schema.get("title", "key")
            unknown = [key for key in value if key not in known]
            for key in unknown[:_MOST_UNKNOWN]:  # of many the first is told, and to find a near name takes time
                hint = nearest(key, known) if known else "none is allowed here"
                yield Problem((*place, key), f"unknown {noun} {key!r}; {hint}")
        case "required":
            for key in limit:
                if key not in value:
                    expected = described(schema["properties"].get(key, {}))
                    yield Problem((*place, key), f"is missing; expected {expected}")
        case "enum":
            if isinstance(value, str):  # else the type is wrong, which is an error of its own
                yield Problem(place, f"unknown {schema.get('title', 'value')} {shown(value)}; {nearest(value, limit)}")
        case "minItems" | "minLength":
            what = "value" if isinstance(value, list) else "character"
            yield Problem(place, f"expected at least {f'one {what}' if limit == 1 else f'{limit} {what}s'}, {got}")
        case "uniqueItems":
            yield Problem(place, f"expected each value once, {got}")
        case "minProperties" | "maxProperties":
            yield Problem(place, f"expected exactly one {schema['title']}, {got}; give each its own item")
        case _:
            yield Problem(place, f"expected {described(schema)}, {got}")


def _explain_branches(value: Any, schema: Schema, place: Place) -> Iterator[Problem]:
    """Of several alternatives only the one that the value's type points to is explained."""
    for branch in schema["anyOf"]:
        if _Validator({"type": branch["type"]}).is_valid(value):
            for problem in problems(value, branch):
                yield Problem((*place, *problem.place), problem.message)
            return
    yield Problem(place, f"expected {described(schema)}, got {shown(value)}")


def described(schema: Schema) -> str:
    """What `schema` expects, in words: "an integer >= 1, or a list of them"."""
    if "anyOf" in schema:
        first, *others = schema["anyOf"]
        rest = ["a list of them" if other["type"] == "array" else described(other) for other in others]
        return ", or ".join([described(first), *rest])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "type" not in schema:
        return "a value"
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    words = " or ".join(_WORDS[name] for name in types)
    low, high = schema.get("minimum"), schema.get("maximum")
    if "pattern" in schema:
        return str(schema["title"])
    if high is not None:
        return f"{words} from {low} to {high}"
    if "exclusiveMinimum" in schema:
        return words.replace("a number", f"a number > {schema['exclusiveMinimum']}")
    return words if low is None else f"{words} >= {low}"


_WORDS = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
    "boolean": "a boolean",
}
