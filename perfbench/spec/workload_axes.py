"""The workloads of a scenario file: their axes, impossible points refused. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfbench.files.yaml_source import Place, Source
from perfbench.spec.refusal import axis, existing, last_set, refuse

DEFAULT_ZIPF_EXPONENT = 1.1


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


def workload_places(source: Source) -> list[Place]:
    """The places of the workload mappings: one, or one for each item of the list."""
    workload = source.values["workload"]
    if isinstance(workload, list):
        return [("workload", index) for index in range(len(workload))]
    return [("workload",)]


def axes_at(source: Source, place: Place, path: Path) -> WorkloadAxes:
    """The workload mapping at `place`, its impossible points refused."""
    values = source.values["workload"]
    for index in place[1:]:
        values = values[index]
    if "prompt_tokens" not in values and "prompts" not in values:
        message = "expected prompt_tokens (random prompts) or prompts (a file of real ones), got neither"
        refuse(source, message, *place)
    mixes = axis(values.get("tenant_mix", "distinct"))
    if "zipf_exponent" in values and "zipf" not in mixes:
        message = f"expected only with tenant_mix zipf, got {', '.join(mixes)}; remove it, or choose zipf"
        refuse(source, message, *place, "zipf_exponent")
    tenants, resident = axis(values["tenants"]), axis(values.get("resident"))
    for held in resident:
        if held is not None and held < max(tenants):
            drawn = next(drawn for drawn in tenants if held < drawn)
            field_name = last_set(source, (*place, "resident"), (*place, "tenants"))
            message = f"more tenants than the bank's capacity: resident {held} with tenants {drawn}"
            refuse(source, f"{message}; raise resident or lower tenants", *field_name)
    if any(axis(values.get("follow_up_tokens", 0))):
        _check_second_turn(source, place, values)
    if any(axis(values.get("own_tokens", 0))):
        _check_shared_context(source, place, values)
    if "continuous" in axis(source.values.get("runtime", ())) and axis(values.get("beams", 1)) != (1,):
        message = "runtime continuous has no beams; choose beams 1, or leave that runtime out"
        refuse(source, message, *last_set(source, (*place, "beams"), ("runtime",)))
    prompts = values.get("prompts")
    return WorkloadAxes(
        prompts=None if prompts is None else existing(source, prompts, path, "file", *place, "prompts"),
        prompt_tokens=axis(values.get("prompt_tokens")),
        new_tokens=axis(values["new_tokens"]),
        beams=axis(values.get("beams", 1)),
        requests=axis(values["requests"]),
        tenants=tenants,
        resident=resident,
        tenant_mix=mixes,
        zipf_exponent=tuple(map(float, axis(values.get("zipf_exponent", DEFAULT_ZIPF_EXPONENT)))),
        without_adapter=tuple(map(float, axis(values.get("without_adapter", 0)))),
        follow_up_tokens=axis(values.get("follow_up_tokens", 0)),
        own_tokens=axis(values.get("own_tokens", 0)),
    )


def _check_shared_context(source: Source, place: Place, values: dict[str, Any]) -> None:
    """Refuses a shared context where there is none, or where it would not be read as one."""
    own = max(axis(values["own_tokens"]))
    if values.get("prompts") is not None:
        message = "prompts of a file share nothing; leave own_tokens out, or choose random prompts by prompt_tokens"
    elif any(axis(values.get("follow_up_tokens", 0))):
        message = "a shared context has one turn; leave follow_up_tokens out"
    elif "continuous" in axis(source.values.get("runtime", ())):
        message = "runtime continuous reads every prompt by itself; choose static or transformers"
    elif own >= (shortest := min(axis(values["prompt_tokens"]))):
        message = f"expected fewer than the {shortest} prompt_tokens, the others being shared, got {own}; lower it"
    else:
        return
    refuse(source, message, *place, "own_tokens")


def _check_second_turn(source: Source, place: Place, values: dict[str, Any]) -> None:
    """Refuses a second turn where nothing could go on from the first one's cache."""
    runtimes, beams = axis(source.values.get("runtime", "transformers")), axis(values.get("beams", 1))
    if runtimes != ("static",):
        message = "a second turn needs runtime static, the others read everything again; choose runtime static alone"
        refuse(source, message, *place, "follow_up_tokens")
    if beams != (1,):
        refuse(source, "a second turn follows greedy search only; choose beams 1", *place, "follow_up_tokens")
