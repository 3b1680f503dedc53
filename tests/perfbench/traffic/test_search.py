"""The search for the largest number that holds."""

from __future__ import annotations

import pytest

from perfbench.traffic.search import MOST, RESOLUTION, Found, search


def run(true: int, start: int, least: int = 1) -> tuple[Found, list[int]]:
    """What the search finds where every number up to `true` holds, and what it tried."""
    tried: list[int] = []
    asked = search(start, least)
    number = next(asked)
    while True:
        tried.append(number)
        try:
            number = asked.send(number <= true)
        except StopIteration as ended:
            return ended.value, tried


@pytest.mark.parametrize("start", [0, 1, 10, 100, 5000, 10**9])
@pytest.mark.parametrize("true", [0, 1, 2, 3, 7, 50, 99, 1000, 123_456])
def test_it_ends_within_five_percent_below_the_largest_that_holds(true: int, start: int) -> None:
    found, tried = run(true, start)
    assert found.failed is not None
    assert found.held <= true < found.failed
    assert found.failed <= max(found.held + 1, found.held * RESOLUTION)
    assert len(tried) == len(set(tried)) <= 20


def test_nothing_below_the_least_is_tried() -> None:
    found, tried = run(0, 100, least=12)
    assert (found, min(tried)) == (Found(0, 12), 12)
    assert run(12, 100, least=12)[0] == Found(12, 13)


def test_it_stops_where_even_the_most_holds() -> None:
    assert run(10**9, 10)[0] == Found(MOST, None)


def test_near_the_answer_it_takes_few_tries() -> None:
    assert len(run(105, 100)[1]) <= 6
