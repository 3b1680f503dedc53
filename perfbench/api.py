"""What `import perfbench` gives, which is what the command line calls too.

Everything heavy is imported inside the functions: importing this loads the standard library alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfbench.errors import PerfbenchError

if TYPE_CHECKING:
    from perfbench.finetune.accuracy.accuracy_config import AccuracyConfig
    from perfbench.finetune.accuracy.verdict import Verdict
    from perfbench.finetune.search.search_config import SearchConfig
    from perfbench.report import read
    from perfbench.run_folder.run_schema import Manifest
    from perfbench.spec.cases import Comparison
    from perfbench.spec.scenario import Scenario
    from perfbench.spec.traffic import TrafficScenario

# A file, the name of a scenario that `perfbench list` has, or the very values of one.
Given = str | Path | Mapping[str, Any]
# `workload.tenants=4`, the value being YAML, or a mapping of such keys to plain values.
Settings = Sequence[str] | Mapping[str, Any]
Say = Callable[[str], object]


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


@dataclass(frozen=True)
class Run:
    """What `perfbench run` wrote into the folder `path`, read when it is asked for."""

    path: Path

    @cached_property
    def _read(self) -> read.Run:
        from perfbench.report.read import read_runs

        return read_runs([self.path])[0]

    @property
    def manifest(self) -> Manifest:
        """What run.json holds: scenario, environment, every case with its check and figures."""
        return self._read.manifest

    @property
    def notices(self) -> tuple[str, ...]:
        """What is odd about the run, such as void repetitions, in plain words; empty where nothing is."""
        return self._read.notices

    @property
    def exit_code(self) -> int:
        """That of `perfbench run`: 0 all cases measured, 1 some check failed, 4 some case crashed or is pending."""
        from perfbench.run_folder.run_directory import RunDirectory

        return RunDirectory(self.path, self.manifest).exit_code()

    def rows(self, *, samples: bool = False) -> list[dict[str, Any]]:
        """One flat mapping for each case: which run and what case it is, then the median of each figure under its
        metric's name, which says the unit (`ttft_ms`, `peak_allocated_bytes`); None where it was not measured. `check`
        is "ok", or why no figure stands there. `samples`: one for each valid repetition instead; `itl_ms` is then a
        list."""
        from perfbench.report.write import RunsReport, SampleRows

        return (SampleRows if samples else RunsReport)([self._read]).records()

    def to_pandas(self, *, samples: bool = False) -> Any:
        """`rows` as a pandas DataFrame. PerfbenchError where pandas is not installed: it is the extra `pandas`."""
        try:
            import pandas
        except ImportError:
            raise PerfbenchError(
                "to_pandas: needs pandas, which is not installed; pip install 'adapter-perfbench[pandas]'"
            ) from None
        return pandas.DataFrame(self.rows(samples=samples))

    def to_html(self, out: str | Path | None = None) -> str:
        """The page of `perfbench report`, which opens offline; written to the file `out` too where one is given."""
        from perfbench.files.whole import write
        from perfbench.report.write import RunsReport

        page = RunsReport([self._read]).page()
        if out is not None:
            write(Path(out), page.encode())
        return page


@dataclass(frozen=True)
class Accuracy:
    """What `perfbench accuracy` wrote into the folder `path`. `verdict`: a row for each method and each way of
    serving it; scores are shares from 0 to 1, `exit_code` is 0 pass, 1 inferior or served otherwise than trained,
    3 inconclusive."""

    path: Path
    manifest: Mapping[str, Any]
    verdict: Verdict


@dataclass(frozen=True)
class Search:
    """What `perfbench fanlora search` wrote into the folder `path`. `setting`: the file to give to FanLoRA, as in
    `methods=[{fanlora: {setting: FILE}}]`; `manifest`: what search.json holds, all scores among it."""

    path: Path
    setting: Path
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A scenario that was checked and may be measured; `work` says in words how much that is, `large` lifts limits."""

    scenario: Scenario
    comparisons: tuple[Comparison, ...]
    work: str
    large: bool = False

    @property
    def case_ids(self) -> list[str]:
        """Of everything that would be measured, in its order."""
        return [case.id for comparison in self.comparisons for case in comparison.cases]

    @property
    def default_out(self) -> Path:
        """`runs/<scenario>-<UTC time>`."""
        from perfbench.measure.run import default_out

        return default_out(self.scenario)

    def measure(
        self,
        out: Path,
        *,
        resume: bool = False,
        retry_failed: bool = False,
        cluster: str | None = None,
        say: Say = _to_stderr,
    ) -> Run:
        """Measures what is not measured yet into the folder `out`. Raises as `run`."""
        from perfbench.files import run_lock
        from perfbench.measure import inputs, needed_memory
        from perfbench.measure.run import execute

        if not self.large and cluster is None:  # the nodes' memory is not this machine's
            needed_memory.check(self.scenario, self.comparisons)
        for note in inputs.check(self.comparisons):
            say(note)
        say(f"{self.work} -> {out}")
        with run_lock.held(out, resume=resume), _children(cluster) as children:
            execute(self.scenario, self.comparisons, out, resume=resume, retry_failed=retry_failed, children=children)
        return Run(out)


@contextmanager
def _children(cluster: str | None) -> Iterator[Any]:
    """Where a run's child processes come from: this machine (None), or the nodes of the cluster at this address."""
    if cluster is None:
        yield None
        return
    from perfbench.cluster.ray_cluster import connected
    from perfbench.cluster.remote_children import RemoteChildren

    with connected(cluster) as connection:
        yield RemoteChildren(connection)


def prepare(
    scenario: Given,
    *,
    set: Settings = (),
    case: str | None = None,
    large: bool = False,
    say: Say = _to_stderr,
) -> Prepared:
    """Everything of `run` that comes before the first model is loaded. Raises as it does."""
    from perfbench.files.plain_text import format_bytes, printable
    from perfbench.machine.device import device_kind
    from perfbench.spec import cases, cost
    from perfbench.spec import scenario as scenarios

    document = scenarios.load(scenario, _settings(set))
    resolved = scenarios.resolve(document, *device_kind(document.device))
    for note in resolved.notes:
        say(printable(note))
    scenarios.check_against_backbone(resolved)
    if not case:  # of many cases a few may be chosen
        cost.check(resolved, cost.of_scenario(resolved), large=large)
    comparisons = cases.expand(resolved, large=large)
    if case:
        comparisons = cases.select(comparisons, case)
    costs = cost.of_comparisons(resolved, comparisons)
    cost.check(resolved, costs, large=large)
    work = f"{sum(len(one.cases) for one in comparisons)} cases, {resolved.repetitions} repetitions each"
    if resolved.processes > 1:
        work += f" in each of {resolved.processes} processes"
    work += f" ({costs.turns:,} turns with the warm-up, about {format_bytes(costs.file_bytes)} on disk)"
    return Prepared(resolved, comparisons, work, large)


def run(
    scenario: Given,
    *,
    set: Settings = (),
    case: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    large: bool = False,
    plugins: Sequence[str | Path] = (),
    say: Say = _to_stderr,
) -> Run:
    """Measures every case of a scenario, as `perfbench run` does, in child processes.

    scenario: a YAML file, the name of one that comes with perfbench ("multitenant"; `perfbench list` has them), or a
    mapping with what such a file holds. set: changes to it, {"workload.tenants": 4} or ["workload.tenants=4"].
    case: a glob; only cases whose id matches, and the bare backbone beside them. out: the new folder of results, by
    default runs/<scenario>-<UTC time>; with `resume` what was begun there goes on, and with `retry_failed` too, the
    cases that crashed are measured again. plugins: files of methods, as with `--plugin`. large: lifts the limits on
    cases, turns, bytes on disk and memory. say: is given each note, in a line; by default they go to standard error.

    A case that fails its check, crashes or runs out of memory is no exception: it is in the run's rows, and in its
    `exit_code`. PerfbenchError, in one line, for everything that can be mended: ScenarioError, BackboneError,
    AdapterError, RunDirectoryError (see perfbench.errors).
    """
    from perfbench.spec import method_plugins

    method_plugins.load(plugins)
    prepared = prepare(scenario, set=set, case=case, large=large, say=say)
    folder = _out(out, resume, prepared.default_out)
    return prepared.measure(folder, resume=resume, retry_failed=retry_failed, say=say)


def prepare_traffic(scenario: Given, *, set: Settings = (), say: Say = _to_stderr) -> TrafficScenario:
    """A traffic scenario that was checked and may be measured: what `perfbench traffic` does first. Arguments as those
    of `run`. ScenarioError, BackboneError."""
    from perfbench.files.plain_text import printable
    from perfbench.machine.device import device_kind
    from perfbench.spec import traffic as spec

    found = spec.load(scenario, _settings(set), device_kind)
    for note in found.common.notes:
        say(printable(note))
    spec.check_against_backbone(found)
    return found


def measure_traffic(scenario: TrafficScenario, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Measures what is not measured yet into the folder `out`, in a child process; what traffic.json then holds. An arm
    whose process dies is in it. RunDirectoryError where the folder can't be used, PerfbenchError for bad input."""
    from perfbench.files import run_lock
    from perfbench.traffic.traffic_run import execute

    with run_lock.held(out, resume=resume):
        return execute(scenario, out, resume=resume).manifest


def load(path: str | Path) -> Run:
    """The run in the folder `path`, all of it read and checked. RunDirectoryError where there is none, or one whose
    run.json or samples.jsonl is damaged."""
    found = Run(Path(path))
    _ = found.manifest
    return found


def accuracy(
    config: Given | AccuracyConfig,
    *,
    set: Settings = (),
    out: str | Path | None = None,
    resume: bool = False,
    run: str | Path | Run | None = None,
    say: Say = _to_stderr,
) -> Accuracy:
    """Trains each method on each task, asks every test item as trained and as served, and judges: `perfbench
    accuracy`.

    config: a YAML file, the name of one that comes with perfbench ("accuracy/cpu"), or what such a file holds;
    `run`: a measured run with these methods, whose speeds the page shows; the rest as in `run`. PerfbenchError, in one
    line, for what can be mended: FinetuneError, TaskError, BackboneError, AdapterError, RunDirectoryError.
    """
    from perfbench.files import run_lock
    from perfbench.files.paths import stamped
    from perfbench.finetune.accuracy import accuracy_config, accuracy_run

    if not isinstance(config, accuracy_config.AccuracyConfig):
        config = accuracy_config.load(located(config, say), _settings(set))
    folder = _out(out, resume, stamped(f"accuracy-{config.name}"))
    measured = run.path if isinstance(run, Run) else Path(run) if run else None
    with run_lock.held(folder, resume=resume):
        done, verdict = accuracy_run.execute(config, folder, resume=resume, run=measured)
    return Accuracy(folder, done.manifest, verdict)


def search(
    config: Given | SearchConfig,
    *,
    set: Settings = (),
    out: str | Path | None = None,
    resume: bool = False,
    say: Say = _to_stderr,
) -> Search:
    """FanLoRA's choice of the modules that each layer keeps, by the scores of LoRA on all of them: `perfbench fanlora
    search`. Arguments and errors as those of `accuracy`; a name is such as "fanlora/skills_cpu"."""
    from perfbench.files import run_lock
    from perfbench.files.paths import stamped
    from perfbench.finetune.search import outcome, search_config, search_run

    if not isinstance(config, search_config.SearchConfig):
        config = search_config.load(located(config, say), _settings(set))
    folder = _out(out, resume, stamped(f"{config.training.name}-search"))
    with run_lock.held(folder, resume=resume):
        found = search_run.search(config, folder, resume=resume)
    return Search(folder, folder / outcome.file_of(config, config.scores[0]), found.manifest)


def located(given: Given, say: Say = _to_stderr) -> Path | Mapping[str, Any]:
    """The file of `given`, where it is the name of one that comes with perfbench; a mapping as it is."""
    from perfbench.spec import shipped

    if isinstance(given, Mapping):
        return given
    path, note = shipped.find(given)
    if note:
        say(note)
    return path


def _settings(given: Settings) -> list[str]:
    """As the command line writes them."""
    if isinstance(given, str):
        raise PerfbenchError(f"set: expected a list of KEY=VALUE or a mapping, got the string {given!r}")
    if not isinstance(given, Mapping):
        return list(given)
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]


def _out(out: str | Path | None, resume: bool, default: Path) -> Path:
    if out is None and resume:
        raise PerfbenchError("resume: say with out which folder to go on with")
    return default if out is None else Path(out)
