"""A traffic scenario: read, laid over per kind of device, changed by `--set`, checked, frozen. Free of torch.

    scenario = load("scenarios/traffic.yaml", ["server.rows=4"], device_kind)

What every scenario has is checked as `perfbench.spec.scenario` does it, with the longest request as its workload.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from perfbench.errors import ScenarioError
from perfbench.files.paths import expanded
from perfbench.files.plain_text import shown
from perfbench.files.yaml_source import Source, lay_over, of_values, read
from perfbench.spec import cases, scenario, shipped
from perfbench.spec.cases import Comparison
from perfbench.spec.refusal import refuse
from perfbench.spec.scenario import Scenario, parse_set
from perfbench.spec.scenario_schema import first_written, problems
from perfbench.spec.traffic_schema import SEARCH, schema

# The tenant of a request without an adapter.
NOBODY = -1

OWN = ("traffic", "server", "target", "targets", "repetitions", "price_per_hour")
DEFAULT_ZIPF_EXPONENT = 1.0
DEFAULT_RESIDENT = 16
# What `perfbench serve` calls the model of a tenant; and how long an answer over HTTP may take.
DEFAULT_TENANT_MODEL = "tenant-{tenant}"
DEFAULT_TIMEOUT_S, DEFAULT_READY_S = 120.0, 300.0
# More in one measurement take minutes at any rate that a test of targets needs, and hours at others.
MOST_REQUESTS = 100_000


@dataclass(frozen=True)
class Lengths:
    """Tokens: lognormal with this `median` and this standard deviation of the logarithm, at least 1 and at most `most`;
    `sigma` 0 is the median always."""

    median: int
    sigma: float
    most: int


@dataclass(frozen=True)
class Traffic:
    """The requests. tenants: the numbers of them to be measured, None where the largest is looked for; rates: requests
    a second of all together, empty where `rate_per_tenant` says it; in_flight: of a closed loop, empty in an open one;
    in_turn: each request is the next tenant's."""

    prompt_tokens: Lengths
    new_tokens: Lengths
    tenants: tuple[int, ...] | None
    rate_per_tenant: float | None
    rates: tuple[float, ...]
    in_flight: tuple[int, ...]
    in_turn: bool
    zipf_exponent: float | None  # None: uniform
    without_adapter: float
    arrivals: str
    burstiness: float
    requests: int


@dataclass(frozen=True)
class Server:
    """What serves them; `chunk_tokens` None: a prompt is read at once."""

    rows: int
    resident: int
    chunk_tokens: int | None

    def capacity(self, traffic: Traffic) -> int:
        """How many tokens a row has room for: the longest request, whose last token is never read."""
        return traffic.prompt_tokens.most + traffic.new_tokens.most - 1


@dataclass(frozen=True)
class Target:
    """A server that answers in place of ours. openai: its address up to and with /v1; base, tenant: the names of its
    models, where {tenant} stands for a number; adapters: whether it serves the scenario's own (ADAPTERS); timeout_s:
    how long an answer may take in all; command: what starts it, empty where it is there already; ready_s: how long that
    may take."""

    openai: str
    base: str
    tenant: str
    adapters: str
    timeout_s: float
    command: tuple[str, ...] = ()
    ready_s: float = 0.0


@dataclass(frozen=True)
class Targets:
    """Milliseconds to the first token and, on average, between two; `share`: of the requests that keep both."""

    ttft_ms: float
    itl_ms: float
    share: float


@dataclass(frozen=True)
class TrafficScenario:
    """All of it. `common`: the fields of any scenario, its workload being one batch of the longest requests."""

    common: Scenario
    comparison: Comparison
    traffic: Traffic
    server: Server
    target: Target | None
    targets: Targets
    repetitions: int
    price_per_hour: float | None = None

    def to_json(self) -> dict[str, Any]:
        """What was asked for, resolved, as plain JSON data."""
        common = {name: getattr(self.common, name) for name in ("name", "question", "device", "seed", "notes")}
        data = common | {
            "backbone": self.comparison.backbone,
            "dtype": self.comparison.dtype,
            "kernels": self.common.kernels[0],
            "methods": [asdict(arm) for arm in self.common.methods],
            "traffic": asdict(self.traffic),
            "server": asdict(self.server),
            "target": None if self.target is None else asdict(self.target),
            "targets": asdict(self.targets),
            "repetitions": self.repetitions,
            "price_per_hour": self.price_per_hour,
        }
        plain: dict[str, Any] = json.loads(json.dumps(data))
        return plain


def load(
    given: str | Path | Mapping[str, Any], sets: Sequence[str], device_kind: Callable[[str], tuple[str, str]]
) -> TrafficScenario:
    """Reads and checks a traffic scenario: a file, the name of one that comes with perfbench, or its very values.

    device_kind: what is asked for (auto | cpu | cuda) -> (cpu | cuda, why). ScenarioError and BackboneError, in one
    line, for whatever can't be measured.
    """
    if isinstance(given, Mapping):
        path, found, source = Path("traffic"), None, of_values(given, "traffic")
    else:
        path, found = shipped.find(given)
        source = read(path)
    notes = [found] if found else []
    _validate(source)
    parsed = [parse_set(text) for text in sets]
    for keys, value in [item for item in parsed if item[0] == ["device"]]:
        notes.append(scenario.assign(source, keys, value))
    _validate(source)
    asked = str(source.values.get("device", "auto"))
    kind, why = device_kind(asked)
    if asked == "auto":
        notes.append(f"device auto -> {kind}" + (f" ({why})" if why else ""))
    written = copy.deepcopy(source)
    if source.values.pop("overrides", {}).get(kind):
        changes = list(lay_over(source, (), written, ("overrides", kind)))
        notes.append(f"overrides.{kind}: {', '.join(changes) or 'changes nothing'}")
    notes += [scenario.assign(source, keys, value) for keys, value in parsed if keys != ["device"]]
    _validate(source)
    return _build(source, path, kind, tuple(notes))


def points_of(traffic: Traffic) -> list[tuple[int, float, int]]:
    """(tenants, requests a second of all of them, requests in flight) of each point, where none is searched for; one of
    the last two is 0."""
    assert traffic.tenants is not None
    if traffic.in_flight:
        return [(tenants, 0.0, open_ones) for tenants in traffic.tenants for open_ones in traffic.in_flight]
    if traffic.rate_per_tenant is not None:
        return [(tenants, tenants * traffic.rate_per_tenant, 0) for tenants in traffic.tenants]
    return [(tenants, rate, 0) for tenants in traffic.tenants for rate in traffic.rates]


def is_traffic(values: Any) -> bool:
    """Whether a scenario file is one of traffic."""
    return isinstance(values, dict) and "traffic" in values


def _validate(source: Source) -> None:
    if isinstance(source.values, dict) and "workload" in source.values and not is_traffic(source.values):
        message = "a scenario of fixed batches, expected one of traffic; measure it with perfbench run"
        refuse(source, message, "workload")
    if found := problems(source.values, schema()):
        first = first_written(source, found)
        refuse(source, first.message, *first.place)


def _build(source: Source, path: Path, kind: str, notes: tuple[str, ...]) -> TrafficScenario:
    traffic = _traffic(source)
    values = source.values.get("server", {})
    server = Server(
        rows=values.get("rows", 8),
        resident=values.get("resident", DEFAULT_RESIDENT),
        chunk_tokens=values.get("chunk_tokens"),
    )
    limits = source.values["targets"]
    targets = Targets(float(limits["ttft_ms"]), float(limits["itl_ms"]), float(limits.get("share", 0.99)))
    common = _common(source, path, kind, notes, traffic, server)
    read = [arm.label for arm in common.methods if getattr(arm.options, "adapters", None) is not None]
    if read and traffic.tenants is None:
        message = f"{', '.join(read)}: adapters from folders are as many as there are; say numbers in place of search"
        refuse(source, message, "traffic", "tenants")
    (comparison,) = cases.expand(common)
    target = _target(source, comparison)
    repetitions = source.values.get("repetitions", 2)
    price = source.values.get("price_per_hour")
    return TrafficScenario(common, comparison, traffic, server, target, targets, repetitions, price)


def _target(source: Source, comparison: Comparison) -> Target | None:
    values = source.values.get("target")
    if values is None:
        return None
    # What stands before an @ would be a password, in a file.
    address = urlsplit(values["openai"])
    if address.scheme not in ("http", "https") or not address.hostname or "@" in address.netloc or address.query:
        message = f"expected an address such as http://127.0.0.1:8000/v1, got {shown(values['openai'])}"
        refuse(source, message.replace(address.netloc.rpartition("@")[0] or "\0", "..."), "target", "openai")
    models = values.get("models", {})
    tenant = models.get("tenant", DEFAULT_TENANT_MODEL)
    if "{tenant}" not in tenant:
        message = f"expected a name in which {{tenant}} stands for the number of the tenant, got {shown(tenant)}"
        refuse(source, message, "target", "models", "tenant")
    arms = [case.arm for case in comparison.cases if case.method != "none"]
    if len(arms) > 1:
        message = f"expected one, as a server has one adapter under each name, got {', '.join(arms)}"
        refuse(source, message, "methods")
    return Target(
        openai=values["openai"].rstrip("/"),
        base=models.get("base", comparison.backbone),
        tenant=tenant,
        adapters=values.get("adapters", "scenario"),
        timeout_s=float(values.get("timeout_s", DEFAULT_TIMEOUT_S)),
        command=tuple(values.get("command", ())),
        ready_s=float(values.get("ready_s", DEFAULT_READY_S)),
    )


def _traffic(source: Source) -> Traffic:
    values = source.values["traffic"]
    searched = values["tenants"] == SEARCH
    closed = values.get("arrivals") == "closed"
    ways = ("in_flight",) if closed else ("rate_per_tenant", "rate")
    if found := [name for name in ("in_flight", "rate_per_tenant", "rate") if name in values and name not in ways]:
        refuse(source, f"expected {' or '.join(ways)} with these arrivals, got {found[0]}", "traffic", found[0])
    if sum(name in values for name in ways) != 1:
        got = "both" if all(name in values for name in ways) else "neither"
        expected = (
            "in_flight with arrivals closed, got none" if closed else f"either rate_per_tenant or rate, got {got}"
        )
        refuse(source, f"expected {expected}", "traffic")
    if searched and "rate_per_tenant" not in values:
        message = "the number of tenants can be searched only where each sends requests: say rate_per_tenant"
        refuse(source, message, "traffic", "tenants" if closed else "rate")
    for name, field, only in (("zipf_exponent", "tenant_mix", "zipf"), ("burstiness", "arrivals", "gamma")):
        if name in values and values.get(field) != only:
            refuse(source, f"expected only with {field} {only}; remove it, or choose {only}", "traffic", name)
    requests = values.get("requests", 300)
    if requests > MOST_REQUESTS:
        refuse(source, f"expected at most {MOST_REQUESTS:,}, got {requests:,}", "traffic", "requests")
    return Traffic(
        prompt_tokens=_lengths(source, "prompt_tokens"),
        new_tokens=_lengths(source, "new_tokens"),
        tenants=None if searched else _several(values["tenants"]),
        rate_per_tenant=float(values["rate_per_tenant"]) if "rate_per_tenant" in values else None,
        rates=tuple(map(float, _several(values.get("rate", ())))),
        in_flight=_several(values.get("in_flight", ())),
        in_turn=values.get("tenant_mix") == "in-turn",
        zipf_exponent=float(values.get("zipf_exponent", DEFAULT_ZIPF_EXPONENT))
        if values.get("tenant_mix") == "zipf"
        else None,
        without_adapter=float(values.get("without_adapter", 0)),
        arrivals=values.get("arrivals", "poisson"),
        burstiness=float(values.get("burstiness", 1)),
        requests=requests,
    )


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _lengths(source: Source, name: str) -> Lengths:
    value = source.values["traffic"][name]
    if isinstance(value, int):
        return Lengths(value, 0.0, value)
    if value["most"] < value["median"]:
        message = f"expected at least the median {value['median']}, got {value['most']}"
        refuse(source, message, "traffic", name, "most")
    return Lengths(value["median"], float(value["sigma"]), value["most"])


def _common(
    source: Source, path: Path, kind: str, notes: tuple[str, ...], traffic: Traffic, server: Server
) -> Scenario:
    """The fields of any scenario, checked against the backbone."""
    values = {name: value for name, value in source.values.items() if name not in OWN and name != "device"}
    workload = {
        "prompt_tokens": traffic.prompt_tokens.most,
        "new_tokens": max(2, traffic.new_tokens.most),
        "requests": server.rows,
        "tenants": min(server.rows, server.resident),
        "resident": server.resident,
    }
    of_any = Source({**values, "runtime": "continuous", "workload": workload}, dict(source.origins))
    of_any.origins[("workload",)] = source.origin(("traffic",))
    found = scenario.of_source(of_any, path, kind, notes)
    if not is_hub_id(found.backbone[0]):
        _check_common(found)
    return found


def is_hub_id(backbone: str) -> bool:
    """Whether its sizes stand on the hub, if anywhere."""
    return "/" in backbone and not expanded(backbone).is_dir()


def check_against_backbone(found: TrafficScenario) -> None:
    """What the sizes of the backbone make impossible, which `load` tells too unless it is a hub id. Raises
    ScenarioError, and BackboneError where the hub has no such model."""
    _check_common(found.common)


def _check_common(found: Scenario) -> None:
    try:
        scenario.check_against_backbone(found)
    except ScenarioError as error:
        raise ScenarioError(str(error).replace("workload.", "traffic.")) from None
