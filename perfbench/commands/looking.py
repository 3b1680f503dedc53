"""The commands that show: pages, history, profiles."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from perfbench import exit_codes
from perfbench.commands.arguments import add_format, add_plugin, add_set, port, positive
from perfbench.errors import PerfbenchError
from perfbench.files.plain_text import printable, printable_tree


def add(commands: Any) -> None:
    """Adds them to the command line."""
    report = commands.add_parser("report", help="one page of one or several runs", description=_report.__doc__)
    report.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a folder that run, traffic or accuracy wrote"
    )
    add_format(report, "html")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: report.html; formats of text are printed")
    about = "of an accuracy run: a run directory with its methods' speeds"
    report.add_argument("--run", type=Path, metavar="RUN", help=about)
    report.add_argument("--samples", action="store_true", help="csv, json, parquet: a row for each repetition")
    report.set_defaults(command=_report)

    history = commands.add_parser("history", help="how a figure moved over runs", description=_history.__doc__)
    history.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run directories, or folders of them")
    about = "the SQLite file of all imported runs (default: runs/history.sqlite)"
    history.add_argument("--store", type=Path, default=Path("runs/history.sqlite"), metavar="FILE", help=about)
    history.add_argument(
        "--figure", default="decode_tokens_per_s", metavar="NAME", help="one that `perfbench list` has"
    )
    history.add_argument("--case", default="*", metavar="GLOB", help="only the cases whose id matches")
    history.add_argument("--machine", default="", metavar="TEXT", help="only machines whose name contains it")
    add_format(history, "table")
    history.add_argument("--html", type=Path, metavar="FILE", help="write a page with a plot of each series")
    history.set_defaults(command=_history)

    profile = commands.add_parser("profile", help="where a case's time goes", description=_profile.__doc__)
    profile.add_argument("scenario", type=Path, help="a YAML file, or a name that `perfbench list` has: multitenant")
    profile.add_argument("--case", required=True, metavar="ID", help="a case id, or a pattern that one case matches")
    profile.add_argument("--steps", type=positive, default=4, metavar="N", help="decode steps to profile (default: 4)")
    add_set(profile)
    add_plugin(profile)
    profile.add_argument("--out", type=Path, metavar="DIR", help="a new folder (default: runs/<scenario>-profile-...)")
    profile.set_defaults(command=_profile)

    view = commands.add_parser("view", help="open a profile in the browser", description=_view.__doc__)
    view.add_argument("folder", type=Path, metavar="DIR", help="what `perfbench profile` wrote, or a folder of traces")
    view.add_argument("--port", type=port, default=0, metavar="N", help="port on 127.0.0.1 (default: one that is free)")
    view.add_argument("--no-browser", action="store_true", help="only serve, and print the address")
    view.add_argument("--tensorboard", action="store_true", help="open it in TensorBoard, with torch-tb-profiler")
    view.set_defaults(command=_view)


def _report(arguments: argparse.Namespace) -> int:
    """Writes an HTML page that opens offline: verdicts, charts with intervals, environment. Or Markdown for a pull
    request, CSV, JSON, Parquet. Of an accuracy run its own page. Exit code 2 where a run can't be read or the file
    can't be written."""
    from perfbench.commands import stored
    from perfbench.files.whole import write
    from perfbench.report.formats import put
    from perfbench.report.read import read_runs
    from perfbench.report.write import RunsReport, SampleRows
    from perfbench.traffic import traffic_folder, traffic_report

    traffic = [path for path in arguments.runs if traffic_folder.is_traffic(path)]
    if traffic and len(arguments.runs) > 1:
        raise PerfbenchError(f"report: {traffic[0]} is a run of traffic, whose page is its own; give it alone")
    if traffic and arguments.samples:
        raise PerfbenchError(
            f"--samples: {traffic[0]} is a run of traffic, whose requests are in {traffic_folder.MEASUREMENTS}"
        )
    if traffic:
        manifest = printable_tree(traffic_folder.read_manifest(traffic[0]))
        measured = traffic_folder.read_measured(traffic[0]) if arguments.format == "html" else {}
        put(traffic_report.TrafficReport(manifest, measured), arguments.format, arguments.out, filed="report")
        return exit_codes.OK
    judged = [path for path in arguments.runs if stored.is_accuracy(path)]
    if judged and len(arguments.runs) > 1:
        raise PerfbenchError(f"report: {judged[0]} is an accuracy run, whose page is its own; give it alone")
    if arguments.run is not None and not judged:
        raise PerfbenchError("--run: adds speeds to an accuracy run, which is not given; leave it out")
    if judged:
        out = arguments.out or Path("report.html")
        write(out, stored.page(judged[0], arguments.format, arguments.run))
        print(f"{out}: {out.stat().st_size / 1e6:.2f} MB", file=sys.stderr)
        return exit_codes.OK
    runs = read_runs(arguments.runs)
    put((SampleRows if arguments.samples else RunsReport)(runs), arguments.format, arguments.out, filed="report")
    return 0


def _history(arguments: argparse.Namespace) -> int:
    """Imports runs into a store of one file, where each counts once however often it is given, and shows how a figure
    moved from run to run and where its level changed. What lies among them and is no run is skipped and counted. Exit
    code 2 where a run can't be read; the rest is imported."""
    from collections import Counter

    from perfbench.files.whole import write
    from perfbench.history import store as history_store
    from perfbench.history.view import Movement
    from perfbench.report.formats import put
    from perfbench.run_folder.run_directory import is_something_else

    below, outcomes = history_store.find_runs(arguments.runs), Counter[str]()
    # What was given by itself is refused aloud; a tree may hold trainings and other programs' files.
    found = [path for path in below if path in arguments.runs or not is_something_else(path)]
    skipped = (
        f"; skipped {len(below) - len(found)} that are no runs of perfbench run" if len(found) < len(below) else ""
    )
    with history_store.open_store(arguments.store, create=bool(found)) as store:
        for path in found:
            try:
                outcome = store.add(path)
            except PerfbenchError as error:
                outcome = "refused"
                print(f"perfbench: {error}", file=sys.stderr)
            if outcome == "unfinished":
                print(f"{path}: still being written, or stopped; imported once it is finished", file=sys.stderr)
            outcomes[outcome] += 1
        if below:
            counted = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
            print(f"{len(found)} runs: {counted or 'none'}{skipped}", file=sys.stderr)
        try:
            series = store.series(arguments.figure, arguments.case, arguments.machine)
        except PerfbenchError:
            if found and outcomes["refused"] == len(found):
                return exit_codes.BAD_INPUT  # that nothing is there to show has its reason above
            raise
    if arguments.html:
        write(arguments.html, Movement(series).page().encode())
        print(f"{arguments.html}: {len(series)} plots", file=sys.stderr)
    else:
        put(Movement(series), arguments.format)
    return exit_codes.BAD_INPUT if outcomes["refused"] else exit_codes.OK


def _profile(arguments: argparse.Namespace) -> int:
    """Profiles a few steps of one case beside the bare backbone, prints where the adapter's time goes, and writes
    traces for `perfbench view`, Perfetto and TensorBoard. Exit codes: 0, 1 the case failed its check, 2 bad input."""
    from rich.console import Console

    from perfbench.machine.device import device_kind
    from perfbench.measure import inputs
    from perfbench.profiling import profile
    from perfbench.profiling.profile_table import render
    from perfbench.spec import cases, scenario

    notes = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    document = scenario.load(arguments.scenario, arguments.set)
    resolved = scenario.resolve(document, *device_kind(document.device))
    for note in resolved.notes:
        notes.print(printable(note))
    scenario.check_against_backbone(resolved)
    comparison = profile.choose(cases.expand(resolved), arguments.case)
    steps = profile.decode_steps(comparison, arguments.steps)
    for note in inputs.check([comparison]):
        notes.print(note)
    out = arguments.out or profile.default_out(resolved, comparison)
    found = profile.execute(resolved, comparison, steps, out, notes.print)
    render(found)
    notes.print(f"traces: {out}; look at them with: perfbench view {out}")
    return 0 if all(arm["check"]["status"] == "ok" for arm in found["arms"].values()) else exit_codes.FAILED


def _view(arguments: argparse.Namespace) -> int:
    """Opens a profile's tables, memory and timeline in the browser, served on 127.0.0.1 only, until Ctrl-C."""
    from perfbench.profiling import view

    if arguments.tensorboard:
        return view.tensorboard(arguments.folder, arguments.port)
    return view.serve(arguments.folder, arguments.port, browser=not arguments.no_browser)
