"""Work that torch does not see: it is counted as instructions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from perfbench.measure.on_device import counts
from perfbench.measure.on_device.worker import open_session
from perfbench.runtimes.static.decoder import Decoder
from perfbench.spec import cases, scenario

SCENARIO = """\
backbone: llama-tiny
dtype: fp32
device: cpu
runtime: static
methods: [lora]
workload: {prompt_tokens: 6, new_tokens: 4, requests: 2, tenants: 2}
"""


class Lines:
    """Stands in for the instructions: the lines of Python that functions run through which are called meanwhile."""

    def start(self) -> None:
        self.seen = 0
        sys.settrace(self._trace)

    def stop(self) -> int:
        sys.settrace(None)
        return self.seen

    def _trace(self, _frame: Any, event: str, _argument: Any) -> Any:
        self.seen += event == "line"
        return self._trace


class Pretended:
    """Counts that were made up."""

    def __init__(self, *counts: int):
        self.left = list(counts)

    def start(self) -> None:
        pass

    def stop(self) -> int:
        return self.left.pop(0)


def test_a_loop_planted_in_the_decode_step_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand turns, in the one step that is counted, of which no operation of ATen's tells."""
    (tmp_path / "x.yaml").write_text(SCENARIO)
    (comparison,) = cases.expand(scenario.resolve(scenario.load(tmp_path / "x.yaml"), "cpu"))
    settings = {"comparisons": [cases.to_json(comparison)], "plugins": [], "threads": 1, "seed": 0}
    session = open_session(settings, comparison, lambda *_, **__: None)
    built = session._build(comparison.cases[-1])
    device = session.backbone.device

    def counted() -> tuple[int, dict[str, int | None]]:
        return counts.instructions(built.arm, built.batch, Lines()), counts.decode_step(built.arm, built.batch, device)

    before = counted()
    assert before[0] > 100
    assert counted() == before

    def slower(self: Decoder, tokens: Any, step: Any = Decoder.step) -> Any:
        for _ in range(10_000):
            pass
        return step(self, tokens)

    monkeypatch.setattr(Decoder, "step", slower)
    after = counted()
    assert after[1] == before[1], "the fault is invisible to other counts"
    assert after[0] - before[0] == pytest.approx(2 * 10_000, abs=10), "two lines a turn"

    disturbed = Pretended(900, 700, 800)
    assert counts.instructions(built.arm, built.batch, disturbed) == 700, "what disturbs a count adds to it"
    assert disturbed.left == []
