"""A scenario file: read, laid over per device kind, changed by `--set`, checked, frozen. Free of torch.

    document = load("scenarios/multitenant.yaml", sets=["workload.tenants=4"])
    scenario = resolve(document, "cpu")
    check_against_backbone(scenario)

Everything that can be refused is refused here, before a model is loaded.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from perfbench.errors import ScenarioError
from perfbench.files.yaml_source import Source, assign, lay_over, of_values, parse, read
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import BackboneShape
from perfbench.spec import backbone_config, shipped
from perfbench.spec.arms import Arm, read_arms, unserved
from perfbench.spec.refusal import axis, refuse
from perfbench.spec.runtime_support import (
    kernels_problem,
    quantisation_problem,
    tensor_parallel_problem,
    unsupported,
)
from perfbench.spec.scenario_schema import first_written, problems
from perfbench.spec.workload_axes import WorkloadAxes, axes_at, workload_places

DEVICE_KINDS = ("cpu", "cuda")


@dataclass(frozen=True)
class Scenario:
    """A scenario as it will be measured on one kind of device: every default filled in, every value checked.

    `notes` say what was chosen and why; `source` knows where each value was written.
    """

    name: str
    question: str
    backbone: tuple[str, ...]
    dtype: tuple[str, ...]
    quantisation: tuple[str, ...]
    device: str  # cpu | cuda
    runtime: tuple[str, ...]
    tensor_parallel_size: tuple[int, ...]
    kernels: tuple[str, ...]
    methods: tuple[Arm, ...]
    workload: tuple[WorkloadAxes, ...]
    warmup: int
    repetitions: int
    processes: int
    seed: int
    isolation: str
    paper: str | None
    notes: tuple[str, ...]
    source: Source = field(compare=False, repr=False)

    @property
    def rounds(self) -> int:
        """Turns of each arm in the whole run: its repetitions in every process."""
        return self.repetitions * self.processes

    def to_json(self) -> dict[str, Any]:
        """The resolved scenario as plain JSON data, without where its values were written."""
        nested = ("source", "methods", "workload")
        plain = {key: value for key, value in vars(self).items() if key not in nested}
        plain["methods"] = [asdict(arm) for arm in self.methods]
        plain["workload"] = [asdict(axes) for axes in self.workload]
        data: dict[str, Any] = json.loads(json.dumps(plain))
        return data


@dataclass(frozen=True)
class Document:
    """A well-formed scenario file, and the `--set`s to lay over it once the kind of device is known.

    A `--set device=...` is in `source` already: no override can change the device.
    """

    path: Path
    source: Source
    sets: tuple[tuple[list[str], Source], ...]
    notes: tuple[str, ...]

    @property
    def device(self) -> str:
        """What is asked for: auto | cpu | cuda."""
        return str(self.source.values.get("device", "auto"))

    @property
    def device_kinds(self) -> tuple[str, ...]:
        """The kinds of device that this document can be resolved for."""
        return DEVICE_KINDS if self.device == "auto" else (self.device,)


def load(given: str | Path | Mapping[str, Any], sets: Sequence[str] = ()) -> Document:
    """Reads and checks a scenario: a file, the name of one that comes with perfbench, or its very values; `sets` are
    `key.sub=value`, the value being YAML. Paths inside values are looked for in the current folder.

    ScenarioError names file and line, or the `--set`, what was expected and what came.
    """
    if isinstance(given, Mapping):
        path, found, source = Path("scenario"), None, of_values(given, "scenario")
    else:
        path, found = shipped.find(given)
        source = read(path)
    _validate(source)
    parsed = [parse_set(text) for text in sets]
    notes = [found] if found else []
    notes += [assign(source, keys, value) for keys, value in parsed if keys == ["device"]]
    _validate(source)
    return Document(path, source, tuple(item for item in parsed if item[0] != ["device"]), tuple(notes))


def resolve(document: Document, device_kind: str, why: str = "") -> Scenario:
    """The scenario for `device_kind` (cpu | cuda): the file, over it its override, over that every `--set`.

    `why` this kind was chosen is added to the note that says so. ScenarioError as `load`, and for what is
    impossible whatever the backbone is.
    """
    source = copy.deepcopy(document.source)
    if device_kind not in document.device_kinds:
        message = f"asks for {document.device}, but the device here is {device_kind}; choose auto or {device_kind}"
        refuse(source, message, "device")
    notes = list(document.notes)
    if document.device == "auto":
        notes.append(f"device auto -> {device_kind}" + (f" ({why})" if why else ""))
    override = source.values.pop("overrides", {}).get(device_kind, {})
    if override:
        changes = list(lay_over(source, (), document.source, ("overrides", device_kind)))
        notes.append(f"overrides.{device_kind}: {', '.join(changes) or 'changes nothing'}")
    notes += [assign(source, keys, value) for keys, value in document.sets]
    _validate(source)
    return of_source(source, document.path, device_kind, tuple(notes))


def check_against_backbone(scenario: Scenario) -> None:
    """Refuses what the sizes of a backbone make impossible; only its config is read, or fetched.

    ScenarioError for prompt plus new tokens past the context, beams past the vocabulary, options of a
    method that the backbone excludes, real prompts for a named shape; BackboneError for the backbone itself.
    """
    places = workload_places(scenario.source)
    for backbone in scenario.backbone:
        config = backbone_config.find_config(backbone)
        shape = BackboneShape.of_config(config)
        for runtime in scenario.runtime:
            if (reason := unsupported(runtime, config)) is not None:
                refuse(scenario.source, f"{backbone}: {reason}", "runtime")
        for ranks in scenario.tensor_parallel_size:
            try:
                shape.of_rank(ranks)
            except ValueError as error:
                refuse(scenario.source, f"{backbone}: {error}", "tensor_parallel_size")
        for place, axes in zip(places, scenario.workload, strict=True):
            problem = _point_problem(axes, backbone, shape)
            if problem:
                refuse(scenario.source, problem[1], *place, problem[0])
        for arm in scenario.methods:
            try:
                METHODS[arm.method].expect_fit(shape, arm.options)
            except ValueError as error:
                refuse(scenario.source, f"{backbone}: arm {arm.label!r}: {error}", "methods")


def _point_problem(axes: WorkloadAxes, backbone: str, shape: BackboneShape) -> tuple[str, str] | None:
    """(field, what is wrong) of the first thing that `backbone` can't do; None if it can do every point."""
    # The length of real prompts is known only once they are tokenised; they have at least one token.
    prompt, new_tokens = max(tokens or 1 for tokens in axes.prompt_tokens), max(axes.new_tokens)
    follow_up = max(axes.follow_up_tokens)
    second = follow_up + new_tokens if follow_up else 0
    if prompt + new_tokens + second > shape.context:
        field_name = "new_tokens" if axes.prompt_tokens == (None,) else "prompt_tokens"
        turn = f" + {second} of the second turn" if second else ""
        return field_name, (
            f"expected at most {shape.context} tokens, the context of {backbone}, "
            f"got {prompt} of the prompt + {new_tokens} new ones{turn}; lower one of them"
        )
    if max(axes.beams) > 1 and 2 * max(axes.beams) > shape.vocab:
        return "beams", (
            f"expected at most {shape.vocab // 2}, half the vocabulary of {backbone}, got {max(axes.beams)}; lower it"
        )
    if axes.prompts and backbone_config.is_named(backbone):
        return "prompts", (
            f"{backbone} is a named shape, which has no tokenizer; "
            "use prompt_tokens alone, or a backbone with real weights"
        )
    return None


def parse_set(text: str) -> tuple[list[str], Source]:
    """The keys and the value of `key.sub=value`; else ScenarioError."""
    key, separator, value = text.partition("=")
    origin, keys = f"--set {' '.join(text.split())}", key.strip().split(".")
    if not separator or not value.strip() or not all(keys):
        raise ScenarioError(f"{origin}: expected key=value, such as workload.tenants=4")
    if keys[0] == "overrides":
        raise ScenarioError(f"{origin}: can't be set; set the field itself, which wins over every override")
    return keys, parse(value, origin)


def _validate(source: Source) -> None:
    """ScenarioError for the first thing, in the order of the file, that the schema refuses."""
    if isinstance(source.values, dict) and "traffic" in source.values and "workload" not in source.values:
        message = "a scenario of traffic, expected one of fixed batches; measure it with perfbench traffic"
        refuse(source, message, "traffic")
    found = problems(source.values)
    if found:
        first = first_written(source, found)
        refuse(source, first.message, *first.place)


def of_source(source: Source, path: Path, device_kind: str, notes: tuple[str, ...]) -> Scenario:
    """The frozen scenario of values that the schema accepts. ScenarioError for what is impossible whatever the backbone
    is."""
    values = source.values
    dtypes, runtimes = axis(values["dtype"]), axis(values.get("runtime", "transformers"))
    kernels = axis(values.get("kernels", "eager"))
    for name in kernels:
        if (reason := kernels_problem(name, device_kind, runtimes)) is not None:
            refuse(source, reason, "kernels")
    arms = read_arms(source, path)
    of_arms = [arm.method for arm in arms]
    quantisations, ranks = axis(values.get("quantisation", "none")), axis(values.get("tensor_parallel_size", 1))
    for name in quantisations:
        if problem := quantisation_problem(name, device_kind, kernels, of_arms):
            refuse(source, problem[1], problem[0])
    if max(ranks) > 1 and (problem := tensor_parallel_problem(runtimes, kernels, quantisations, of_arms)):
        refuse(source, problem[1], problem[0])
    notes += tuple(unserved(source, arms, runtimes))
    if device_kind == "cpu" and "fp16" in dtypes:
        refuse(source, "fp16 on the CPU is slow and partly unsupported by torch; choose bf16 or fp32", "dtype")
    return Scenario(
        name=values.get("name") or re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip(".-_") or "scenario",
        question=values.get("question", ""),
        backbone=axis(values["backbone"]),
        dtype=dtypes,
        quantisation=quantisations,
        device=device_kind,
        runtime=runtimes,
        tensor_parallel_size=ranks,
        kernels=kernels,
        methods=arms,
        workload=tuple(axes_at(source, place, path) for place in workload_places(source)),
        warmup=values.get("warmup", 3),
        repetitions=values.get("repetitions", 100),
        processes=values.get("processes", 1),
        seed=values.get("seed", 0),
        isolation=values.get("isolation", "shared"),
        paper=values.get("paper"),
        notes=notes,
        source=source,
    )
