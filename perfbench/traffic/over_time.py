"""What a measurement looked like while it ran: how long each tenant waited, and when adapters were loaded. Free of
torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from perfbench.report.chart import Chart
from perfbench.spec.traffic import NOBODY
from perfbench.traffic.outcome import Answered
from perfbench.traffic.traffic_folder import Key, Measured

# A measurement is cut into so many stretches of time, and so many tenants have a row, the busiest first.
STRETCHES, TENANTS = 24, 20
OTHERS = "all others"


def charts(
    measured: Mapping[Key, Measured], shown: Mapping[str, tuple[int, float]], target_ms: float
) -> Iterator[Chart]:
    """Of the first repetition at the point of each arm, shown: arm -> (tenants, requests a second)."""
    loads = []
    for arm, (tenants, rate_per_s) in shown.items():
        answered = next(
            (
                found.answered
                for key, found in measured.items()
                if (key.arm, key.tenants, key.rate) == (arm, tenants, rate_per_s) and found.answered
            ),
            None,
        )
        if answered is None or (length_s := answered[-1].due_s) <= 0:
            continue
        stretch_s = length_s / STRETCHES
        yield Chart(
            "heat",
            f"Longest time to the first token: {arm}, {tenants:,} tenants",
            "seconds from the start",
            ("tenant", "from s", "to s", "ms"),
            waited(answered, stretch_s),
            f"Of each tenant's requests that were due in a stretch of time. The darker the longer, and another colour "
            f"beyond the target of {target_ms:g} ms. The busiest tenants come first.",
            {"target": target_ms},
        )
        loads += [(arm, *row) for row in loaded(answered, stretch_s)]
    if loads:
        title, axis = "Adapters loaded from the host, over time", "adapters a second"
        columns, note = ("method", "seconds", "loads/s", "low", "high"), "Of the same measurements."
        yield Chart("lines", title, axis, columns, loads, note, {"x": "seconds from the start"})


def waited(answered: Sequence[Answered], stretch_s: float) -> list[tuple[str, float, float, float]]:
    """(tenant, from s, to s, the longest ttft_ms) of each stretch in which a request of the tenant was due."""
    busiest = [tenant for tenant, _ in Counter(one.tenant for one in answered).most_common(TENANTS)]
    longest: dict[tuple[str, int], float] = defaultdict(float)
    for one in answered:
        cell = _name(one.tenant) if one.tenant in busiest else OTHERS, _stretch(one, stretch_s)
        longest[cell] = max(longest[cell], one.ttft_ms)
    names = [*map(_name, busiest), OTHERS]
    cells = sorted(longest, key=lambda cell: (names.index(cell[0]), cell[1]))
    return [(name, at * stretch_s, (at + 1) * stretch_s, longest[name, at]) for name, at in cells]


def loaded(answered: Sequence[Answered], stretch_s: float) -> list[tuple[float, float, None, None]]:
    """(s, adapters loaded a second from then on, no interval) of each stretch; none where nothing ever was, or nobody
    knows."""
    counts = Counter(_stretch(one, stretch_s) for one in answered if one.loaded)
    return [(at * stretch_s, counts[at] / stretch_s, None, None) for at in range(STRETCHES)] if counts else []


def _stretch(one: Answered, stretch_s: float) -> int:
    return min(int(one.due_s / stretch_s), STRETCHES - 1)


def _name(tenant: int) -> str:
    return "no adapter" if tenant == NOBODY else f"tenant {tenant}"


def points(rows: Sequence[Any]) -> dict[str, tuple[int, float]]:
    """Arm -> (tenants, requests a second) of the last of its rows in the report that was measured."""
    return {row.arm: (row.point["tenants"], row.point["rate_per_s"]) for row in rows if row.point is not None}
