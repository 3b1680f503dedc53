"""The JSON Schema of a method's options, made of its dataclass: types, defaults, choices and bounds. Free of torch."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import MISSING, fields
from typing import Any

Schema = dict[str, Any]

_NAMES = {int: "integer", float: "number", str: "string", bool: "boolean", types.NoneType: "null"}


def schema_of(options: type[Any]) -> dict[str, Schema]:
    """Name -> schema of each field of the dataclass `options`, in its order; a field's metadata are laid over what its
    annotation says. TypeError on a field whose annotation says nothing that a YAML file can hold."""
    hints = typing.get_type_hints(options)
    found = {}
    for field in fields(options):
        try:
            schema = {**_of_hint(hints[field.name]), **field.metadata}
        except TypeError as error:
            raise TypeError(f"{options.__name__}.{field.name}: {error}") from None
        if "enum" in schema:
            schema.setdefault("title", field.name)
        if field.default is not MISSING and field.default is not None:
            schema["default"] = json.loads(json.dumps(field.default))
        found[field.name] = schema
    return found


def _of_hint(hint: Any) -> Schema:
    """The schema of one annotation: a scalar, None, a Literal of texts, a tuple of any length, or a union of these."""
    if hint in _NAMES:
        return {"type": _NAMES[hint]}
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal and all(isinstance(part, str) for part in parts):
        return {"type": "string", "enum": list(parts)}
    if origin is tuple and len(parts) == 2 and parts[1] is Ellipsis:
        return {"type": "array", "items": _of_hint(parts[0])}
    if origin in (typing.Union, types.UnionType):
        branches = [_of_hint(part) for part in parts]
        if all(branch.keys() == {"type"} for branch in branches):
            return {"type": [branch["type"] for branch in branches]}
        return {"anyOf": branches}
    expected = "int, float, bool, str, None, Literal[...] of texts, tuple[..., ...] or a union of these"
    raise TypeError(f"expected {expected}, got {hint!r}")
