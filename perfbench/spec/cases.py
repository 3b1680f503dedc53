"""The comparisons and cases of a scenario, with stable readable ids. Free of torch.

A comparison is what can be compared: one backbone, dtype, quantisation, device, runtime and workload. Its cases are the
arms that the runtime can serve, each with each kernel set. An id depends on its own values only, never on what else
is on an axis.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from perfbench.errors import ScenarioError, nearest
from perfbench.files.paths import expanded
from perfbench.methods.registry import METHODS
from perfbench.spec import backbone_config
from perfbench.spec.arms import frozen
from perfbench.spec.runtime_support import serves
from perfbench.spec.scenario import Scenario
from perfbench.spec.workload_axes import WorkloadAxes


@dataclass(frozen=True)
class Workload:
    """One batch. `prompt_tokens` None: the lengths of the real prompts; `zipf_exponent` None: another mix."""

    prompts: str | None
    prompt_tokens: int | None
    new_tokens: int
    beams: int
    requests: int
    tenants: int
    resident: int
    tenant_mix: str
    zipf_exponent: float | None
    without_adapter: float
    follow_up_tokens: int = 0
    own_tokens: int = 0

    @property
    def shared_tokens(self) -> int:
        """So many first tokens of each prompt are the same for all requests."""
        return self.prompt_tokens - self.own_tokens if self.own_tokens and self.prompt_tokens else 0


@dataclass(frozen=True)
class Case:
    """One arm with one kernel set: what is timed. `options` is an instance of METHODS[method].options."""

    id: str
    arm: str
    method: str
    options: Any
    runtime: str
    kernels: str


def of_tenant(case: Case, tenant: int) -> Case:
    """`case` with the method and the options of this tenant's adapter: its own, unless its tenants' differ."""
    if METHODS[case.method].served_by != "mixed":
        return case
    method, options = case.options.of_tenant(tenant)
    return replace(case, method=method, options=options)


def source_of(case: Case) -> Case:
    """`case` with the method and the options that its adapters have before a conversion: its own, mostly."""
    source = getattr(case.options, "source", None)
    return case if source is None else replace(case, method=source[0], options=source[1])


def kinds_of(case: Case) -> tuple[Case, ...]:
    """`case` for each kind of adapter that its tenants have."""
    kinds = len(case.options.of) if METHODS[case.method].served_by == "mixed" else 1
    return tuple(of_tenant(case, tenant) for tenant in range(kinds))


@dataclass(frozen=True)
class Comparison:
    """Cases that take turns; `id` is what the ids of all its cases start with."""

    id: str
    backbone: str
    dtype: str
    device: str
    runtime: str
    workload: Workload
    cases: tuple[Case, ...]
    quantisation: str = "none"
    tensor_parallel_size: int = 1


# Of one scenario; more than fit on a screen for hours, and in memory with ease.
MOST_POINTS = 20_000


def expand(scenario: Scenario, *, large: bool = False) -> tuple[Comparison, ...]:
    """Every comparison of `scenario`, in the order of its axes; a point written twice is there once.

    ScenarioError when two different points would have one id, and when there are more than MOST_POINTS, unless `large`.
    """
    count = sum(map(count_points, scenario.workload))
    axes_of_run = (
        scenario.backbone,
        scenario.dtype,
        scenario.quantisation,
        scenario.runtime,
        scenario.tensor_parallel_size,
    )
    count *= math.prod(map(len, axes_of_run))
    if count > MOST_POINTS and not large:
        raise ScenarioError(
            f"{scenario.source.origin(())}: expected at most {MOST_POINTS:,} comparisons, the product of all axes, "
            f"got {count:,}; choose fewer values, or say --large"
        )
    found: dict[str, Comparison] = {}
    for of_run in itertools.product(*axes_of_run):
        for workload in (point for axes in scenario.workload for point in _points(axes)):
            comparison = _comparison(scenario, *of_run, workload)
            other = found.setdefault(comparison.id, comparison)
            if other != comparison:
                what = f"{_difference(other, comparison)} have one id, {comparison.id}"
                raise ScenarioError(f"{scenario.source.origin(())}: {what}; rename one of them")
    return tuple(found.values())


def select(comparisons: Sequence[Comparison], glob: str) -> tuple[Comparison, ...]:
    """What is left when only cases whose id matches `glob` are kept, each with the `none` of its kernel set.

    ScenarioError when nothing matches.
    """
    kept = []
    for comparison in comparisons:
        hits = {case for case in comparison.cases if fnmatch.fnmatchcase(case.id, glob)}
        kernels = {case.kernels for case in hits}
        beside = {case for case in comparison.cases if case.method == "none" and case.kernels in kernels}
        cases = tuple(case for case in comparison.cases if case in hits | beside)
        if cases:
            kept.append(Comparison(**{**vars(comparison), "cases": cases}))
    if not kept:
        ids = [case.id for comparison in comparisons for case in comparison.cases]
        close = difflib.get_close_matches(glob, ids, n=1) or ids[:3]
        more = f" and {len(ids) - len(close)} more" if len(ids) > len(close) else ""
        there = f"there are {', '.join(close)}{more}"
        raise ScenarioError(f"--case {glob}: no case matches; {there} (--dry-run lists all)")
    return tuple(kept)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """`comparison` as plain JSON data, from which `from_json` makes an equal one."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(comparison)))
    return data


def from_json(data: dict[str, Any]) -> Comparison:
    """The comparison that `to_json` wrote. ScenarioError on a method that this version does not have."""
    return Comparison(
        **{
            **data,
            "workload": Workload(**data["workload"]),
            "cases": tuple(_case_from_json(case) for case in data["cases"]),
        }
    )


def _case_from_json(data: dict[str, Any]) -> Case:
    method = data["method"]
    if method not in METHODS:
        raise ScenarioError(f"{data['id']}: unknown method {method!r}; {nearest(method, METHODS)}")
    options = METHODS[method].options(**{key: frozen(value) for key, value in data["options"].items()})
    return Case(**{**data, "options": options})


def count_points(axes: WorkloadAxes) -> int:
    """How many workloads these axes make, none of which is made for it."""
    mixes = sum(len(axes.zipf_exponent) if mix == "zipf" else 1 for mix in axes.tenant_mix)
    return mixes * math.prod(len(getattr(axes, axis)) for axis in _AXES if axis != "zipf_exponent")


# The axes of a workload, in the order in which their product is taken.
_AXES = (
    "prompt_tokens", "new_tokens", "beams", "requests", "tenants", "resident", "zipf_exponent", "without_adapter",
    "follow_up_tokens", "own_tokens",
)  # fmt: skip


def _points(axes: WorkloadAxes) -> Iterator[Workload]:
    """The product of the axes; the exponent is one of them only where the mix is zipf."""
    for mix in axes.tenant_mix:
        own = {axis: getattr(axes, axis) for axis in _AXES} | ({} if mix == "zipf" else {"zipf_exponent": (None,)})
        for values in itertools.product(*own.values()):
            point = dict(zip(_AXES, values, strict=True))
            resident = point["tenants"] if point["resident"] is None else point["resident"]
            yield Workload(**{**point, "prompts": axes.prompts, "tenant_mix": mix, "resident": resident})


def _comparison(
    scenario: Scenario, backbone: str, dtype: str, quantisation: str, runtime: str, ranks: int, workload: Workload
) -> Comparison:
    """The comparison at one point of the axes, with a case for each arm and kernel set."""
    numbers = dtype if quantisation == "none" else f"{dtype}-{quantisation}"
    devices = scenario.device if ranks == 1 else f"{scenario.device}x{ranks}"
    prefix = f"{_backbone_part(backbone)}-{numbers}-{devices}/{runtime}/{_workload_part(workload)}"
    return Comparison(
        id=prefix,
        backbone=backbone,
        dtype=dtype,
        quantisation=quantisation,
        device=scenario.device,
        runtime=runtime,
        tensor_parallel_size=ranks,
        workload=workload,
        cases=tuple(
            Case(f"{prefix}/{arm.label}-{kernels}", arm.label, arm.method, arm.options, runtime, kernels)
            for kernels in scenario.kernels
            for arm in scenario.methods
            if serves(runtime, arm.method)
        ),
    )


def _backbone_part(backbone: str) -> str:
    """A name as it is; of a folder its own name and a hash of its path, since many folders share a name."""
    if backbone_config.is_named(backbone) or not expanded(backbone).is_dir():
        return _safe(backbone.replace("/", "--"))
    digest = hashlib.sha256(os.path.normpath(backbone).encode()).hexdigest()[:6]
    return f"{_safe(expanded(backbone).resolve().name)}-{digest}"


def _workload_part(workload: Workload) -> str:
    """Such as `p274-n32-b3-q8-t8-r8-distinct`: prompt, new tokens, beams, requests, tenants, resident."""
    parts = [] if workload.prompts is None else [_safe(Path(workload.prompts).stem)]
    if workload.prompt_tokens is not None:
        parts.append(f"p{workload.prompt_tokens}")
    parts += [f"n{workload.new_tokens}", f"b{workload.beams}", f"q{workload.requests}"]
    parts += [f"t{workload.tenants}", f"r{workload.resident}"]
    exponent = "" if workload.zipf_exponent is None else _number(workload.zipf_exponent)
    parts.append(f"{workload.tenant_mix}{exponent}")
    if workload.without_adapter:
        parts.append(f"w{_number(workload.without_adapter)}")
    if workload.follow_up_tokens:
        parts.append(f"f{workload.follow_up_tokens}")
    if workload.own_tokens:
        parts.append(f"own{workload.own_tokens}")
    return "-".join(parts)


def _number(value: float) -> str:
    """The shortest text that stands for exactly this number: 1.1, 2, 0.25."""
    return str(int(value)) if value == int(value) else repr(value)


def _safe(text: str) -> str:
    """`text` with only what is safe in a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-") or "x"


def _difference(one: Comparison, other: Comparison) -> str:
    """The first field in which two comparisons of one id differ."""
    ones, others = ({**vars(item), **vars(item.workload)} for item in (one, other))
    name = next(name for name in ("backbone", "prompts", "prompt_tokens") if ones[name] != others[name])
    return f"{name} {ones[name]!r} and {others[name]!r}"
