"""How long the parts of a turn take: at least, from a device's speeds, or as a run has measured them. Free of torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from statistics import fmean, linear_regression
from typing import Any

from perfbench.figures.roof import Device, Work, decode_step, read_piece

# One direction of PCI Express x16 with what the vendor's datasheets say of the generation: 4 of all but those here.
_PCIE_5 = {"h100": 64e9, "h200": 64e9}
_PCIE_4 = 32e9


def host_bytes_per_s(device: str) -> float:
    """At most, from the host to this device."""
    return _PCIE_5.get(device, _PCIE_4)


@dataclass(frozen=True)
class RoofTimes:
    """The least seconds on `device`. plan: of an adapter, sizes only, empty for the bare backbone; load_bytes: what a
    tenant's adapter takes; host_bytes_per_s: at which it comes from the host.

    A step's rows are taken to have the same number of tokens in the cache each, which is exact but for layers with a
    window that some rows fill and others do not.
    """

    config: Mapping[str, Any]
    dtype: str
    device: Device
    plan: Sequence[Any]
    load_bytes: int
    host_bytes_per_s: float
    origin = "roof"
    most_rows = None
    chunk_tokens = None

    def step_s(self, rows: int, tokens: int, adapters: int) -> float:
        """As `simulation.Times` has it."""
        of_row, own = self._of_length(round(tokens / rows)), self._own
        work = Work(
            weight_bytes=self._none.weight_bytes,
            cache_bytes=rows * of_row.cache_bytes,
            adapter_bytes=own.shared + rows * own.made + adapters * own.stored if adapters else 0,
            flops=rows * (of_row.flops + (own.flops if adapters else 0)),
        )
        return work.least_s(self.device, self.dtype)

    def read_s(self, tokens: int, past: int, adapter: bool) -> float:
        """As `simulation.Times` has it."""
        return self._read(tokens, past, adapter)

    def load_s(self) -> float:
        """As `simulation.Times` has it."""
        return self.load_bytes / self.host_bytes_per_s

    def _step(self, lengths: list[int], tenants: Sequence[int] = ()) -> Work:
        kinds = [(self.plan, tenants)] if self.plan and tenants else []
        return decode_step(self.config, self.dtype, prompt_tokens=lengths, generated_tokens=0, beams=1, adapters=kinds)

    @cached_property
    def _none(self) -> Work:
        return self._step([0])

    @cached_property
    def _own(self) -> _OfAdapters:
        """What adapters add to a step, from steps with one and with two of them."""
        if not self.plan:
            return _OfAdapters(0, 0, 0, 0)
        one, two, same = self._step([0], [0]), self._step([0, 0], [0, 1]), self._step([0, 0], [0, 0])
        made = same.adapter_bytes - one.adapter_bytes
        stored = two.adapter_bytes - same.adapter_bytes
        shared = one.adapter_bytes - made - stored
        return _OfAdapters(shared, stored, made, one.flops - self._none.flops)

    @cached_property
    def _of_length(self) -> Any:
        return lru_cache(maxsize=None)(lambda tokens: self._step([tokens]))

    @cached_property
    def _read(self) -> Any:
        def least(tokens: int, past: int, adapter: bool) -> float:
            work, own = read_piece(self.config, self.dtype, tokens=tokens, past=past), self._own
            if adapter:
                of_one = own.shared + own.stored + own.made
                work = replace(work, adapter_bytes=of_one, flops=work.flops + tokens * own.flops)
            return work.least_s(self.device, self.dtype)

        return lru_cache(maxsize=None)(least)


@dataclass(frozen=True)
class _OfAdapters:
    """Bytes that all adapters share, that each stores, and that are made for each row; operations of a row."""

    shared: int
    stored: int
    made: int
    flops: int


def reading_line(reads: Sequence[tuple[int, float]], steps: Mapping[int, float]) -> tuple[float, float]:
    """(seconds that reading a piece of a prompt takes at least, seconds more for each token), neither below 0, of
    (tokens, seconds): a straight line through them; where all have the same length, through them and the decode step of
    fewest rows, which reads one token."""
    if len({tokens for tokens, _ in reads}) < 2:
        reads = [*reads, (1, min(fmean(seconds for _, seconds in reads), steps[min(steps)]))]
    if len({tokens for tokens, _ in reads}) < 2:
        return fmean(seconds for _, seconds in reads), 0.0
    slope, least = linear_regression(*zip(*reads, strict=True))
    return max(0.0, least), max(0.0, slope)


@dataclass(frozen=True)
class MeasuredTimes:
    """From a run. steps: number of rows -> seconds of a decode step; between two of them a straight line is drawn,
    below the first its seconds stand. A piece of a prompt takes read_s_at_least and so many seconds more for each
    token; load: seconds to bring an adapter from the host. source: the folder, and what was measured in it;
    chunk_tokens: in what pieces prompts were read, None where each was read at once."""

    steps: Mapping[int, float]
    read_s_at_least: float
    read_s_per_token: float
    load: float
    source: str
    chunk_tokens: int | None = None
    origin = "measured"

    @property
    def most_rows(self) -> int:
        """More were not measured."""
        return max(self.steps)

    def step_s(self, rows: int, tokens: int, adapters: int) -> float:
        """As `simulation.Times` has it; of the cache's growth and of tenants that several rows share, it knows what the
        run had. ValueError for more rows than were measured."""
        return self._line[rows]

    def read_s(self, tokens: int, past: int, adapter: bool) -> float:
        """As `simulation.Times` has it."""
        return self.read_s_at_least + self.read_s_per_token * tokens

    def load_s(self) -> float:
        """As `simulation.Times` has it."""
        return self.load

    @cached_property
    def _line(self) -> list[float]:
        """By the number of rows; that of none is never asked for."""
        known = sorted(self.steps)
        found = []
        for rows in range(known[-1] + 1):
            place = bisect_left(known, rows)
            high = known[place]
            low = known[place - 1] if place else high
            part = (rows - low) / (high - low) if high > low else 0.0
            found.append(self.steps[low] + part * (self.steps[high] - self.steps[low]))
        return found
