"""`perfbench run`: the parent process. It starts one child for each job, writes what the child reports, and
starts a child again without the case that killed it. Free of torch.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perfbench import __version__
from perfbench.errors import PerfbenchError, RunDirectoryError
from perfbench.machine import environment
from perfbench.measure.children import WORKER_LOG, Children, NodeLost
from perfbench.progress import RunProgress
from perfbench.report import words
from perfbench.run_folder.run_directory import SCHEMA_VERSION, RunDirectory, pending_case
from perfbench.spec import cases, method_plugins
from perfbench.spec.cases import Case, Comparison
from perfbench.spec.scenario import Scenario

# How a case ends that is not measured again by a resumed run.
DIED = ("crashed", "out_of_memory")
FINAL = ("check_failed", "check_void", *DIED)
# A job whose machines are lost so often is not tried once more.
MOST_LOSSES = 10


def manifest_of(scenario: Scenario, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The run.json of a run in which nothing has been measured yet."""
    return {
        "schema_version": SCHEMA_VERSION,
        "perfbench_version": __version__,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished_at": None,
        "scenario": scenario.to_json(),
        "environment": environment.collect(scenario.device, environment.threads()),
        "processes": 0,
        "plugins": method_plugins.as_json(),
        "comparisons": [
            {key: value for key, value in cases.to_json(comparison).items() if key != "cases"}
            | {"case_ids": [case.id for case in comparison.cases]}
            | {"backbone_parameters": None, "backbone_bytes": None, "roof": None}
            for comparison in comparisons
        ],
        "cases": {
            case.id: pending_case(case.id, comparison.id, case.arm, case.method, asdict(case.options), case.kernels)
            for comparison in comparisons
            for case in comparison.cases
        },
    }


def execute(
    scenario: Scenario,
    comparisons: Sequence[Comparison],
    out: Path,
    *,
    resume: bool,
    retry_failed: bool = False,
    only: Collection[str] | None = None,
    children: Children | None = None,
) -> RunDirectory:
    """Measures what is not measured yet, into the run directory `out`, and summarises it.

    retry_failed: of a resumed run the cases that crashed or ran out of memory are measured again, which may have been
    another program's doing. only: the ids of the comparisons to measure now, by default all of them; the others stay
    pending. children: where the child processes come from, by default a fresh one for each job.
    RunDirectoryError where `out` can't be used; any PerfbenchError that a child finds in its input: then a new
    directory without samples is removed again.
    """
    if resume:
        directory = RunDirectory.open(out)
        _same_plan(directory, manifest_of(scenario, comparisons))
        if retry_failed:
            _make_pending(directory.manifest["cases"], manifest_of(scenario, comparisons)["cases"])
            directory.write_manifest()
    else:
        directory = RunDirectory.create(out, manifest_of(scenario, comparisons))
    directory.manifest["finished_at"] = None
    chosen = [one for one in comparisons if only is None or one.id in only]
    jobs = list(_jobs(chosen, scenario.isolation))
    if children is None or (children.keeps and (scenario.isolation != "shared" or scenario.processes > 1)):
        children = Children()  # a kept child would be no fresh process
    arms = sum(len(_cases_of(job)) for job in jobs)
    try:
        with RunProgress(arms * (1 + scenario.rounds)) as progress:
            _run_all(jobs, children, lambda job: Supervisor(directory, scenario, progress, children).run(job))
    except PerfbenchError:
        if not resume and not directory.samples():
            shutil.rmtree(out, ignore_errors=True)
        raise
    if only is None or all(case["status"] != "pending" for case in directory.manifest["cases"].values()):
        directory.manifest["finished_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    directory.summarise()
    directory.write_manifest()
    return directory


def _run_all(jobs: Sequence[Job], children: Children, run: Callable[[Job], None]) -> None:
    """Every job, as many at once as there may be children; the first error, or Ctrl-C, ends them all."""
    if children.at_once == 1:
        for job in jobs:
            run(job)
        return
    with ThreadPoolExecutor(children.at_once) as pool:
        under_way = [pool.submit(run, job) for job in jobs]
        try:
            for done in as_completed(under_way):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
            raise


def _make_pending(known: dict[str, Any], fresh: dict[str, Any]) -> None:
    """Of the cases that died, forgets all but their samples."""
    known |= {case_id: fresh[case_id] for case_id, case in known.items() if case["status"] in DIED}


def _same_plan(directory: RunDirectory, fresh: dict[str, Any]) -> None:
    """RunDirectoryError where the directory holds a run of something else."""

    def settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in manifest["scenario"].items() if key != "notes"}

    old = directory.manifest
    for what, same in (
        ("settings", settings(old) == settings(fresh)),
        ("cases", sorted(old["cases"]) == sorted(fresh["cases"])),
        ("plugins", old.get("plugins", []) == fresh["plugins"]),
    ):
        if not same:
            raise RunDirectoryError(f"{directory.path}: holds a run of other {what}; run with another --out")


# The comparisons, or parts of them, whose cases take turns in one child process.
Job = tuple[Comparison, ...]


def _jobs(comparisons: Sequence[Comparison], isolation: str) -> Iterator[Job]:
    """What one child measures: all comparisons that differ in nothing but the runtime, so that runtimes too take
    turns; or, isolated, one arm of a comparison beside the bare backbone."""
    if isolation == "shared":
        alike: dict[Any, list[Comparison]] = {}
        for comparison in comparisons:
            key = replace(comparison, id="", runtime="", cases=())
            alike.setdefault(key, []).append(comparison)
        yield from map(tuple, alike.values())
        return
    for comparison in comparisons:
        bare = {case.kernels: case for case in comparison.cases if case.method == "none"}
        others = [case for case in comparison.cases if case.method != "none"]
        for case in others:
            yield (replace(comparison, cases=(bare[case.kernels], case)),)
        if not others:
            yield (comparison,)


def _cases_of(job: Job) -> list[Case]:
    return [case for comparison in job for case in comparison.cases]


class Supervisor:
    """Brings one job to its end, through as many children as it takes."""

    def __init__(self, directory: RunDirectory, scenario: Scenario, progress: RunProgress, children: Children):
        self.directory = directory
        self.scenario = scenario
        self.progress = progress
        self.children = children
        self.in_flight: str | None = None
        self.losses = 0

    @property
    def _cases(self) -> dict[str, Any]:
        found: dict[str, Any] = self.directory.manifest["cases"]
        return found

    def run(self, job: Job) -> None:
        """Until every case of the job is measured or has failed for good."""
        if self.children.at_once == 1:  # here, and not on the nodes of a cluster, which say themselves what they are
            for entry in self._comparisons(job):
                if "machine" in entry:
                    self._expect_same_machine(entry, environment.collect(self.scenario.device, environment.threads()))
        self.progress.already(sum(len(done) for done in self._done(job).values()))
        for first in range(0, self.scenario.rounds, self.scenario.repetitions):
            self._measure(job, range(first, first + self.scenario.repetitions))
        with self.directory.lock:
            for case in _cases_of(job):
                if self._cases[case.id]["status"] == "pending" and self._cases[case.id]["check"]:
                    self._cases[case.id]["status"] = "ok"
            self.directory.write_manifest()

    def _measure(self, job: Job, rounds: range) -> None:
        """The `rounds` of one fresh process; of several, where a case killed one."""
        while alive := [case for case in _cases_of(job) if self._cases[case.id]["status"] not in FINAL]:
            timed = all(done >= set(rounds) for done in self._done(job).values())
            if timed and all(self._cases[case.id]["exact"] and self._is_proved(case.id) for case in alive):
                return
            left = (replace(one, cases=tuple(case for case in one.cases if case in alive)) for one in job)
            try:
                ended = self._child(tuple(one for one in left if one.cases), rounds)
            except NodeLost as lost:
                self._lost(job, lost)
                continue
            if ended is None:
                return
            self._fail(alive, *ended)

    def _lost(self, job: Job, lost: NodeLost) -> None:
        """A machine that is gone is no fault of the case in flight: the job goes on elsewhere, with what it has."""
        self.losses += 1
        if self.losses > MOST_LOSSES:
            raise PerfbenchError(f"{job[0].id}: its machine was lost {self.losses} times ({lost}); go on with --resume")
        self.progress.warn(f"{job[0].id}: its machine was lost ({lost}); it goes on elsewhere")

    def _done(self, job: Job) -> dict[str, set[int]]:
        """Case id -> the rounds of which there is a sample, for the cases that can still be measured.

        Isolated, the bare backbone goes along with its arm: what it did beside another arm does not count.
        """
        rounds: dict[str, set[int]] = {
            case.id: set() for case in _cases_of(job) if self._cases[case.id]["status"] not in FINAL
        }
        with self.directory.lock:
            samples = self.directory.samples()
        for sample in samples:
            if sample["case"] in rounds:
                rounds[sample["case"]].add(sample["round"])
        if self.scenario.isolation != "shared" and len(_cases_of(job)) == 2:
            bare, arm = (case.id for case in _cases_of(job))
            if bare in rounds and arm in rounds:
                rounds[bare] &= rounds[arm]
        return rounds

    def _child(self, job: Job, rounds: range) -> tuple[str, str] | None:
        """One child process. None when it came to its end, else (status, reason) of the case in flight."""
        child, process_number = self.children.take(self.directory)
        self.in_flight = None
        error: dict[str, Any] | None = None
        heard = False
        try:
            for event in child.events(self._job_json(job, rounds), last=not self.children.keeps):
                heard = True
                if event["event"] == "error":
                    error = event
                elif event["event"] == "done":
                    self.children.give_back(child)
                    return None
                else:
                    with self.directory.lock:
                        self._take(event, job, process_number)
        except BaseException:
            child.end()
            raise
        code = child.end()
        if not heard and child.jobs > 1:  # a kept child that had died before this job began
            return self._child(job, rounds)
        if error is not None:
            if error["kind"] == "bad_input":
                raise PerfbenchError(error["message"])
            return error["kind"], error["message"]
        return "crashed", cause(code, os.path.relpath(child.log, self.directory.path))

    def _is_proved(self, case_id: str) -> bool:
        """Whether of a case some of what was timed has been made again, and its folders were read with PEFT."""
        case = self._cases[case_id]
        wanted = {"proved_rounds"} | ({"read_by_peft"} if case["options"].get("adapters") else set())
        return wanted <= set(case["check"] or {})

    def _job_json(self, job: Job, rounds: range) -> dict[str, Any]:
        prepared = {
            case.id: "ok" if self._cases[case.id]["status"] == "pending" else self._cases[case.id]["status"]
            for case in _cases_of(job)
            if self._cases[case.id]["check"]
        }
        return {
            "comparisons": [cases.to_json(comparison) for comparison in job],
            "prepared": prepared,
            "proved": [case.id for case in _cases_of(job) if self._is_proved(case.id)],
            "counted": [case.id for case in _cases_of(job) if self._cases[case.id]["exact"]],
            "done": {case_id: sorted(rounds) for case_id, rounds in self._done(job).items()},
            "warmup": self.scenario.warmup,
            "rounds": list(rounds),
            "last_round": self.scenario.rounds - 1,
            "seed": self.scenario.seed,
            "threads": environment.threads(),
            "plugins": method_plugins.as_json(),
        }

    def _take(self, event: dict[str, Any], job: Job, process_number: int) -> None:
        """Writes down what one event says."""
        kind = event.pop("event")
        if kind == "phase":
            self.in_flight = event["case"]
            self.progress.say(event["case"] or job[0].id, event["text"])
        elif kind == "sample":
            self.directory.append_sample({**event, "process": process_number})
            self.progress.advance()
        elif kind == "machine":
            for entry in self._comparisons(job):
                self._expect_same_machine(entry, event["environment"])
                entry["machine"] = event["environment"]
            self.directory.write_manifest()
        elif kind == "backbone":
            for entry in self._comparisons(job):
                entry["backbone_parameters"], entry["backbone_bytes"] = event["parameters"], event["bytes"]
                entry["roof"] = event["roof"]
            self.directory.write_manifest()
        elif kind == "case":
            case_id, status = event.pop("case"), event.pop("status")
            # A passed check is not yet a measured case: that it is only once its rounds are in.
            self._cases[case_id].update(event, status="pending" if status == "ok" else status)
            self.directory.write_manifest()
            self.progress.advance()
        elif kind == "proved":
            case = self._cases[event["case"]]
            known = case["check"].get("proved_rounds", [])
            case["check"] |= {"proved_rounds": sorted({*known, *event["rounds"]})}
            case["check"] |= {key: event[key] for key in ("read_by_peft", "same_tokens_as") if key in event}
            if event["reason"] is not None:
                case["check"] |= {"passed": False}
                case.update(status="check_failed", reason=event["reason"])
            self.directory.write_manifest()
        elif kind == "counted":
            self._cases[event["case"]]["exact"] = event["exact"]
            self.directory.write_manifest()

    def _comparisons(self, job: Job) -> list[Any]:
        """What run.json says of the comparisons of a job."""
        ids = {comparison.id for comparison in job}
        return [entry for entry in self.directory.manifest["comparisons"] if entry["id"] in ids]

    def _expect_same_machine(self, comparison: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """PerfbenchError where an earlier part of the comparison was measured on another kind of machine: speeds of two
        kinds are no comparison."""
        begun = any(sample["case"] in comparison["case_ids"] for sample in self.directory.samples())
        before = comparison.get("machine") or self.directory.manifest["environment"]
        first, here = (words.machine(one, comparison["device"]) for one in (before, now))
        if begun and first != here:
            raise PerfbenchError(
                f"{comparison['id']}: was begun on {first}, and would go on on {here}: speeds of unlike machines are "
                "not compared; bring the first machine back, or begin anew with another --out"
            )

    def _fail(self, alive: Sequence[Case], status: str, reason: str) -> None:
        """Marks the case in flight, or all of them where the child died before any: the backbone did not load."""
        with self.directory.lock:
            for case in alive:
                if self.in_flight in (None, case.id):
                    self._cases[case.id].update(status=status, reason=reason)
            self.directory.write_manifest()


def cause(code: int, log: str = WORKER_LOG) -> str:
    """Why a child ended without a word; `log` is where what it said last can be read."""
    if code >= 0:
        return f"the child process ended with exit code {code}; see {log}"
    name = signal.Signals(-code).name
    hint = " (out of host memory is the usual reason)" if name == "SIGKILL" else f"; see {log}"
    return f"the child process was ended by {name}{hint}"


def default_out(scenario: Scenario) -> Path:
    """`runs/<scenario>-<UTC time>`: a new folder for each run."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{scenario.name}-{stamp}"
