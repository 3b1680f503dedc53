"""What an accuracy.json holds, typed: what `show`, `report` and `--resume` trust. Free of torch."""

from __future__ import annotations

from perfbench.finetune.finetune_config import SCHEMA
from perfbench.run_folder.run_schema import ENVIRONMENT, LARGEST, Schema


def _by_name(inside: Schema) -> Schema:
    return {"type": "object", "properties": {}, "additionalProperties": inside}


def _whole(properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


_TEXT: Schema = {"type": "string"}
_IDENTITY: Schema = {
    "type": ["object", "null"],
    "properties": {
        **dict.fromkeys(("status", "reason"), _TEXT),
        "relative_difference": {"type": ["number", "null"], "minimum": 0, "maximum": LARGEST},
    },
}
_DONE: Schema = {
    "type": "object",
    "properties": {"items": {"type": "integer", "minimum": 0}, "identity": _IDENTITY},
    "required": ["items"],
}
_NUMBERS = ("seeds", "beams", "learning_rate", "epochs", "batch", "patience", "evaluate_every", "max_tokens")
_FINETUNE_FIELDS: Schema = {
    **{name: SCHEMA["properties"][name] for name in _NUMBERS},
    "task": {"type": "object", "properties": {"name": _TEXT}, "required": ["name"]},
    "options": {"type": "object"},
    **dict.fromkeys(("backbone", "method", "dtype"), _TEXT),
}
_CONFIG: Schema = {
    "reference": _TEXT,
    "margin": {"type": "number", "minimum": 0, "maximum": 1},
    "serve": {"type": "object"},
    "entries": {"type": "array", "minItems": 1, "items": _whole({
        "method": _TEXT, "task": _TEXT, "finetune": _whole(_FINETUNE_FIELDS),
    })},
}  # fmt: skip
# What --resume and the page trust; adapters: task -> method -> seed -> facts; paths: task -> path -> method -> what is
# done.
ACCURACY: Schema = {
    "type": "object",
    "properties": {
        **dict.fromkeys(("name", "started_at", "perfbench_version"), _TEXT),
        "question": {"type": ["string", "null"]},
        "config": _whole(_CONFIG),
        "environment": {**ENVIRONMENT, "required": ["device_kind"]},
        "adapters": _by_name(_by_name(_by_name(_whole({"trainable_parameters": {"type": "integer", "minimum": 0}})))),
        "left_out": {"type": "array", "items": _whole({"id": _TEXT, "reason": _TEXT})},
        "paths": _by_name(_by_name(_by_name(_DONE))),
        "verdict": {"type": ["object", "null"]},
    },
}
ACCURACY["required"] = list(ACCURACY["properties"])
