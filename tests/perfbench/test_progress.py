"""What a log tells of a long run: a line for each case, and none of its silences is long."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from perfbench import progress


def test_a_log_is_told_of_rounds_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    log = io.StringIO()
    with progress.RunProgress(10, Console(file=log, width=200)) as bar:
        bar.say("a/none", "checking")
        bar.say("a/none", "measuring memory")  # the same case at once
        bar.say("a/lora", "checking")
        for number in range(1, 9):  # two arms take turns, four seconds each
            now[0] += 4
            bar.say(f"a/{('none', 'lora')[number % 2]}", f"round {number} of 8")
    assert log.getvalue().splitlines() == [
        "a/none: checking", "a/lora: checking", "a/none: round 4 of 8", "a/none: round 8 of 8",
    ]  # fmt: skip
