"""A traffic run for people and programs: the answer in one sentence, a table, a page with the curves. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from perfbench import exit_codes
from perfbench.report import formats, tables, words
from perfbench.report.tables import Column
from perfbench.traffic.traffic_folder import Key, Measured

LEGEND = (
    "tenants: how many send requests, on average at the same rate. of bare: as a share of the bare backbone's. seen: "
    "of how many tenants requests came. kept: the share of the requests within both targets. ttft: the time from when "
    "a request is due to its first token. itl: the time between two tokens, of all requests together. worst: of the "
    "tenants with five requests or more the one with the largest median ttft. loaded: the share of the requests whose "
    "adapter had to be brought from the host. full: requests a second with every row busy. check: how many answers "
    "were made again by definition, in a wider dtype, each with its own adapter. A p95 needs 100 values and a p99 "
    "1,000; a dash stands where there are fewer."
)
# So far apart, with other seeds, searches on one server have ended.
TIE = 1.2
_PRICED = " cost of a million: of new tokens at this load, by what an hour of the machine costs, {price:g}."
_SEARCHED = (
    "Which number is the largest hangs on a few late requests: with other seeds a search may end a fifth higher or "
    "lower, so that methods closer than that are equal."
)


@dataclass(frozen=True)
class Row:
    """One arm at one point: the one that was searched for, or each of those that were asked for. `point` None: there is
    none, because not even one tenant was served within the targets, or the arm died."""

    arm: str
    entry: Mapping[str, Any]
    point: Mapping[str, Any] | None

    @property
    def figures(self) -> Mapping[str, Any]:
        """Of all repetitions of the point, empty where there are none."""
        return (self.point or {}).get("figures") or {}


def exit_code(manifest: Mapping[str, Any]) -> int:
    """0 where every arm was measured and its answers are right, 1 where some check or request failed, 4 where an arm
    died or is missing."""
    statuses = {entry["status"] for entry in manifest["arms"].values()}
    if statuses & {"crashed", "pending"}:
        return exit_codes.FAULT
    failed = any(point.get("failed") for entry in manifest["arms"].values() for point in entry.get("points", ()))
    return exit_codes.OK if statuses == {"ok"} and not failed else exit_codes.FAILED


@dataclass(frozen=True)
class TrafficReport:
    """What traffic.json holds as a Subject of formats. `manifest` has to be printable. `measured`: every request, of
    which the page shows how things went over time."""

    manifest: Mapping[str, Any]
    measured: Mapping[Key, Measured] = field(default_factory=dict)

    @property
    def searched(self) -> bool:
        """Whether the largest number of tenants was looked for."""
        return self.manifest["scenario"]["traffic"]["tenants"] is None

    @property
    def _closed(self) -> bool:
        """Whether a request was sent when another had ended."""
        return bool(self.manifest["scenario"]["traffic"].get("in_flight"))

    def rows(self) -> list[Row]:
        """One for each line of the table."""
        found = []
        for arm, entry in self.manifest["arms"].items():
            points = entry.get("points", [])
            if self.searched:
                most = (entry.get("most_tenants") or {}).get("held")
                points = [point for point in points if point["tenants"] == most][-1:]
            found += [Row(arm, entry, point) for point in points or [None]]
        return found

    def columns(self) -> list[Column]:
        """Of the table."""
        bare = self.most_of_all().get("none")
        found = [Column("arm", lambda row: row.arm, text=True)]
        if self.searched:
            found.append(Column("tenants", lambda row: _count(_most(row)) if row.point else _none_held(row)))
            found.append(Column("of bare\n%", lambda row: _share(_most(row) / bare if bare and _is_ok(row) else None)))
        else:
            found.append(Column("tenants", lambda row: _count((row.point or {}).get("tenants"))))
        if self._closed:
            found.append(Column("in\nflight", lambda row: _count((row.point or {}).get("in_flight"))))
        found += [
            Column("requests\n/s", lambda row: _number((row.point or {}).get("rate_per_s"))),
            Column("seen", lambda row: _count(row.figures.get("tenants_seen"))),
            Column("kept\n%", lambda row: _share(row.figures.get("kept_share"))),
            Column("tokens\n/s", lambda row: _count(row.figures.get("tokens_per_s"))),
            Column("cost of\na million", lambda row: _number(self._cost_of_a_million(row))),
            Column("ttft\nms", lambda row: _number(_tail(row, "ttft_ms", "median"))),
            Column("p95", lambda row: _number(_tail(row, "ttft_ms", "p95"))),
            Column("itl\nms", lambda row: _number(_tail(row, "itl_ms", "median"))),
            Column("p99", lambda row: _number(_tail(row, "itl_ms", "p99"))),
            Column("worst\nms", lambda row: _number(row.figures.get("worst_tenant_ttft_ms"))),
            Column("loaded\n%", lambda row: _share(row.figures.get("loaded_share"))),
            Column("full\n/s", lambda row: _number(row.entry.get("throughput_per_s"))),
            Column("check", lambda row: _verdict(row.entry), text=True),
        ]
        # A closed loop has no `full`, a server over HTTP says nothing of what it loads.
        rows = self.rows()
        return [column for column in found if any(column.cell(row) != "-" for row in rows)]

    def print(self, console: Any) -> None:
        """At most 100 columns wide."""
        from rich.text import Text

        width = min(console.width, formats.WIDTH)
        for line in (self.manifest["scenario"]["question"], self.setting()):
            console.print(Text(line), width=width)
        subject = ""
        for some in tables.pieces(self.columns(), self.rows(), width):
            console.print()
            console.print(tables.grid(some, self.rows(), subject), width=width)
        for reason in self.reasons():
            console.print(Text(reason, "red"), width=width)
        console.print(Text(self.hardware(), "dim"), width=width)
        for sentence in self.answer():
            console.print(Text(sentence), width=width)
        console.print()
        console.print(Text(self.legend(), "dim"), width=width)

    def markdown(self) -> str:
        """The same as Markdown."""
        lines = [self.manifest["scenario"]["question"], "", tables.plain(self.setting()), ""]
        lines += tables.markdown(self.columns(), self.rows())
        lines += ["", *map(tables.plain, [*self.reasons(), self.hardware(), *self.answer()]), "", self.legend()]
        return "\n".join(lines) + "\n"

    def records(self) -> list[dict[str, Any]]:
        """A flat row for every point that was measured."""
        found = []
        for arm, entry in self.manifest["arms"].items():
            for point in entry.get("points", []):
                figures = point["figures"] or {}
                flat = {name: figures.get(name) for name in _PLAIN}
                for name in _WITH_TAILS:
                    flat |= {f"{name}_{tail}": (figures.get(name) or {}).get(tail) for tail in ("median", "p95", "p99")}
                found.append({
                    "arm": arm, "method": entry["method"], "status": entry["status"], "tenants": point["tenants"],
                    "in_flight": point.get("in_flight"), "rate_per_s": point["rate_per_s"], "held": point["held"],
                    **flat,
                })  # fmt: skip
        return found

    def page(self) -> str:
        """The answer, the most tenants of each arm, the curves of what requests waited, and how things went over
        time."""
        from perfbench.traffic.traffic_page import page_of

        return page_of(self)

    def setting(self) -> str:
        """What was asked for, in a line."""
        scenario = self.manifest["scenario"]
        server, targets, traffic = scenario["server"], scenario["targets"], scenario["traffic"]
        mix = "uniform" if traffic["zipf_exponent"] is None else f"Zipf {traffic['zipf_exponent']:g}"
        mix = "one after the other of the" if traffic.get("in_turn") else mix
        by = f"{server['rows']} rows, {server['resident']} resident adapters"
        if scenario.get("target") is not None:
            version = self.manifest.get("server_version")
            by = f"a server over HTTP at {scenario['target']['openai']}{f', version {version}' if version else ''}"
        return (
            f"{scenario['backbone']} {scenario['dtype']} {scenario['device']} {scenario['kernels']}; {by}; "
            f"prompts {_lengths(traffic['prompt_tokens'])}, new {_lengths(traffic['new_tokens'])}, "
            f"{traffic['arrivals']} arrivals, {mix} tenants; targets: {targets['ttft_ms']:g} ms to the first token and "
            f"{targets['itl_ms']:g} ms between tokens, on average, for {100 * targets['share']:g}% of the requests"
        )

    def hardware(self) -> str:
        """On what, and how many requests."""
        environment, traffic = self.manifest["environment"], self.manifest["scenario"]["traffic"]
        here = words.machine(environment, self.manifest["scenario"]["device"])
        repetitions = self.manifest["scenario"]["repetitions"]
        return (
            f"On {here}; {repetitions} x {traffic['requests']} requests for each point, the first and the last "
            f"tenth of which are not counted.{words.busy(environment)}{self._client()}"
        )

    def _client(self) -> str:
        """How late our side sent its requests, where it sent them over HTTP."""
        points = [point for entry in self.manifest["arms"].values() for point in entry.get("points", ())]
        lags = [point["client_lag_ms"] for point in points if point.get("client_lag_ms") is not None]
        if not lags:
            return ""
        return f" The client sent 99% of its requests at most {_number(max(lags))} ms late, which their times include."

    def legend(self) -> str:
        """How to read the table."""
        price = self.manifest["scenario"].get("price_per_hour")
        text = LEGEND + (_PRICED.format(price=price) if price else "")
        return f"{text} {_SEARCHED}" if self.searched else text

    def answer(self) -> Iterator[str]:
        """What the reader wanted to know, of the arms whose answers were proved."""
        if self.searched:
            yield from self._most_tenants()
            return
        measured = [row for row in self.rows() if row.point is not None and _is_ok(row)]
        missed = [row for row in measured if row.point is not None and not row.point["held"]]
        if self._closed:
            yield from self._beside_bare(measured)
        if missed:
            where = "; ".join(_where(row) for row in missed)
            yield f"The targets were missed by {where}."
        elif measured:
            of = f" by {', '.join(dict.fromkeys(row.arm for row in measured))}"
            yield f"The targets were held everywhere{'' if len(measured) == len(self.rows()) else of}."

    def _beside_bare(self, measured: Sequence[Row]) -> Iterator[str]:
        """What adapters leave of the bare backbone's tokens a second, at each number of requests in flight."""
        bare = {_load(row): row.figures["tokens_per_s"] for row in measured if row.arm == "none" and row.figures}
        for row in measured:
            if row.arm != "none" and row.figures and bare.get(_load(row)):
                tokens = row.figures["tokens_per_s"]
                share = tokens / bare[_load(row)]
                tenants, in_flight = _load(row)
                yield (
                    f"{row.arm}: {tokens:,.0f} tokens/s with {in_flight:,} requests in flight of {tenants:,} tenants, "
                    f"{share:.1%} of the bare backbone's."
                )

    def _cost_of_a_million(self, row: Row) -> float | None:
        """New tokens, in the currency of the price; None without a price, or where no tokens were counted."""
        price, tokens_per_s = self.manifest["scenario"].get("price_per_hour"), row.figures.get("tokens_per_s")
        return price / 3600 / tokens_per_s * 1e6 if price and tokens_per_s else None

    def most_of_all(self) -> dict[str, int]:
        """Arm -> the most tenants that it held, 0 for none at all, of the arms whose answers were proved."""
        return {row.arm: _most(row) for row in self.rows() if _is_ok(row) and row.entry.get("most_tenants")}

    def _most_tenants(self) -> Iterator[str]:
        traffic, targets = self.manifest["scenario"]["traffic"], self.manifest["scenario"]["targets"]
        found = self.most_of_all()
        held = {arm: most for arm, most in found.items() if most and arm != "none"}
        best = max(held, key=lambda arm: held[arm], default=None)
        if best is not None:
            bare = f", {held[best] / found['none']:.0%} of the bare backbone's" if found.get("none") else ""
            yield (
                f"{best} serves most tenants within {targets['ttft_ms']:g} ms to the first token and "
                f"{targets['itl_ms']:g} ms between tokens: {self._bracket(best)}, each at "
                f"{traffic['rate_per_tenant']:g} requests/s on average{bare}."
            )
            ties = [arm for arm in held if arm != best and held[arm] * TIE >= held[best]]
            if ties:
                yield f"One search can't tell {best} from {' and '.join(ties)}, within a fifth of it."
        rest = [arm for arm, most in found.items() if most and arm != best]
        if rest:
            others = "; ".join(f"{arm} {self._bracket(arm)}" for arm in rest)
            yield f"{'Without adapters' if best is None else 'The others'}: {others}."
        none = [arm for arm, most in found.items() if not most]
        if none:
            least = "; ".join(f"{arm} not even with {self._failed(arm):,} tenants" for arm in none)
            yield f"The targets were missed at every load that was tried: {least}."

    def _failed(self, arm: str) -> int | None:
        failed: int | None = self.manifest["arms"][arm]["most_tenants"]["failed"]
        return failed

    def _bracket(self, arm: str) -> str:
        """The largest number that held, and the smallest that did not."""
        held, failed = self.manifest["arms"][arm]["most_tenants"]["held"], self._failed(arm)
        return f"{held:,}" if failed is None else f"{held:,} ({failed:,} missed)"

    def reasons(self) -> Iterator[str]:
        """Why arms have no figures, or none to be trusted."""
        for arm, entry in self.manifest["arms"].items():
            reason = entry.get("reason") or (entry.get("proof") or {}).get("reason")
            if reason:
                yield f"{arm}: {entry['status']}: {reason}"
            for point in entry.get("points", ()):
                if failed := point.get("failed"):
                    where = f"{arm} with {point['tenants']:,} tenants at {_number(point['rate_per_s'])} requests/s"
                    yield f"{where}: {failed['requests']:,} requests failed, the first so: {failed['first']}"


_PLAIN = (
    "counted", "kept_share", "goodput_per_s", "tokens_per_s", "tenants_seen", "worst_tenant_ttft_ms", "fairness",
    "loaded_share", "wait_growth_ms",
)  # fmt: skip
_WITH_TAILS = ("ttft_ms", "itl_ms", "total_ms", "wait_ms")


def _most(row: Row) -> int:
    return int((row.entry.get("most_tenants") or {}).get("held", 0))


def _tail(row: Row, name: str, tail: str) -> float | None:
    found: float | None = (row.figures.get(name) or {}).get(tail)
    return found


def _is_ok(row: Row) -> bool:
    return bool(row.entry["status"] == "ok")


def _none_held(row: Row) -> str:
    """Fewer than the smallest number that was tried; a dash where nothing was."""
    failed = (row.entry.get("most_tenants") or {}).get("failed")
    return "-" if failed is None else f"< {failed:,}"


def _load(row: Row) -> tuple[int, int]:
    """(tenants, requests in flight) of a closed loop."""
    point = row.point or {}
    return point.get("tenants", 0), point.get("in_flight", 0)


def _where(row: Row) -> str:
    point = row.point or {}
    return f"{row.arm} with {point['tenants']:,} tenants at {_number(point['rate_per_s'])} requests/s"


def _verdict(entry: Mapping[str, Any]) -> str:
    words = {"ok": "ok", "check_failed": "FAILED", "check_void": "void", "not_proved": "not proved"}
    proved = (entry.get("proof") or {}).get("requests")
    word = words.get(entry["status"], entry["status"])
    return f"{word} ({proved})" if proved else str(word)


def _lengths(lengths: Mapping[str, Any]) -> str:
    return f"{lengths['median']}" if not lengths["sigma"] else f"about {lengths['median']} (at most {lengths['most']})"


def _number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
