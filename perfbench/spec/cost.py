"""What a scenario asks for, counted before anything of it is made: cases, turns, bytes on disk. Free of torch.

A zero too many in a scenario is a run of years, and a product of a few axes more cases than fit in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from perfbench.errors import ScenarioError
from perfbench.files.plain_text import format_bytes
from perfbench.spec.cases import Comparison, count_points
from perfbench.spec.runtime_support import serves
from perfbench.spec.scenario import Scenario

# The largest scenario that is shipped has 132 cases, and 6,500 turns.
MOST_CASES = 2_000
MOST_TURNS = 1_000_000
MOST_BYTES = 2**30
# As measured on committed runs: a case in run.json, a line of samples.jsonl, a step in it.
_CASE_BYTES, _LINE_BYTES, _STEP_BYTES = 5_000, 450, 21
LIFTED = "--large"


@dataclass(frozen=True)
class Cost:
    """cases; turns: of them all, warm-up and repetitions in every process; file_bytes: run.json and samples.jsonl."""

    cases: int
    turns: int
    file_bytes: int

    @property
    def words(self) -> str:
        """Such as `24 cases, 2,472 turns, about 1.8 MiB on disk`."""
        return f"{self.cases:,} cases, {self.turns:,} turns, about {format_bytes(self.file_bytes)} on disk"


def of_scenario(scenario: Scenario) -> Cost:
    """That of all the cases of `scenario`, none of which is made for it; a point that is written twice counts twice."""
    served = sum(serves(runtime, arm.method) for runtime in scenario.runtime for arm in scenario.methods)
    axes_of_run = (scenario.backbone, scenario.dtype, scenario.quantisation, scenario.tensor_parallel_size)
    arms = math.prod(map(len, axes_of_run)) * len(scenario.kernels) * served
    return _cost(scenario, ((arms * count_points(axes), max(axes.new_tokens)) for axes in scenario.workload))


def of_comparisons(scenario: Scenario, comparisons: Sequence[Comparison]) -> Cost:
    """That of the cases which are left of `scenario`."""
    return _cost(scenario, ((len(one.cases), one.workload.new_tokens) for one in comparisons))


def check(scenario: Scenario, cost: Cost, *, large: bool) -> None:
    """ScenarioError, with the numbers, where `cost` is above a limit that `large` does not lift."""
    for what, found, most in (
        ("cases", cost.cases, MOST_CASES),
        ("turns (warm-up and repetitions of every case)", cost.turns, MOST_TURNS),
        ("bytes on disk", cost.file_bytes, MOST_BYTES),
    ):
        if found > most and not large:
            raise ScenarioError(
                f"{scenario.source.origin(())}: expected at most {most:,} {what}, got {found:,} ({cost.words}); "
                f"choose fewer values, repetitions or processes, or say {LIFTED}"
            )


def _cost(scenario: Scenario, groups: Iterable[tuple[int, int]]) -> Cost:
    """groups: the number of cases, and the new tokens of each."""
    cases, file_bytes = 0, 0
    for count, new_tokens in groups:
        cases += count
        line = _LINE_BYTES + _STEP_BYTES * new_tokens
        file_bytes += count * (_CASE_BYTES + scenario.rounds * line)
    return Cost(cases, cases * (scenario.rounds + scenario.warmup * scenario.processes), file_bytes)
