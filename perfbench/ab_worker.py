"""One arm of `perfbench ab`: a process of one revision, which times a block of repetitions whenever it is told to.

It reads a job (one line of JSON) and then turns on standard input, and writes events to what was its standard output,
as `perfbench.measure.on_device.worker` does. The parent may be of another revision: PROTOCOL says whether both speak
alike, and all that is measured, the measuring included, is this revision's own code. The parent starts it by its name
in every revision, so this file stays where it is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from perfbench.errors import PerfbenchError
from perfbench.machine import environment
from perfbench.measure.on_device.worker import Emit, open_session, serve

PROTOCOL = 1


def main() -> int:
    """Serves turns until standard input ends; exit code 0, or 1 after an `error` event."""
    return serve(_serve)


def _serve(emit: Emit) -> None:
    """A job that asks to `prepare` is checked and counted and gets no turns, one that names a counter of `instructions`
    has them counted and gets none either; any other is warmed up and gets some."""
    job = json.loads(sys.stdin.readline())
    if job["protocol"] != PROTOCOL:
        raise PerfbenchError(f"this revision speaks protocol {PROTOCOL} of `perfbench ab`, not {job['protocol']}")
    comparisons, settings = _plan(job)
    session = open_session(settings, comparisons[0], emit)
    cases = [case for comparison in comparisons for case in comparison.cases]
    if job["only"] is not None:
        cases = [case for case in cases if case.id in job["only"]]
    passed = [case for case in cases if session.prepare(case)]
    built: dict[str, Any] = {}
    if job["prepare"]:
        session.count(passed)
    elif job.get("instructions"):
        session.count_instructions(passed, job["instructions"])
    else:
        built = session.warm_up(passed)
    emit(
        "ready",
        cases=[case.id for case in cases],
        requests=comparisons[0].workload.requests,
        device=comparisons[0].device,
        code=loaded_code(),
        versions=environment.versions(),
        root=str(_root()),
        modules=loaded_modules(list(map(Path, job.get("places", [])))),
    )
    taken = itertools.count()
    for line in sys.stdin:
        turn = json.loads(line)
        emit("phase", case=turn["case"], text="timing")
        samples = [session.repetition(built[turn["case"]], next(taken)).sample for _ in range(turn["repetitions"])]
        emit("block", case=turn["case"], samples=samples)


def _plan(job: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    """The comparisons of the scenario, which must fit in one process, and the settings of the session."""
    from perfbench.machine.device import device_kind
    from perfbench.spec import cases, method_plugins, scenario

    method_plugins.load(job.get("plugins", []))
    document = scenario.load(Path(job["scenario"]), job["set"])
    resolved = scenario.resolve(document, *device_kind(document.device))
    scenario.check_against_backbone(resolved)
    comparisons = cases.expand(resolved)
    if job["case"]:
        comparisons = cases.select(comparisons, job["case"])
    shared = {
        (one.backbone, one.dtype, one.quantisation, one.device, one.workload, one.tensor_parallel_size)
        for one in comparisons
    }
    if len(shared) > 1:
        raise PerfbenchError(
            f"{job['scenario']}: expected one backbone, dtype, quantisation and workload, got {len(shared)} "
            "combinations of them; choose with --case or --set"
        )
    ids = [case.id for comparison in comparisons for case in comparison.cases]
    return comparisons, {
        "comparisons": [cases.to_json(comparison) for comparison in comparisons],
        "plugins": method_plugins.as_json(),
        "threads": job["threads"],
        "seed": resolved.seed,
        "warmup": resolved.warmup,
        "prepared": {} if job["prepare"] else dict.fromkeys(ids, "ok"),
        "counted": [],
    }


def loaded_code() -> dict[str, str]:
    """{path under the root: git's hash of the file} of every module of perfbench that this process has loaded."""
    return {os.path.relpath(path, _root()): _blob(path) for path in map(Path.resolve, _files(own=True))}


def loaded_modules(places: Sequence[Path]) -> dict[str, str]:
    """{absolute path: the same} of every other module that it has loaded and that lies in one of `places`, which are
    folders and files; Python's library and the installed packages may lie there too, and are left out."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    installed = tuple(f"{path}{os.sep}" for folder in folders for path in (folder, os.path.realpath(folder)))
    elsewhere = (file.resolve() for file in _files(own=False) if not str(file).startswith(installed))
    return {str(path): _blob(path) for path in elsewhere if any(path.is_relative_to(place) for place in places)}


def _files(*, own: bool) -> Iterator[Path]:
    """The file of every loaded module, of perfbench's `own` ones or of all others. Some say one that is not there."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if (name.split(".")[0] == "perfbench") is own and isinstance(file, str) and Path(file).is_file():
            yield Path(file)


def _blob(path: Path) -> str:
    """As git hashes what is there."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _root() -> Path:
    return Path(__file__).resolve().parents[1]


if __name__ == "__main__":
    sys.exit(main())
