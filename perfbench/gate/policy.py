"""A gate's policy: which figures carry the verdict, and within which limits. Read strictly from YAML; free of torch.

exact:                                  # tolerance: the relative change that is let pass; 0 of most, unless said
  peak_allocated_bytes: {tolerance: 0.01}
timed:
  least_effect: 0.03                    # a smaller slow-down does not matter
  confidence: 0.95
  implausible_gain: 0.3                 # taking over 30% less time is a fault until shown otherwise
  min_processes: 6
  primary:                              # at most two; a figure is the geometric mean over its cases
    - {figure: decode_tokens_per_s}
    - {figure: ttft_ms, cases: '*/lora-eager', least_effect: 0.05}
overrides:                              # the last that matches a case wins
  - {cases: '*/peft-*', reason: not our code, skip: true}
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfbench.errors import PolicyError, ScenarioError, nearest
from perfbench.figures.metrics import METRICS
from perfbench.files import yaml_source
from perfbench.files.plain_text import shown
from perfbench.files.yaml_source import Place, Source, dotted
from perfbench.gate.figures import compiled, exact, timed

MAX_PRIMARY = 2
# Fewer than 6 values have no two-sided bound at 95%, of pairs or of two groups.
LEAST_PROCESSES = 6


@dataclass(frozen=True)
class Primary:
    """A timed figure that carries the verdict: the geometric mean over the cases whose id matches `cases`.

    least_effect: the least relative slow-down that matters, such as 0.03.
    """

    figure: str
    cases: str
    least_effect: float


@dataclass(frozen=True)
class Override:
    """What differs for the cases whose id matches `cases`, and the `reason`. `skip`: nothing of them is gated;
    `tolerances`: of exact figures."""

    cases: str
    reason: str
    skip: bool
    tolerances: Mapping[str, float]


@dataclass(frozen=True)
class Policy:
    """What is gated. `tolerances`: exact figure -> relative change let pass; shares and confidences in [0, 1]."""

    tolerances: Mapping[str, float]
    primary: tuple[Primary, ...]
    confidence: float
    implausible_gain: float
    min_processes: int
    overrides: tuple[Override, ...]

    def skipped(self, case: str) -> str | None:
        """Why nothing of `case` is gated; None where it is."""
        matching = self._overrides(case)
        return matching[-1].reason if matching and matching[-1].skip else None

    def tolerance(self, figure: str, case: str) -> tuple[float, str]:
        """The relative change of an exact `figure` of `case` that is let pass, and the override's reason or ""."""
        for override in reversed(self._overrides(case)):
            if figure in override.tolerances:
                return override.tolerances[figure], override.reason
        return self.tolerances[figure], ""

    def _overrides(self, case: str) -> list[Override]:
        return [override for override in self.overrides if fnmatch.fnmatchcase(case, override.cases)]


def load(path: Path | None) -> Policy:
    """The policy in the file at `path`, or the default one. Raises PolicyError with file, line and remedy."""
    if path is None:
        return _policy(Source({}, {(): "the default policy"}))
    try:
        source = yaml_source.read(path)
    except ScenarioError as error:  # the reader's words are about YAML, except for this one
        raise PolicyError(str(error).replace("a scenario file", "a policy file")) from None
    return _policy(source)


def _policy(source: Source) -> Policy:
    top = _mapping(source, (), source.values, ("exact", "timed", "overrides"))
    timed_fields = ("least_effect", "confidence", "implausible_gain", "min_processes", "primary")
    rules = _mapping(source, ("timed",), top.get("timed", {}), timed_fields)
    least_effect = _share(source, ("timed", "least_effect"), rules.get("least_effect", 0.03))
    processes = rules.get("min_processes", LEAST_PROCESSES)
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < LEAST_PROCESSES:
        expected = f"an integer >= {LEAST_PROCESSES}, below which there is no bound"
        raise _refused(source, ("timed", "min_processes"), expected, processes)
    return Policy(
        tolerances={figure: METRICS[figure].tolerance for figure in (*exact(), *compiled())}
        | _tolerances(source, ("exact",), top.get("exact", {})),
        primary=_primary(source, rules.get("primary", [{"figure": "decode_tokens_per_s"}]), least_effect),
        confidence=_share(source, ("timed", "confidence"), rules.get("confidence", 0.95)),
        implausible_gain=_share(source, ("timed", "implausible_gain"), rules.get("implausible_gain", 0.3)),
        min_processes=processes,
        overrides=tuple(
            _override(source, ("overrides", index), value)
            for index, value in enumerate(_list(source, ("overrides",), top.get("overrides", [])))
        ),
    )


def _primary(source: Source, values: Any, least_effect: float) -> tuple[Primary, ...]:
    place: Place = ("timed", "primary")
    values = _list(source, place, values)
    if len(values) > MAX_PRIMARY:
        expected = f"at most {MAX_PRIMARY} figures, since each more makes a false alarm likelier"
        raise _refused(source, place, expected, f"{len(values)}")
    found = []
    for index, value in enumerate(values):
        here = (*place, index)
        value = _mapping(source, here, value, ("figure", "cases", "least_effect"))
        figure = value.get("figure")
        if figure not in timed():
            expected = f"a timed figure ({nearest(str(figure), timed())})"
            raise _refused(source, (*here, "figure"), expected, figure)
        effect = _share(source, (*here, "least_effect"), value.get("least_effect", least_effect))
        found.append(Primary(figure, _text(source, (*here, "cases"), value.get("cases", "*")), effect))
    return tuple(found)


def _override(source: Source, place: Place, value: Any) -> Override:
    value = _mapping(source, place, value, ("cases", "reason", "skip", "exact"))
    skip = value.get("skip", False)
    if not isinstance(skip, bool):
        raise _refused(source, (*place, "skip"), "true or false", skip)
    return Override(
        cases=_text(source, (*place, "cases"), value.get("cases")),
        reason=_text(source, (*place, "reason"), value.get("reason")),
        skip=skip,
        tolerances=_tolerances(source, (*place, "exact"), value.get("exact", {})),
    )


def _tolerances(source: Source, place: Place, values: Any) -> dict[str, float]:
    values = _mapping(source, place, values, (*exact(), *compiled()), what="exact figure")
    found = {}
    for figure, value in values.items():
        here = (*place, figure)
        limits = _mapping(source, here, value, ("tolerance",))
        found[figure] = _share(source, (*here, "tolerance"), limits.get("tolerance", 0.0), zero=True)
    return found


def _mapping(source: Source, place: Place, value: Any, known: Any, what: str = "field") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refused(source, place, "a mapping", value)
    for key in value:
        if key not in known:
            where = source.origin((*place, key))
            raise PolicyError(f"{where}: {dotted((*place, key))}: unknown {what} {key!r}; {nearest(key, known)}")
    return value


def _list(source: Source, place: Place, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _refused(source, place, "a list", value)
    return value


def _text(source: Source, place: Place, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _refused(source, place, "a text that is not empty", value)
    return value


def _share(source: Source, place: Place, value: Any, zero: bool = False) -> float:
    least: Callable[[float], bool] = (lambda number: number >= 0) if zero else (lambda number: number > 0)
    if not isinstance(value, int | float) or isinstance(value, bool) or not least(value) or value >= 1:
        raise _refused(source, place, f"a share {'>= 0' if zero else '> 0'} and < 1, such as 0.03", value)
    return float(value)


def _refused(source: Source, place: Place, expected: str, got: Any) -> PolicyError:
    where = f"{source.origin(place)}: {dotted(place) or 'the policy'}"
    return PolicyError(f"{where}: expected {expected}, got {shown(got)}")
