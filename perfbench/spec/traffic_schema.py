"""What a traffic scenario may say beside what every scenario does: its JSON Schema. Free of torch.

The fields that the two have in common are those of `perfbench.spec.scenario_schema`; what depends on several fields at
once is checked in `perfbench.spec.traffic`.
"""

from __future__ import annotations

from typing import Any

from perfbench.methods.dtypes import DTYPES
from perfbench.spec.scenario_schema import DEVICES, KERNELS, TENANT_MIXES, Schema
from perfbench.spec.scenario_schema import schema as scenario_schema

ARRIVALS = {
    "poisson": "at random moments, independent of each other",
    "gamma": "at random moments, in bursts where burstiness is above 1, more evenly where it is below",
    "constant": "one after the other, all with the same pause",
    "closed": "in_flight requests are open at any time: one that ends is followed by the next",
}
MIXES = {name: TENANT_MIXES[name] for name in ("uniform", "zipf")} | {
    "in-turn": "the tenants one after the other, so that requests in flight are of as many as there are"
}
ADAPTERS = {
    "scenario": "the server has the scenario's adapters, by which its answers are proved",
    "unknown": "it has others, and its answers are not proved",
}
# `tenants: search` looks for the largest number that holds the targets.
SEARCH = "search"


def _number(**rules: Any) -> Schema:
    return {"type": "number", **rules}


def _integer(minimum: int) -> Schema:
    return {"type": "integer", "minimum": minimum}


def _one_of(title: str, names: Any) -> Schema:
    return {"type": "string", "enum": list(names), "title": title}


def _section(description: str, properties: dict[str, Schema]) -> Schema:
    return {"type": "object", "properties": properties, "additionalProperties": False, "description": description}


def _lengths(description: str) -> Schema:
    drawn = {
        "type": "object",
        "properties": {
            "median": {**_integer(1), "description": "half of the requests have fewer"},
            "sigma": _number(minimum=0, maximum=4, description="the standard deviation of the logarithm"),
            "most": {**_integer(1), "description": "longer ones are cut to this"},
        },
        "required": ["median", "sigma", "most"],
        "additionalProperties": False,
    }
    return {"anyOf": [_integer(1), drawn], "description": f"{description}: a number, or lognormal with these"}


_TRAFFIC = _section(
    "the requests: how many, whose, how long, and when they come",
    {
        "prompt_tokens": _lengths("how many random tokens a prompt has"),
        "new_tokens": _lengths("how many tokens a request gets"),
        "tenants": {
            "anyOf": [
                {"type": "string", "enum": [SEARCH], "title": "word"},
                _integer(1),
                {"type": "array", "items": _integer(1), "minItems": 1, "uniqueItems": True},
            ],
            "description": "how many tenants send requests; search: the largest number that holds the targets",
        },
        "rate_per_tenant": _number(
            exclusiveMinimum=0,
            description="requests a second of one tenant on average; all of them send tenants x this",
        ),
        "rate": {
            "anyOf": [
                _number(exclusiveMinimum=0),
                {"type": "array", "items": _number(exclusiveMinimum=0), "minItems": 1, "uniqueItems": True},
            ],
            "description": "requests a second of all tenants together, in place of rate_per_tenant",
        },
        "in_flight": {
            "anyOf": [
                _integer(1),
                {"type": "array", "items": _integer(1), "minItems": 1, "uniqueItems": True},
            ],
            "description": "with arrivals closed, in place of a rate: how many requests are open at any time",
        },
        "tenant_mix": {
            **_one_of("tenant_mix", MIXES),
            "description": "; ".join(f"{name}: {what}" for name, what in MIXES.items()),
            "default": "uniform",
        },
        "zipf_exponent": _number(minimum=0, maximum=8, description="with tenant_mix zipf only; default 1"),
        "without_adapter": _number(
            minimum=0, maximum=1, description="the share of the requests that get no adapter", default=0
        ),
        "arrivals": {
            **_one_of("arrivals", ARRIVALS),
            "description": "; ".join(f"{name}: {what}" for name, what in ARRIVALS.items()),
            "default": "poisson",
        },
        "burstiness": _number(
            minimum=0.01,
            maximum=100,
            description="with arrivals gamma only: the variance of the pauses over that of poisson",
        ),
        "requests": {**_integer(20), "description": "how many requests one measurement sends", "default": 300},
    },
)
_SERVER = _section(
    "what serves them",
    {
        "rows": {**_integer(1), "description": "how many requests are in flight at once", "default": 8},
        "resident": {
            **_integer(1),
            "description": "how many adapters the device holds; others wait on the host",
            "default": 16,
        },
        "chunk_tokens": {
            **_integer(1),
            "description": "how many tokens of a prompt are read between two decode steps; default: all of them",
        },
    },
)
_TARGET = _section(
    "a server that answers in place of perfbench's own engine",
    {
        "openai": {
            "type": "string",
            "minLength": 1,
            "description": "its address up to and with /v1; it is asked for completions, as OpenAI defines them",
        },
        "models": _section(
            "the names of its models",
            {
                "base": {
                    "type": "string",
                    "minLength": 1,
                    "description": "without an adapter; default: the backbone's",
                },
                "tenant": {
                    "type": "string",
                    "minLength": 1,
                    "description": "of a tenant, whose number stands for {tenant}; default: tenant-{tenant}",
                },
            },
        ),
        "adapters": {
            **_one_of("adapters", ADAPTERS),
            "description": "; ".join(f"{name}: {what}" for name, what in ADAPTERS.items()),
            "default": "scenario",
        },
        "timeout_s": _number(
            exclusiveMinimum=0, description="how long an answer may take in all before it has failed; default 120"
        ),
        "command": {
            "type": "array",
            "items": {"type": "string", "minLength": 1},
            "minItems": 1,
            "description": "a program and its arguments, which starts the server and is ended with the run; "
            "default: it is there already",
        },
        "ready_s": _number(exclusiveMinimum=0, description="how long that may take until it answers; default 300"),
    },
)
_TARGETS = _section(
    "what a request may take; a measurement holds them where `share` of its requests do",
    {
        "ttft_ms": _number(
            exclusiveMinimum=0, description="milliseconds from when a request is due to its first token"
        ),
        "itl_ms": _number(exclusiveMinimum=0, description="ms between the tokens of a request, on average"),
        "share": _number(exclusiveMinimum=0, maximum=1, description="of all requests", default=0.99),
    },
)
_REQUIRED = {
    "traffic": ["prompt_tokens", "new_tokens", "tenants"],
    "target": ["openai"],
    "targets": ["ttft_ms", "itl_ms"],
}

# Of a scenario's own fields those that a traffic scenario has too, with one value in place of an axis.
_COMMON = ("name", "question", "methods", "seed")


def schema() -> Schema:
    """The schema of a traffic scenario, with the methods that are known now, those of plugins included."""
    common = {name: field for name, field in scenario_schema()["properties"].items() if name in _COMMON}
    fields: dict[str, Schema] = {
        **common,
        "backbone": {"type": "string", "minLength": 1, "description": "as in any scenario"},
        "dtype": {**_one_of("dtype", DTYPES), "description": "the type of the weights and of the arithmetic"},
        "kernels": {
            **_one_of("kernels", KERNELS),
            "description": "what computes the adapters' part",
            "default": "eager",
        },
        "traffic": _TRAFFIC,
        "server": _SERVER,
        "target": _TARGET,
        "targets": _TARGETS,
        "repetitions": {
            **_integer(1),
            "description": "how often each point is measured, with other requests each; all have to hold the targets",
            "default": 2,
        },
        "price_per_hour": {
            "type": "number",
            "exclusiveMinimum": 0,
            "description": "what an hour of the machine costs, in any currency: the table then says what a million new "
            "tokens cost",
        },
    }
    override = {"type": "object", "properties": fields, "additionalProperties": False}
    required = {name: {**fields[name], "required": names} for name, names in _REQUIRED.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "description": "a perfbench traffic scenario",
        "type": "object",
        "properties": {
            **fields,
            **required,
            "device": {**_one_of("device", DEVICES), "description": "where it runs", "default": "auto"},
            "overrides": {
                "type": "object",
                "properties": {"cpu": override, "cuda": override},
                "additionalProperties": False,
                "description": "what is different on a CPU (`cpu`) and on a GPU (`cuda`)",
            },
        },
        "required": ["backbone", "dtype", "methods", "traffic", "targets"],
        "additionalProperties": False,
    }
