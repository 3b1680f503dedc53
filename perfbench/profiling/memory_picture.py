"""A memory timeline as one SVG that needs nothing else. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

WIDTH, HEIGHT = 860, 300
LEFT, TOP, RIGHT, BOTTOM = 76, 50, 16, 40
# A bottom-up stack; weights are told in words, since beside them nothing else would be seen.
SHOWN = {"adapters": "#c2631c", "kv": "#2f6fb2", "activations": "#3a9a63", "other": "#8a8f98"}
NAMES = {"adapters": "adapters", "kv": "KV cache", "activations": "activations", "other": "other"}
MIB = 2**20


def render(timeline: Mapping[str, Any], title: str) -> str:
    """The picture of what `memory_timeline.record` returned, above the weights."""
    columns = _columns(timeline)
    highest = max(1, max(sum(column.values()) for column in columns))
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    end_us = max(timeline["times_us"][-1], 1e-9)
    weights = max(timeline["bytes"]["weights"])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="18" font-size="14" font-weight="600">{escape(title)}</text>',
        f'<text x="{WIDTH - RIGHT}" y="18" text-anchor="end" fill="#555">above {_mib(weights)} of weights; '
        f"peak in all {_mib(timeline['peak_bytes'])}</text>",
    ]
    x = LEFT
    for name, colour in SHOWN.items():
        label = f"{NAMES[name]} {_mib(max(timeline['bytes'][name]))}"
        parts.append(f'<rect x="{x}" y="28" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 15}" y="37">{label}</text>')
        x += 40 + 7 * len(label)
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = TOP + high * (1 - share)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e5e8"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_mib(highest * share)}</text>')
    below = [0] * len(columns)
    for name, colour in SHOWN.items():
        above = [low + column[name] for low, column in zip(below, columns, strict=True)]
        parts.append(_area(below, above, highest, wide, high, colour))
        below = above
    beyond = -1e9
    for phase, time_us in timeline["phases"]:
        x_phase = LEFT + wide * time_us / end_us
        parts.append(
            f'<line x1="{x_phase:.1f}" x2="{x_phase:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM + 4}" '
            f'stroke="#333" stroke-width="0.7" stroke-dasharray="3 3"/>'
        )
        if x_phase > beyond:
            short = phase.replace("decode step", "decode")
            parts.append(f'<text x="{x_phase + 3:.1f}" y="{HEIGHT - BOTTOM + 15}">{escape(short)}</text>')
            beyond = x_phase + 8 + 6.5 * len(short)
    parts.append(
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end" fill="#555">time, {end_us / 1e3:.1f} ms '
        f"(under the profiler)</text></svg>"
    )
    return "\n".join(parts) + "\n"


def _columns(timeline: Mapping[str, Any]) -> list[dict[str, int]]:
    """For each pixel of the width the moment with the most bytes; where nothing changed, what was there before."""
    wide = WIDTH - LEFT - RIGHT
    end_us = max(timeline["times_us"][-1], 1e-9)
    found: list[dict[str, int] | None] = [None] * (wide + 1)
    last_at: dict[int, dict[str, int]] = {}
    for i, time_us in enumerate(timeline["times_us"]):
        point = {name: timeline["bytes"][name][i] for name in SHOWN}
        column = int(wide * time_us / end_us)
        best = found[column]
        if best is None or sum(point.values()) > sum(best.values()):
            found[column] = point
        last_at[column] = point
    columns: list[dict[str, int]] = []
    before = found[0] or dict.fromkeys(SHOWN, 0)
    for number, best in enumerate(found):
        columns.append(best or before)
        before = last_at.get(number, before)
    return columns


def _area(below: list[int], above: list[int], highest: int, wide: int, high: int, colour: str) -> str:
    step = wide / (len(above) - 1)
    upper = [(LEFT + i * step, TOP + high * (1 - value / highest)) for i, value in enumerate(above)]
    lower = [(LEFT + i * step, TOP + high * (1 - value / highest)) for i, value in enumerate(below)]
    points = " ".join(f"{x:.0f},{y:.1f}" for x, y in [*upper, *reversed(lower)])
    return f'<polygon points="{points}" fill="{colour}"/>'


def _mib(count: float) -> str:
    """Bytes as MiB or, below a tenth of one, KiB."""
    return f"{count / MIB:,.1f} MiB" if count >= 0.1 * MIB or not count else f"{count / 1024:,.1f} KiB"
