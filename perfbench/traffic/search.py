"""The largest number that holds, by steps and then by halves. Free of torch."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

# How far apart the largest number that held and the smallest that did not may be at the end.
RESOLUTION = 1.05
# The first step, up or down from where the search begins; each further one in that direction is twice as long.
STEP = 1.25
MOST = 1_000_000


@dataclass(frozen=True)
class Found:
    """`held`: the largest number that held, 0 where not even the least that was tried did; `failed`: the smallest that
    did not, None where even MOST did."""

    held: int
    failed: int | None


def search(start: int, least: int = 1) -> Generator[int, bool, Found]:
    """Yields a number to be tried, none below `least`, and is sent whether it held; returns what it found. A number
    that holds is taken to mean that every smaller one does."""
    held, failed, step = 0, MOST + 1, STEP
    number = max(least, min(start, MOST))
    while failed > max(held + 1, held * RESOLUTION) and failed > least:
        if (yield number):
            held = number
        else:
            failed = number
        if held and failed <= MOST:
            number = round((held * failed) ** 0.5)
        else:
            number = round(number * step if held else number / step)
            step **= 2
        number = max(least, held + 1, min(number, failed - 1))
    return Found(held, failed if failed <= MOST else None)
