"""Which modules of a Llama-family backbone a PEFT configuration means, by PEFT's own rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perfbench.errors import AdapterError
from perfbench.methods.checkpoints.adapter_folder import LAYERS, WEIGHTS, expect_places, module_name
from perfbench.methods.checkpoints.module_patterns import LAYER, TAIL, WHOLE, BadPattern, Form, matches
from perfbench.methods.checkpoints.peft_fields import shown
from perfbench.methods.shape import MODULE_PATHS, BackboneShape

# Without layers_pattern PEFT takes the first number between dots that follows two names.
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")

_OTHERS_OF_LAYER = ("", ".self_attn", ".mlp", ".mlp.act_fn", ".input_layernorm", ".post_attention_layernorm")
_OTHERS = ("model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")


def linears(shape: BackboneShape) -> list[str]:
    """The names of the linears that can be adapted, layer by layer."""
    return [f"{LAYERS}{layer}.{path}" for layer in range(shape.layers) for path in MODULE_PATHS.values()]


def layers(shape: BackboneShape) -> list[str]:
    """The names of the decoder layers."""
    return [f"{LAYERS}{layer}" for layer in range(shape.layers)]


def modules(shape: BackboneShape) -> list[str]:
    """The names of all modules of the Hugging Face model: a pattern may match any of them."""
    of_layers = [f"{name}{other}" for name in layers(shape) for other in _OTHERS_OF_LAYER]
    return [*_OTHERS, *of_layers, *linears(shape)]


def targets(
    config: Mapping[str, Any], path: Path, shape: BackboneShape, *, default: Sequence[str], among: Sequence[str]
) -> set[str]:
    """The modules that `target_modules`, with `exclude_modules` and the choice of layers, names; all in `among`.

    `default`: the endings of names that PEFT takes where the field is absent or null. AdapterError on a field that
    PEFT could not read either, and where it names a module outside `among`.
    """
    names = modules(shape)
    wanted = config.get("target_modules")
    wanted = list(default) if wanted is None else wanted
    if isinstance(wanted, str):
        for field in ("layers_to_transform", "layers_pattern"):
            if config.get(field) is not None:
                raise AdapterError(
                    f"{path}: {field}: expected null beside a target_modules that is a pattern, "
                    f"got {shown(config[field])}"
                )
        found = set(linears(shape)) if wanted.lower() == "all-linear" else _matched(wanted, path, names)
    else:
        found = _of_layers(config, path, _ending(_texts(wanted, path, "target_modules"), names), set(wanted))
    found -= _excluded(config, path, names)
    for name in sorted(found - set(among)):
        raise AdapterError(
            f"{path}: target_modules: expected only modules like {among[0]}, "
            f"got {shown(config.get('target_modules'))}, which also means {name}; perfbench serves no adapter there"
        )
    return found


def target_parameters(config: Mapping[str, Any], path: Path, shape: BackboneShape) -> set[str]:
    """The linears whose `weight` the field names. AdapterError where it means another parameter."""
    value = config.get("target_parameters")
    if value is None:
        return set()
    wanted = _texts(value, path, "target_parameters")
    weights = [f"{name}.{kind}" for name in modules(shape) for kind in ("weight", "bias")]
    found = {name.removesuffix(".weight") for name in _ending(wanted, weights)}
    for name in sorted(found - set(linears(shape))):
        raise AdapterError(
            f"{path}: target_parameters: expected only weights like {linears(shape)[0]}.weight, got {shown(value)}, "
            f"which also means {name}; perfbench serves no adapter there"
        )
    return found


def values_of(
    config: Mapping[str, Any], path: Path, field: str, names: Sequence[str], default: Any
) -> dict[str, tuple[Any, str]]:
    """For each of `names`: its value by `rank_pattern` or `alpha_pattern`, and the field's key that gives it; the first
    that matches counts. Where none does: `default` and "". AdapterError where the field is no object of patterns."""
    patterns = config.get(field, {})
    if not isinstance(patterns, dict):
        raise AdapterError(f"{path}: {field}: expected an object, pattern to number, got {shown(patterns)}")
    found = dict.fromkeys(names, (default, ""))
    keys = list(patterns)
    for key, of_key in reversed(list(zip(keys, _match(keys, TAIL, path, field, names), strict=True))):
        found |= {name: (patterns[key], key) for name, m in zip(names, of_key, strict=True) if m is not None}
    return found


def feedforward(config: Mapping[str, Any], path: Path, names: Sequence[str]) -> set[str]:
    """Those of `names` that are (IA)3's feedforward modules: PEFT compares endings, without a dot."""
    value = config.get("feedforward_modules")
    if isinstance(value, str):
        return _matched(value, path, names, "feedforward_modules")
    endings = ["down_proj"] if value is None else _texts(value, path, "feedforward_modules")
    return {name for name in names if name.endswith(tuple(endings))}


def compare(
    targets: set[str], described: Path, path: Path, places: Sequence[tuple[int, str]], shape: BackboneShape, tensor: str
) -> None:
    """AdapterError unless the modules that the configuration adapts are those that the file has a `tensor` for."""
    found = {module_name(*place): place for place in places}
    idle = sorted(found.keys() - targets)
    if idle:
        more = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
        raise AdapterError(
            f"{described}: target_modules: expected it to name {idle[0]}{more}, which {WEIGHTS} has tensors for; "
            f"PEFT would leave them out"
        )
    missing = [(int(name.split(".")[2]), f"{name}.{tensor}") for name in targets - found.keys()]
    expect_places(path, missing, {layer for layer, _ in places}, shape)
    if not targets:
        raise AdapterError(f"{described}: target_modules: expected a linear of the backbone, got none of them")


def _match(patterns: Sequence[str], form: Form, path: Path, field: str, names: Sequence[str]) -> list[list[str | None]]:
    try:
        return matches(patterns, form, names) if patterns else []
    except BadPattern as error:
        raise AdapterError(f"{path}: {field}: {error}") from None


def _matched(pattern: str, path: Path, names: Sequence[str], field: str = "target_modules") -> set[str]:
    (found,) = _match([pattern], WHOLE, path, field, names)
    return {name for name, m in zip(names, found, strict=True) if m is not None}


def _ending(wanted: Iterable[str], names: Iterable[str]) -> set[str]:
    """Those of `names` that are one of `wanted`, or end in one at a dot."""
    wanted = set(wanted)
    endings = tuple(f".{one}" for one in wanted)
    return {name for name in names if name in wanted or name.endswith(endings)}


def _texts(value: Any, path: Path, field: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise AdapterError(f"{path}: {field}: expected a list of names, got {shown(value)}")
    return value


def _excluded(config: Mapping[str, Any], path: Path, names: Sequence[str]) -> set[str]:
    value = config.get("exclude_modules")
    if not value:
        return set()
    if isinstance(value, str):
        return _matched(value, path, names, "exclude_modules")
    return _ending(_texts(value, path, "exclude_modules"), names)


def _of_layers(config: Mapping[str, Any], path: Path, found: set[str], in_full: set[str]) -> set[str]:
    """Those of `found` that lie in `layers_to_transform`; a module that is named in full is not asked."""
    wanted, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    numbers = wanted if isinstance(wanted, list) else [] if wanted is None else [wanted]
    if any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise AdapterError(f"{path}: layers_to_transform: expected null or numbers of layers, got {shown(wanted)}")
    if patterns and wanted is None:
        raise AdapterError(
            f"{path}: layers_to_transform: expected numbers of layers beside layers_pattern {shown(patterns)}, got null"
        )
    if not numbers:
        return found
    names = sorted(found)
    layer = [m and m["idx"] for m in map(_ANY_LAYER.match, names)]
    if patterns:
        each = [patterns] if isinstance(patterns, str) else _texts(patterns, path, "layers_pattern")
        of_pattern = _match(each, LAYER, path, "layers_pattern", names)
        layer = [next((m for m in column if m is not None), None) for column in zip(*of_pattern, strict=True)]
    chosen = {name for name, n in zip(names, layer, strict=True) if n is not None and int(n) in numbers}
    return chosen | (found & in_full)
