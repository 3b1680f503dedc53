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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from perfbench.errors import PerfbenchError, ScenarioError
from perfbench.files.paths import expanded
from perfbench.files.yaml_source import Place, Source, assign, dotted, lay_over, of_values, parse, read
from perfbench.methods.options import LAYERS
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import BackboneShape
from perfbench.spec import backbone_config, shipped
from perfbench.spec.option_schema import schema_of
from perfbench.spec.runtime_support import kernels_problem, serves, unsupported
from perfbench.spec.scenario_schema import RUNTIMES, first_written, problems

DEVICE_KINDS = ("cpu", "cuda")
DEFAULT_ZIPF_EXPONENT = 1.1


@dataclass(frozen=True)
class Arm:
    """One method with its options, under the label that names it in ids and tables."""

    label: str
    method: str
    options: Any  # an instance of METHODS[method].options


@dataclass(frozen=True)
class WorkloadAxes:
    """The values of each workload field; their product are the points.

    `prompt_tokens` None: the prompts' own lengths; `resident` None: as many as there are tenants;
    `zipf_exponent` concerns only the points whose mix is zipf.
    """

    prompts: str | None
    prompt_tokens: tuple[int | None, ...]
    new_tokens: tuple[int, ...]
    beams: tuple[int, ...]
    requests: tuple[int, ...]
    tenants: tuple[int, ...]
    resident: tuple[int | None, ...]
    tenant_mix: tuple[str, ...]
    zipf_exponent: tuple[float, ...]
    without_adapter: tuple[float, ...]
    follow_up_tokens: tuple[int, ...] = (0,)
    own_tokens: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Scenario:
    """A scenario as it will be measured on one kind of device: every default filled in, every value checked.

    `notes` say what was chosen and why; `source` knows where each value was written.
    """

    name: str
    question: str
    backbone: tuple[str, ...]
    dtype: tuple[str, ...]
    device: str  # cpu | cuda
    runtime: tuple[str, ...]
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
    places = _workload_places(scenario.source)
    for backbone in scenario.backbone:
        config = backbone_config.find_config(backbone)
        shape = BackboneShape.of_config(config)
        for runtime in scenario.runtime:
            if (reason := unsupported(runtime, config)) is not None:
                refuse(scenario.source, f"{backbone}: {reason}", "runtime")
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


def _last_set(source: Source, *places: Place) -> Place:
    """Of the places that contradict each other the one that a `--set` wrote; else the first."""
    return next((place for place in places if source.origin(place).startswith("--set ")), places[0])


def refuse(source: Source, message: str, *place: str | int) -> NoReturn:
    """Raises ScenarioError: where `place` was written, its name, the message."""
    origin, name = source.origin(place), dotted(place)
    # `--set workload.tenants=0` names its place already.
    known = not name or origin.startswith(f"--set {name}=")
    text = f"{origin}: {message}" if known else f"{origin}: {name}: {message}"
    raise ScenarioError(" ".join(text.splitlines()))  # a key between quotes may hold a line break


def of_source(source: Source, path: Path, device_kind: str, notes: tuple[str, ...]) -> Scenario:
    """The frozen scenario of values that the schema accepts. ScenarioError for what is impossible whatever the backbone
    is."""
    values = source.values
    dtypes, runtimes = _axis(values["dtype"]), _axis(values.get("runtime", "transformers"))
    kernels = _axis(values.get("kernels", "eager"))
    for name in kernels:
        if (reason := kernels_problem(name, device_kind, runtimes)) is not None:
            refuse(source, reason, "kernels")
    arms = _arms(source, path)
    notes += tuple(_unserved(source, arms, runtimes))
    if device_kind == "cpu" and "fp16" in dtypes:
        refuse(source, "fp16 on the CPU is slow and partly unsupported by torch; choose bf16 or fp32", "dtype")
    return Scenario(
        name=values.get("name") or re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip(".-_") or "scenario",
        question=values.get("question", ""),
        backbone=_axis(values["backbone"]),
        dtype=dtypes,
        device=device_kind,
        runtime=runtimes,
        kernels=kernels,
        methods=arms,
        workload=tuple(_axes(source, place, path) for place in _workload_places(source)),
        warmup=values.get("warmup", 3),
        repetitions=values.get("repetitions", 100),
        processes=values.get("processes", 1),
        seed=values.get("seed", 0),
        isolation=values.get("isolation", "shared"),
        paper=values.get("paper"),
        notes=notes,
        source=source,
    )


def _axis(value: Any) -> tuple[Any, ...]:
    """A scalar as an axis of one value."""
    return tuple(value) if isinstance(value, list) else (value,)


def _workload_places(source: Source) -> list[Place]:
    """The places of the workload mappings: one, or one for each item of the list."""
    workload = source.values["workload"]
    if isinstance(workload, list):
        return [("workload", index) for index in range(len(workload))]
    return [("workload",)]


def _axes(source: Source, place: Place, path: Path) -> WorkloadAxes:
    """The workload mapping at `place`, its impossible points refused."""
    values = source.values["workload"]
    for index in place[1:]:
        values = values[index]
    if "prompt_tokens" not in values and "prompts" not in values:
        message = "expected prompt_tokens (random prompts) or prompts (a file of real ones), got neither"
        refuse(source, message, *place)
    mixes = _axis(values.get("tenant_mix", "distinct"))
    if "zipf_exponent" in values and "zipf" not in mixes:
        message = f"expected only with tenant_mix zipf, got {', '.join(mixes)}; remove it, or choose zipf"
        refuse(source, message, *place, "zipf_exponent")
    tenants, resident = _axis(values["tenants"]), _axis(values.get("resident"))
    for held in resident:
        if held is not None and held < max(tenants):
            drawn = next(drawn for drawn in tenants if held < drawn)
            field_name = _last_set(source, (*place, "resident"), (*place, "tenants"))
            message = f"more tenants than the bank's capacity: resident {held} with tenants {drawn}"
            refuse(source, f"{message}; raise resident or lower tenants", *field_name)
    if any(_axis(values.get("follow_up_tokens", 0))):
        _check_second_turn(source, place, values)
    if any(_axis(values.get("own_tokens", 0))):
        _check_shared_context(source, place, values)
    if "continuous" in _axis(source.values.get("runtime", ())) and _axis(values.get("beams", 1)) != (1,):
        message = "runtime continuous has no beams; choose beams 1, or leave that runtime out"
        refuse(source, message, *_last_set(source, (*place, "beams"), ("runtime",)))
    prompts = values.get("prompts")
    return WorkloadAxes(
        prompts=None if prompts is None else _existing(source, prompts, path, "file", *place, "prompts"),
        prompt_tokens=_axis(values.get("prompt_tokens")),
        new_tokens=_axis(values["new_tokens"]),
        beams=_axis(values.get("beams", 1)),
        requests=_axis(values["requests"]),
        tenants=tenants,
        resident=resident,
        tenant_mix=mixes,
        zipf_exponent=tuple(map(float, _axis(values.get("zipf_exponent", DEFAULT_ZIPF_EXPONENT)))),
        without_adapter=tuple(map(float, _axis(values.get("without_adapter", 0)))),
        follow_up_tokens=_axis(values.get("follow_up_tokens", 0)),
        own_tokens=_axis(values.get("own_tokens", 0)),
    )


def _check_shared_context(source: Source, place: Place, values: dict[str, Any]) -> None:
    """Refuses a shared context where there is none, or where it would not be read as one."""
    own = max(_axis(values["own_tokens"]))
    if values.get("prompts") is not None:
        message = "prompts of a file share nothing; leave own_tokens out, or choose random prompts by prompt_tokens"
    elif any(_axis(values.get("follow_up_tokens", 0))):
        message = "a shared context has one turn; leave follow_up_tokens out"
    elif "continuous" in _axis(source.values.get("runtime", ())):
        message = "runtime continuous reads every prompt by itself; choose static or transformers"
    elif own >= (shortest := min(_axis(values["prompt_tokens"]))):
        message = f"expected fewer than the {shortest} prompt_tokens, the others being shared, got {own}; lower it"
    else:
        return
    refuse(source, message, *place, "own_tokens")


def _check_second_turn(source: Source, place: Place, values: dict[str, Any]) -> None:
    """Refuses a second turn where nothing could go on from the first one's cache."""
    runtimes, beams = _axis(source.values.get("runtime", "transformers")), _axis(values.get("beams", 1))
    if runtimes != ("static",):
        message = "a second turn needs runtime static, the others read everything again; choose runtime static alone"
        refuse(source, message, *place, "follow_up_tokens")
    if beams != (1,):
        refuse(source, "a second turn follows greedy search only; choose beams 1", *place, "follow_up_tokens")


def _existing(source: Source, name: str, scenario: Path, kind: str, *place: str | int) -> str:
    """The path of the file or folder `name`, looked for in the current folder, then beside the scenario."""
    try:
        written = expanded(name)
    except PerfbenchError as error:
        refuse(source, f"expected a {kind}, got {error}", *place)
    for candidate in (written, scenario.parent / name):
        if candidate.is_file() if kind == "file" else candidate.is_dir():
            return str(candidate)
    beside = "" if Path(name).is_absolute() else f", neither in the current folder nor in {scenario.parent}"
    refuse(source, f"no such {kind} {name!r}{beside}", *place)


def _arms(source: Source, path: Path) -> tuple[Arm, ...]:
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


def _unserved(source: Source, arms: Sequence[Arm], runtimes: Sequence[str]) -> Iterator[str]:
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
        file = _existing(source, values["setting"], path, "file", *place, "setting")
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
        return _existing(source, value, path, "folder", *place)
    return [_existing(source, name, path, "folder", *place, index) for index, name in enumerate(value)]


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
