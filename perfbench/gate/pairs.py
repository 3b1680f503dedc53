"""Pairs of fresh processes that alternate short blocks, and what one such pair says. Free of torch.

A pair is three processes that are alive together: baseline, candidate, and a second one of the baseline, the control,
whose difference from the first is what noise alone makes. The candidate is held against the first alone: the difference
of two processes alike is symmetric however skewed the noise of a process is, which the signed-rank bound needs, and
that from the mean of two is not. The unit of every bound is the pair.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from perfbench.errors import ComparisonError
from perfbench.files.scratch import Scratch
from perfbench.gate import clocks, protocol
from perfbench.gate.figures import medians, sample_figures, slowdown, trimmed_mean
from perfbench.gate.own_code import prove_own_code
from perfbench.gate.revisions import Revision

ARMS = ("baseline", "candidate", "control")
REVISION_OF = {"baseline": "baseline", "candidate": "candidate", "control": "baseline"}

# An arm that says nothing for so long hangs: longer than a large model takes to load.
SILENT_S = 1800.0

# One pair as a line of pairs.jsonl: `seconds` it took, and `blocks`, each with its `case`, the `order` of the arms and
# {figure: median over the block's repetitions} of every arm; of a GPU also `clocks`, {arm: what clocks.of_block says}.
# A pair that is no evidence has `dropped`, why in words.
Pair = dict[str, Any]


class ArmCrashed(Exception):
    """A process of an arm ended while it was measuring; `arm`, the `case` in flight, and why."""

    def __init__(self, arm: str, case: str | None, why: str):
        super().__init__(f"{arm}: {case or 'before any case'}: {why}")
        self.arm, self.case, self.why = arm, case, why


@dataclass(frozen=True)
class Ready:
    """The ids of the `cases`, {id: what preparing it found} (empty where that was not asked), the `requests` of the
    batch, the kind of `device`, {path: hash} of the `code` that is loaded, and the `versions` of the packages that it
    runs on (empty where the revision does not say)."""

    cases: list[str]
    prepared: dict[str, dict[str, Any]]
    requests: int
    device: str
    code: dict[str, str]
    versions: dict[str, str | None]


class ArmProcess:
    """One process of a revision that times blocks; use it as a context, which ends it. It loads its libraries at once,
    and waits then for `begin`. `under`: words in front of its command."""

    def __init__(self, arm: str, revision: Revision, log: BinaryIO, under: Sequence[str] = ()):
        self.arm, self.revision = arm, revision
        self.case: str | None = None
        self._hung = False
        self._scratch = Scratch()
        environment = self._scratch.environment()
        if not revision.command:
            environment |= {"PYTHONPATH": revision.search_path}
        try:
            self._process = subprocess.Popen(
                [*under, *revision.starts],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )
        except BaseException:
            self._scratch.remove()
            raise

    def __enter__(self) -> ArmProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                with suppress(BrokenPipeError):
                    stream.close()
        self._scratch.remove()

    def begin(self, job: Mapping[str, Any]) -> Ready:
        """Gives it its job. What the revision will measure, once all its arms are warm and its code is proved its own.

        Raises ComparisonError where the revision can't take part, ArmCrashed where the process ended.
        """
        self._send({"protocol": protocol.PROTOCOL, **self.revision.job, **job})
        found: dict[str, dict[str, Any]] = {}
        while True:
            event = self._event()
            if event["event"] == "case":
                found[event["case"]] = protocol.prepared(event)
            elif event["event"] == "counted":
                found.setdefault(event["case"], {})["exact"] = event["exact"]
            elif event["event"] == "ready":
                loaded = event.get("code", {}), event.get("modules", {})
                code = prove_own_code(self.revision, event.get("root", ""), *loaded)
                device, versions = event.get("device", "cpu"), event.get("versions", {})
                return Ready(event["cases"], found, event["requests"], device, code, versions)

    def block(self, case: str, repetitions: int) -> list[dict[str, Any]]:
        """The samples of so many repetitions of `case`, now. Raises ArmCrashed."""
        self._send({"case": case, "repetitions": repetitions})
        while (event := self._event())["event"] != "block":
            pass
        return protocol.samples_of(event)

    def _give_up(self) -> None:
        self._hung = True
        self._process.kill()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # how it ended is told by the next event
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _event(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        patience = threading.Timer(SILENT_S, self._give_up)
        patience.daemon = True  # Python waits at its end for any other
        patience.start()
        try:
            line = self._process.stdout.readline()
        finally:
            patience.cancel()
        if not line.endswith(b"\n"):
            code = self._process.wait()
            ended = f"said nothing for {SILENT_S:g} s" if self._hung else f"the process ended with exit code {code}"
            raise ArmCrashed(self.arm, self.case, f"{ended}; see worker.log")
        try:
            event = protocol.event_of(line)
        except ValueError as error:
            raise ComparisonError(
                f"{self.revision.label}: does not speak the protocol of `perfbench ab`: {error}"
            ) from None
        if event["event"] == "error":
            if event["kind"] == "bad_input":
                said = event["message"].replace(f"{self.revision.folder}/", "")
                raise ComparisonError(f"{self.revision.label}: {said}")
            raise ArmCrashed(self.arm, event.get("case"), event["message"])
        if event["event"] == "phase":
            self.case = event["case"]
        return event


def balanced_orders(blocks: int, draw: random.Random) -> list[tuple[str, ...]]:
    """`blocks` orders of the arms, in each six of which every arm stands at every place equally often."""
    orders: list[tuple[str, ...]] = []
    while len(orders) < blocks:
        every = list(itertools.permutations(ARMS))
        draw.shuffle(every)
        orders += every
    return orders[:blocks]


def measure_pair(
    revisions: Mapping[str, Revision],
    job: Mapping[str, Any],
    cases: Sequence[str],
    requests: int,
    *,
    blocks: int,
    repetitions: int,
    seed: str,
    log: Path,
) -> Pair:
    """One pair: fresh processes, then `blocks` of each case, the arms in balanced order within each.

    Raises ComparisonError and ArmCrashed as ArmProcess does.
    """
    began, draw = time.monotonic(), random.Random(seed)
    measured: list[dict[str, Any]] = []
    with ExitStack() as stack:
        file = stack.enter_context(log.open("ab"))
        arms = {
            arm: stack.enter_context(ArmProcess(arm, revisions[REVISION_OF[arm]], file))
            for arm in draw.sample(ARMS, len(ARMS))
        }
        # They load their libraries together and warm up one after the other: two teams of threads on the same cores
        # wait for each other at every barrier, and a warm-up of one second took up to ninety.
        for process in arms.values():
            process.begin(job)
        orders = {case: balanced_orders(blocks, draw) for case in cases}
        for number in range(blocks):
            for case in draw.sample(list(cases), len(cases)):
                order = orders[case][number]
                block: dict[str, Any] = {"case": case, "order": list(order)}
                for arm in order:
                    samples = arms[arm].block(case, repetitions)
                    valid = [one for one in samples if one["void"] is None]
                    block[arm] = medians([sample_figures(one, requests) for one in valid]) if valid else None
                    if (clock := clocks.of_block(valid)) is not None:
                        block.setdefault("clocks", {})[arm] = clock
                measured.append(block)
    return {"seconds": time.monotonic() - began, "seed": seed, "blocks": measured}


def pair_slowdown(pair: Pair, figure: str, cases: Sequence[str], arm: str) -> float:
    """The log slow-down of `arm` ("candidate" or "control") against the baseline in one pair: for each case the
    trimmed mean over its blocks, then the mean over the cases, which is the geometric mean of their ratios.

    Raises ComparisonError where a case has no block that both measured.
    """
    means = []
    for case in cases:
        ratios = [
            slowdown(figure, block["baseline"][figure], block[arm][figure])
            for block in pair["blocks"]
            if block["case"] == case and _has(block, arm, figure) and _has(block, "baseline", figure)
        ]
        if not ratios:
            raise ComparisonError(f"{case}: {figure}: no valid block in a pair; look at worker.log")
        means.append(trimmed_mean(ratios))
    return statistics.fmean(means)


def pair_value(pairs: Sequence[Pair], figure: str, cases: Sequence[str], arm: str) -> float:
    """The figure itself, for showing: the median over all blocks of each case, then the geometric mean over cases."""
    values = {
        case: [
            block[arm][figure]
            for pair in pairs
            for block in pair["blocks"]
            if block["case"] == case and _has(block, arm, figure)
        ]
        for case in cases
    }
    return statistics.geometric_mean(statistics.median(of_case) for of_case in values.values())


def _has(block: Mapping[str, Any], arm: str, figure: str) -> bool:
    return block[arm] is not None and figure in block[arm]
