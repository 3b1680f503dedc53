"""`perfbench profile`: the parent process. It chooses the case, starts the child that profiles it, and writes what
the child found. Free of torch.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from perfbench import __version__
from perfbench.errors import PerfbenchError, ScenarioError, TraceError, nearest
from perfbench.files.scratch import Scratch
from perfbench.machine import environment
from perfbench.measure.children import WORKER_LOG
from perfbench.measure.run import cause
from perfbench.profiling.memory_picture import render as render_memory
from perfbench.profiling.profile_table import PROFILE, SCHEMA_VERSION
from perfbench.spec import cases, method_plugins
from perfbench.spec.cases import Comparison
from perfbench.spec.scenario import Scenario

# More would make a trace that no page shows; a case that decodes differently after so many steps is rare.
MOST_STEPS = 64


def choose(comparisons: Sequence[Comparison], wanted: str) -> Comparison:
    """The comparison of the case `wanted`, an id or a pattern that fits one alone, with that case and the bare
    backbone of its kernel set. ScenarioError names the nearest id."""
    by_id = {case.id: (comparison, case) for comparison in comparisons for case in comparison.cases}
    found = [wanted] if wanted in by_id else [case_id for case_id in by_id if fnmatchcase(case_id, wanted)]
    if not found:
        raise ScenarioError(f"--case {wanted}: there is no such case; {nearest(wanted, by_id)} "
                            f"(`perfbench run SCENARIO --dry-run` lists all)")  # fmt: skip
    if len(found) > 1:
        raise ScenarioError(
            f"--case {wanted}: expected one case, this fits {len(found)}: {', '.join(found[:3])}"
            f"{', ...' if len(found) > 3 else ''}"
        )
    comparison, chosen = by_id[found[0]]
    if chosen.runtime == "continuous":
        raise ScenarioError(f"--case {wanted}: the profiler can't look into runtime continuous; its layers are those "
                            f"of runtime static: choose the same case there")  # fmt: skip
    if comparison.tensor_parallel_size > 1:
        ranks = comparison.tensor_parallel_size
        raise ScenarioError(f"--case {wanted}: the profiler sees one process, and this case runs in {ranks}; "
                            f"choose the case of tensor_parallel_size 1")  # fmt: skip
    bare = next(case for case in comparison.cases if case.method == "none" and case.kernels == chosen.kernels)
    return replace(comparison, cases=(bare,) if chosen == bare else (bare, chosen))


def decode_steps(comparison: Comparison, steps: int) -> int:
    """How many decode steps are profiled: `steps`, or as many as the case has. ScenarioError."""
    if steps > MOST_STEPS:
        raise ScenarioError(f"--steps {steps}: expected at most {MOST_STEPS}; a trace grows with every step")
    return min(steps, comparison.workload.new_tokens - 1)


def execute(
    scenario: Scenario, comparison: Comparison, steps: int, out: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Profiles the cases of `comparison` into the new folder `out` and returns what its profile.json holds.

    `say` is told what is being done. Where it fails nothing is left but what the child said, in `<out>.log`.
    PerfbenchError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TraceError(f"{out}: is there already; profile with another --out")
    unfinished = out.with_name(out.name + ".unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        log = out.with_name(out.name + ".log")
        log.touch()
    except OSError as error:
        raise TraceError(f"{out}: can't be written ({error.strerror}); profile with another --out") from None
    try:
        with Scratch() as scratch:
            arms = _child(scenario, comparison, steps, unfinished, log, say, scratch)
        profile = _profile(scenario, comparison, steps, arms)
        for label, timeline in arms.items():
            timeline_json = json.dumps(timeline["memory"], separators=(",", ":"))
            (unfinished / f"{label}.memory.json").write_text(timeline_json, encoding="utf-8")
            picture = render_memory(timeline["memory"], f"{label}: memory of one call")
            (unfinished / f"{label}.memory.svg").write_text(picture, encoding="utf-8")
        (unfinished / PROFILE).write_text(json.dumps(profile, indent=1) + "\n", encoding="utf-8")
        if out.is_dir():
            out.rmdir()
        log.rename(unfinished / WORKER_LOG)
        unfinished.rename(out)
    except OSError as error:
        raise TraceError(f"{out}: can't be written ({error}); profile with another --out") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if log.exists() and not log.stat().st_size:
            log.unlink()
    return profile


def _profile(scenario: Scenario, comparison: Comparison, steps: int, arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What profile.json holds. The arms are in the order bare backbone, case."""
    return {
        "schema_version": SCHEMA_VERSION,
        "perfbench_version": __version__,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "scenario": scenario.name,
        "case": comparison.cases[-1].id,
        "comparison": comparison.id,
        "device": scenario.device,
        "decode_steps": steps,
        "options": asdict(comparison.cases[-1].options),
        "environment": environment.collect(scenario.device, environment.threads()),
        "arms": {
            label: {
                "check": arm["check"],
                "breakdown": arm["breakdown"],
                "replays": arm["replays"],
                "decode_step_spread": arm["decode_step_spread"],
                "unprofiled_decode_step_ms": arm["unprofiled_decode_step_ms"],
                "peak_bytes": arm["memory"]["peak_bytes"],
                "trace": f"{label}.trace.json.gz",
                "memory": f"{label}.memory.json",
                "memory_picture": f"{label}.memory.svg",
            }
            for label, arm in arms.items()
        },
    }


def _child(
    scenario: Scenario,
    comparison: Comparison,
    steps: int,
    folder: Path,
    log: Path,
    say: Callable[[str], None],
    scratch: Scratch,
) -> dict[str, dict[str, Any]]:
    """Label -> what the child process says of that arm. PerfbenchError says why it did not come to its end."""
    job = {
        "comparison": cases.to_json(comparison),
        "steps": steps,
        "out": str(folder.resolve()),
        "seed": scenario.seed,
        "threads": environment.threads(),
        "plugins": method_plugins.as_json(),
    }
    found: dict[str, dict[str, Any]] = {}
    with log.open("wb") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "perfbench.profiling.on_device.profile_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**scratch.environment(), "KINETO_LOG_LEVEL": "99"},
        )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        # A child that is dead already breaks the pipe: how it ended is told below.
        with suppress(BrokenPipeError), child.stdin:
            child.stdin.write(json.dumps(job).encode())
        for line in child.stdout:
            if not line.endswith(b"\n"):
                break  # the child died while writing
            event = json.loads(line)
            if event["event"] == "phase":
                say(f"{event['case'] or comparison.cases[-1].id}: {event['text']}")
            elif event["event"] == "arm":
                found[event.pop("label")] = event
            elif event["event"] == "error":
                raise PerfbenchError(_told(event, comparison, log))
            elif event["event"] == "done":
                child.wait()
                return found
    finally:
        child.kill()
        code = child.wait()
        child.stdout.close()
    raise PerfbenchError(f"{comparison.cases[-1].id}: {cause(code, str(log))}")


def _told(event: dict[str, Any], comparison: Comparison, log: Path) -> str:
    where = event["case"] or comparison.cases[-1].id
    if event["kind"] == "bad_input":
        return str(event["message"])
    if event["kind"] == "out_of_memory":
        return f"{where}: out of memory while it was profiled; choose fewer requests, or --set dtype=bf16"
    return f"{where}: crashed while it was profiled ({event['message']}); see {log}"


def default_out(scenario: Scenario, comparison: Comparison) -> Path:
    """`runs/<scenario>-profile-<arm>-<UTC time>`: a new folder for each profile."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    arm = comparison.cases[-1].id.rsplit("/", 1)[1]
    return Path("runs") / f"{scenario.name}-profile-{arm}-{stamp}"
