"""`perfbench traffic`: the parent process, which decides what is measured next and writes what the child finds. Free of
torch.

Of each arm the throughput is measured first with every row busy: there a search for the most tenants begins. Then the
arms take turns, a measurement each, so that what changes on the machine meanwhile touches all of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perfbench import __version__
from perfbench.errors import PerfbenchError, RunDirectoryError
from perfbench.files.paths import stamped
from perfbench.machine import environment
from perfbench.measure.children import WORKER_LOG, Child
from perfbench.measure.run import cause
from perfbench.progress import RunProgress
from perfbench.serving.extra import need
from perfbench.spec import cases, method_plugins
from perfbench.spec.traffic import TrafficScenario, points_of
from perfbench.traffic import outcome
from perfbench.traffic.requests import Due, all_at_once, draw
from perfbench.traffic.search import Found, search
from perfbench.traffic.started_server import LOG, started
from perfbench.traffic.traffic_folder import SCHEMA_VERSION, Key, Measured, TrafficFolder

WORKER = "perfbench.traffic.on_device.traffic_worker"
# All requests at once: so many times the rows, and so many to warm up.
FULL_ROUNDS, WARM_ROUNDS = 6, 2
# Where the search begins: a server at this share of its throughput still answers. At the least share hardly anybody
# waits: what misses the targets there misses them with a single tenant, whose requests would take hours to come.
FIRST_LOAD, LEAST_LOAD = 0.6, 0.06
# The rate of a measurement in which all requests are there from the start.
AT_ONCE = 0.0
# What the child says of an arm when it prepares it.
_OF_THE_ARM = ("bytes_per_tenant", "bank_bytes", "rows_bytes", "cache_bytes")


class ChildDied(Exception):
    """The child process ended in the middle of a job."""


def default_out(scenario: TrafficScenario) -> Path:
    """`runs/<scenario>-<UTC time>`."""
    return stamped(scenario.common.name)


def manifest_of(scenario: TrafficScenario) -> dict[str, Any]:
    """The traffic.json of a run in which nothing has been measured yet."""
    return {
        "schema_version": SCHEMA_VERSION,
        "perfbench_version": __version__,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished_at": None,
        "scenario": scenario.to_json(),
        "environment": environment.collect(scenario.common.device, environment.threads()),
        "backbone": None,
        "plugins": method_plugins.as_json(),
        "arms": {case.arm: {"method": case.method, "status": "pending"} for case in scenario.comparison.cases},
    }


def execute(scenario: TrafficScenario, out: Path, *, resume: bool) -> TrafficFolder:
    """Measures what is not measured yet into the folder `out`. PerfbenchError for what can't be measured."""
    if scenario.target is not None:
        need("target: a server over HTTP")
    fresh = manifest_of(scenario)
    if resume:
        folder = TrafficFolder.open(out)
        old, new = (
            {**one["scenario"], "plugins": one.get("plugins"), "notes": None} for one in (folder.manifest, fresh)
        )
        changed = [name for name in new if old.get(name) != new[name]]
        changed += ["arms"] if list(folder.manifest["arms"]) != list(fresh["arms"]) else []
        if changed:
            raise RunDirectoryError(f"{out}: holds a run with other {changed[0]}; measure with another --out")
        folder.manifest["finished_at"] = None
    else:
        folder = TrafficFolder.create(out, fresh)
    with RunProgress(_steps(scenario)) as progress:
        session = Session(scenario, folder, progress)
        try:
            with _server(scenario, folder, progress):
                session.run()
        except PerfbenchError:
            if not resume and not folder.measured and not (out / LOG).exists():
                shutil.rmtree(out, ignore_errors=True)
            raise
        finally:
            session.end()
    return folder


@contextmanager
def _server(scenario: TrafficScenario, folder: TrafficFolder, progress: RunProgress) -> Iterator[None]:
    """The target's own server, where the scenario says how to start it; notes its version."""
    if scenario.target is None:
        yield
        return
    with started(scenario.target, folder.path, progress) as version:
        folder.manifest["server_version"] = version
        yield


def _steps(scenario: TrafficScenario) -> int:
    """About how many measurements there will be; a search takes some eight of them, the last ones twice."""
    points = 10 if scenario.traffic.tenants is None else len(points_of(scenario.traffic)) * scenario.repetitions
    return len(scenario.comparison.cases) * (2 + points)


@dataclass
class Plan:
    """What is still to be measured of an arm: a generator of keys that is sent what each gave."""

    arm: str
    steps: Generator[Key, Measured, None]
    wanted: Key | None = None


class Session:
    """One run over one child process, or another where that one died."""

    def __init__(self, scenario: TrafficScenario, folder: TrafficFolder, progress: RunProgress):
        self.scenario, self.folder, self.progress = scenario, folder, progress
        self._child: Child | None = None
        self._prepared: set[str] = set()
        self._answering: set[str] = set()  # of which arms the child has answers

    def run(self) -> None:
        """Every arm to its end, the arms taking turns."""
        plans = [Plan(case.arm, self._plan(case.arm)) for case in self.scenario.comparison.cases]
        for plan in plans:
            plan.wanted = next(plan.steps)
        while plans:
            for plan in list(plans):
                assert plan.wanted is not None
                try:
                    plan.wanted = plan.steps.send(self._measured(plan.wanted))
                except StopIteration:
                    plans.remove(plan)
                except ChildDied as died:
                    self._arm(plan.arm).update(status="crashed", reason=str(died))
                    self._forget()
                    plans.remove(plan)
                self.folder.write()
        self.folder.manifest["finished_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        self.folder.write()

    def end(self) -> None:
        """Ends the child process."""
        if self._child is not None:
            self._child.end()

    def _arm(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.folder.manifest["arms"][name]
        return found

    def _plan(self, arm: str) -> Generator[Key, Measured, None]:
        """Throughput with all rows busy, then the search or the points, then the proof of the last answers."""
        entry, traffic = self._arm(arm), self.scenario.traffic
        proof = entry.get("proof")
        for name in set(entry) - {"method", *_OF_THE_ARM}:
            del entry[name]
        entry.update(status="pending", points=[])
        # In a search, so many that adapters come and go.
        most = max(traffic.tenants or (2 * self.scenario.server.resident,))
        throughput = 0.0
        if not traffic.in_flight:  # a closed loop is such a measurement itself
            full = yield Key(arm, most, AT_ONCE, 0)
            assert full.answered is not None
            entry["throughput_per_s"] = throughput = outcome.throughput_per_s(full.answered)
        if traffic.tenants is None:
            assert traffic.rate_per_tenant is not None
            most_at_all = throughput / traffic.rate_per_tenant
            loads = round(FIRST_LOAD * most_at_all), max(1, round(LEAST_LOAD * most_at_all))
            found = yield from self._search(arm, *loads)
            entry["most_tenants"] = asdict(found)
        else:
            for tenants, rate, in_flight in points_of(traffic):
                yield from self._point(arm, tenants, rate, in_flight, give_up=False)
        if arm in self._answering or proof is None:
            if arm not in self._answering:  # of a run that goes on all may be known but this
                self._full(Key(arm, most, AT_ONCE, 0))
            proof = self._job(arm, {"do": "prove", "arm": arm})["proof"]
        entry["proof"] = proof
        entry["status"] = proof["status"]
        lags = [point["client_lag_ms"] for point in entry["points"] if point.get("client_lag_ms") is not None]
        late = outcome.late_client(max(lags, default=0.0), self.scenario.targets)
        if entry["status"] == "ok" and late is not None:
            entry.update(status="check_void", reason=late)

    def _search(self, arm: str, start: int, least: int) -> Generator[Key, Measured, Found]:
        asked = search(start, least)
        tenants = next(asked)
        while True:
            rate = tenants * (self.scenario.traffic.rate_per_tenant or 0.0)
            held = yield from self._point(arm, tenants, rate, 0, give_up=True)
            try:
                tenants = asked.send(held)
            except StopIteration as ended:
                found: Found = ended.value
                return found

    def _point(
        self, arm: str, tenants: int, rate: float, in_flight: int, *, give_up: bool
    ) -> Generator[Key, Measured, bool]:
        """All repetitions of a point, or those up to the first that misses the targets where that is the question."""
        targets = self.scenario.targets
        point: dict[str, Any] = {"tenants": tenants, "rate_per_s": rate, "held": True, "repetitions": []}
        whole: list[list[outcome.Answered]] = []
        failed: list[list[Any]] = []
        lags: list[float] = []
        for repetition in range(self.scenario.repetitions):
            found = yield Key(arm, tenants, rate, repetition, in_flight)
            missing = len(found.failed)
            share = None if found.answered is None else outcome.kept_share(found.answered, targets, missing)
            point["repetitions"].append({"sent": found.sent, "kept_share": share, "loaded_bytes": found.loaded_bytes})
            failed += found.failed
            lags += found.lag_ms or []
            if found.answered is not None:
                whole.append(found.answered)
            point["held"] &= found.answered is not None and outcome.held(found.answered, targets, missing)
            if give_up and not point["held"]:
                break
        # Of a point of which a part was given up, the other part alone would look better than it was.
        complete = len(whole) == len(point["repetitions"])
        point["figures"] = outcome.figures(whole, targets, len(failed), closed=bool(in_flight)) if complete else None
        if in_flight:  # whose rate is what came of it
            point |= {"in_flight": in_flight, "rate_per_s": (point["figures"] or {}).get("requests_per_s", 0.0)}
        if self.scenario.target is not None:
            point["client_lag_ms"] = outcome.high(lags)
            point["failed"] = {"requests": len(failed), "first": failed[0][2]} if failed else None
        self._arm(arm)["points"].append(point)
        return bool(point["held"])

    def _measured(self, key: Key) -> Measured:
        """What is known of a measurement, or what the child finds."""
        known = self.folder.measured.get(key)
        if known is None:
            known = self._measure(key)
            self.folder.add(key, known)
        self.progress.advance()
        return known

    def _measure(self, key: Key) -> Measured:
        scenario = self.scenario
        seed = f"{scenario.common.seed}/{key.repetition}"
        if key.rate == AT_ONCE and not key.in_flight:
            return self._full(key)
        due = draw(scenario.traffic, key.tenants, key.rate, seed)
        searched = scenario.traffic.tenants is None
        misses = outcome.most_misses(len(outcome.counted_places(len(due))), scenario.targets) if searched else None
        load = f"{key.in_flight:,} requests in flight" if key.in_flight else f"{key.rate:,.3g} requests/s"
        return self._requests(key, due, f"{key.tenants:,} tenants, {load}", misses)

    def _full(self, key: Key) -> Measured:
        """With every row busy."""
        count = FULL_ROUNDS * self.scenario.server.rows
        due = all_at_once(self.scenario.traffic, key.tenants, count, f"{self.scenario.common.seed}/full")
        return self._requests(key, due, "all rows busy", None)

    def _requests(self, key: Key, due: list[Due], text: str, misses: int | None) -> Measured:
        job = {
            "do": "measure",
            "arm": key.arm,
            "due": [[one.due_s, one.tenant, one.prompt_tokens, one.new_tokens] for one in due],
            "seed": self.scenario.common.seed * 1000 + key.repetition,
            "targets": asdict(self.scenario.targets),
            "misses": misses,
            "in_flight": key.in_flight,
            "text": text,
        }
        found = self._job(key.arm, job)
        answered = found["answered"]
        if answered is not None:
            self._answering.add(key.arm)
            answered = [outcome.Answered.of(one) for one in answered]
        return Measured(answered, found["sent"], found["loaded_bytes"], found["lag_ms"], found["failed"])

    def _job(self, arm: str, job: dict[str, Any]) -> dict[str, Any]:
        """What the child answers to a job about an arm, which is prepared first where it is not there yet."""
        if self._child is None:
            self._child = Child(WORKER, self.folder.path / WORKER_LOG)
            for event in self._events(self._opening()):
                if event["event"] == "backbone":
                    self.folder.manifest["backbone"] = {name: event[name] for name in ("parameters", "bytes")}
        if arm not in self._prepared:
            most = max(self.scenario.traffic.tenants or (0,))
            for event in self._events({"do": "prepare", "arm": arm, "tenants": most}):
                self._arm(arm).update({name: event[name] for name in _OF_THE_ARM})
            self._prepared.add(arm)
            # Whatever is measured first in a process would be measured cold.
            tenants = most or 2 * self.scenario.server.resident
            due = all_at_once(self.scenario.traffic, tenants, WARM_ROUNDS * self.scenario.server.rows, "warm")
            self._requests(Key(arm, tenants, AT_ONCE, 0), due, "warming up", None)
        (found,) = self._events(job)
        return found

    def _opening(self) -> dict[str, Any]:
        scenario = self.scenario
        return {
            "comparison": cases.to_json(scenario.comparison),
            "target": None if scenario.target is None else asdict(scenario.target),
            "seed": scenario.common.seed,
            "threads": environment.threads(),
            "plugins": method_plugins.as_json(),
            "rows": scenario.server.rows,
            "resident": scenario.server.resident,
            "capacity": scenario.server.capacity(scenario.traffic),
            "chunk": scenario.server.chunk_tokens,
        }

    def _events(self, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What the child says to a job, but for phases, which are shown. ChildDied where it ends before `done`."""
        assert self._child is not None
        found: list[dict[str, Any]] = []
        for event in self._child.events(job, last=False):
            if event["event"] == "phase":
                self.progress.say(event["case"] or self.scenario.comparison.backbone, event["text"])
            elif event["event"] == "error":
                if event["kind"] == "bad_input":
                    raise PerfbenchError(event["message"])
                raise ChildDied(event["message"])
            elif event["event"] == "done":
                return iter(found)
            else:
                found.append(event)
        raise ChildDied(cause(self._child.end()))

    def _forget(self) -> None:
        """After the child's death: the next job starts another, which prepares its arms anew."""
        self.end()
        self._child, self._prepared, self._answering = None, set(), set()
