"""Which of a traffic scenario's arms is served, and for how many tenants. Free of torch."""

from __future__ import annotations

from perfbench.errors import PerfbenchError, nearest
from perfbench.spec.cases import Case
from perfbench.spec.traffic import TrafficScenario


def chosen(scenario: TrafficScenario, method: str | None) -> Case:
    """The arm that is served: the first with adapters where nobody says which. PerfbenchError on an unknown name."""
    known = {case.arm: case for case in scenario.comparison.cases}
    if method is None:
        return next((case for case in known.values() if case.method != "none"), next(iter(known.values())))
    if method not in known:
        raise PerfbenchError(f"--method: the scenario has no {method!r}; {nearest(method, known)}")
    return known[method]


def most_tenants(scenario: TrafficScenario) -> int:
    """As many as the scenario's largest point has, or twice those that are resident where it searches."""
    return max(scenario.traffic.tenants or (2 * scenario.server.resident,))
