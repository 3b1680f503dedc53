"""The arms of a scenario file: methods with their options, each under a label. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfbench.files.yaml_source import Place, Source, dotted
from perfbench.methods.options import LAYERS
from perfbench.methods.registry import METHODS
from perfbench.spec.option_schema import schema_of
from perfbench.spec.refusal import existing, refuse
from perfbench.spec.runtime_support import serves
from perfbench.spec.scenario_schema import RUNTIMES, problems


@dataclass(frozen=True)
class Arm:
    """One method with its options, under the label that names it in ids and tables."""

    label: str
    method: str
    options: Any  # an instance of METHODS[method].options


def read_arms(source: Source, path: Path) -> tuple[Arm, ...]:
    """The arms in the order of the file, `none` first."""
    arms = {"none": Arm("none", "none", METHODS["none"].options())}
    first_at: dict[str, int] = {}
    for index, item in enumerate(source.values["methods"]):
        method, options = (item, {}) if isinstance(item, str) else next(iter(item.items()))
        label = options.get("label", method)
        if label == "none" and method != "none":
            refuse(source, "the label 'none' is the bare backbone's; choose another", "methods", index)
        if label in first_at:
            message = f"the label {label!r} is that of methods.{first_at[label]} already"
            remedy = f"give it another, such as {{{method}: {{label: {label}-2}}}}"
            remedy = "keep one" if method == "none" else remedy
            refuse(source, f"{message}; {remedy}", "methods", index)
        first_at[label] = index
        arms[label] = Arm(label, method, _options(source, path, ("methods", index, method), method, options))
    return tuple(arms.values())


def unserved(source: Source, arms: Sequence[Arm], runtimes: Sequence[str]) -> Iterator[str]:
    """A note for each runtime that can't serve some arm; ScenarioError for an arm that no runtime can."""
    for arm in arms:
        if not any(serves(runtime, arm.method) for runtime in runtimes):
            able = ", ".join(runtime for runtime in RUNTIMES if serves(runtime, arm.method))
            message = (
                f"{arm.method} is served on runtime {able} only; add one of these"
                if "," in able
                else (f"{arm.method} is served on runtime {able} only; add that runtime")
            )
            refuse(source, f"{message}, or leave {arm.label} out", "methods")
    for runtime in runtimes:
        left_out = [arm.label for arm in arms if not serves(runtime, arm.method)]
        if left_out:
            yield f"runtime {runtime}: without {', '.join(left_out)}, which it can't serve"


def _options(source: Source, path: Path, place: Place, method: str, options: dict[str, Any]) -> Any:
    """The options dataclass of `method`; paths are resolved, a FanLoRA setting's file is read."""
    values = {key: value for key, value in options.items() if key != "label"}
    made_of = METHODS[method].options
    for name, rules in schema_of(made_of).items():
        if type(values.get(name)) is int and "number" in rules.get("type", ()):
            values[name] = float(values[name])
    if values.get("adapters") is not None:
        values["adapters"] = _adapters(source, values["adapters"], path, *place, "adapters")
    if isinstance(values.get("setting"), str):
        file = existing(source, values["setting"], path, "file", *place, "setting")
        values["setting"] = _read_setting(source, file, *place, "setting")
    if values.get("setting") is not None and not any(values["setting"]):
        refuse(source, "expected at least one module in some layer, got none", *place, "setting")
    try:
        return made_of(**{key: frozen(value) for key, value in values.items()})
    except ValueError as error:
        refuse(source, str(error), *place)


def _adapters(source: Source, value: Any, path: Path, *place: str | int) -> str | list[str]:
    """The folder, or the folders of a list, as they can be opened."""
    if isinstance(value, str):
        return existing(source, value, path, "folder", *place)
    return [existing(source, name, path, "folder", *place, index) for index, name in enumerate(value)]


def _read_setting(source: Source, file: str, *place: str | int) -> Any:
    """What a JSON file has under `layers`; ScenarioError names the file and what is wrong with it."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        refuse(source, f"{file}: expected a JSON file, can't read it: {error}", *place)
    if not isinstance(content, dict) or "layers" not in content:
        refuse(source, f"{file}: expected a JSON object with the key 'layers'", *place)
    layers = content["layers"]
    found = problems(layers, LAYERS)
    if found:
        refuse(source, f"{file}: {dotted(('layers', *found[0].place))}: {found[0].message}", *place)
    return layers


def frozen(value: Any) -> Any:
    """`value` with every list, at any depth, as a tuple: what the frozen options dataclasses hold."""
    return tuple(frozen(item) for item in value) if isinstance(value, list) else value
