"""What the run.json of a fine-tuning holds, typed: what `show`, `--resume` and a verdict trust. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perfbench.files.yaml_source import dotted
from perfbench.run_folder.run_schema import ENVIRONMENT, LARGEST, Schema
from perfbench.spec.scenario_schema import problems

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_FIGURE: Schema = {"type": "number", "minimum": 0, "maximum": LARGEST}
_MAYBE_FIGURE: Schema = {**_FIGURE, "type": ["number", "null"]}
_MAYBE_COUNT: Schema = {**_COUNT, "type": ["integer", "null"]}

_SEED: Schema = {
    "type": "object",
    "properties": {
        "status": _TEXT,
        "reason": {"type": ["string", "null"]},
        **dict.fromkeys(("best_step", "steps", "trainable_parameters", "test_items", "peak_bytes"), _MAYBE_COUNT),
        **dict.fromkeys(("best_dev_loss", "train_s", "time_to_best_s", "tokens_per_s", "test_score"), _MAYBE_FIGURE),
    },
    "required": ["status", "test_score", "peak_bytes"],
}
# Of a seed that is trained, what its row shows.
_TRAINED = {"best_dev_loss": _FIGURE, "best_step": _COUNT, "steps": _COUNT, "time_to_best_s": _FIGURE}
_TRAINED |= {"tokens_per_s": _FIGURE, "trainable_parameters": _COUNT}
_TEST = {"metric": _TEXT, "seeds": _COUNT, "items": _COUNT} | dict.fromkeys(("lowest", "highest", "median"), _FIGURE)
FINETUNE: Schema = {
    "type": "object",
    "properties": {
        "config": {
            "type": "object",
            "properties": {
                "question": {"type": ["string", "null"]},
                "task": {"type": "object", "properties": {"name": _TEXT}, "required": ["name"]},
                **dict.fromkeys(("method", "backbone", "dtype"), _TEXT),
            },
            "required": ["question", "task", "method", "backbone", "dtype"],
        },
        "environment": {
            **ENVIRONMENT,
            "properties": {**ENVIRONMENT["properties"], "device_kind": _TEXT},
            "required": ["device_kind"],
        },
        "processes": {"type": "integer", "minimum": 1},
        "examples": {"type": "object", "properties": {"train": _COUNT}, "required": ["train"]},
        "seeds": {"type": "object", "properties": {}, "additionalProperties": _SEED},
        "test": {"type": ["object", "null"], "properties": _TEST, "required": list(_TEST)},
    },
    "required": ["config", "environment", "processes", "examples", "seeds", "test"],
}


def problem_of_finetune(manifest: Mapping[str, Any]) -> str | None:
    """`place: what is wrong` of the first thing that no perfbench wrote; None where all is well."""
    for problem in problems(manifest, FINETUNE):
        return f"{dotted(problem.place)}: {problem.message}" if problem.place else problem.message
    trained = {"type": "object", "properties": _TRAINED, "required": list(_TRAINED)}
    for seed, found in manifest["seeds"].items():
        if found["status"] == "ok":
            for problem in problems(found, trained):
                return f"seeds.{seed}.{dotted(problem.place)}: {problem.message}"
    return None
