"""The commands that measure, and those that say what there is to measure."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from perfbench.commands.arguments import add_format, add_out, add_plugin, add_set, interrupted, out_of, positive
from perfbench.errors import PerfbenchError
from perfbench.methods.dtypes import DTYPES, QUANTISATIONS


def add(commands: Any) -> None:
    """Adds them to the command line."""
    run = commands.add_parser("run", help="measure a scenario", description=_run.__doc__)
    run.add_argument("scenario", type=Path, help="a YAML file, or a name that `perfbench list` has: multitenant")
    add_set(run)
    add_plugin(run)
    run.add_argument("--case", metavar="GLOB", help="only the cases whose id matches, and the baseline beside them")
    run.add_argument("--processes", type=positive, metavar="N", help="repeat all of it in N fresh processes")
    about = "measure on a Ray cluster: HOST:PORT, `auto` for this machine's, `local` to start one here"
    run.add_argument("--cluster", metavar="ADDRESS", help=about)
    run.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    _add_large(run)
    add_out(run, "runs/<scenario>-<time>")
    about = "with --resume: measure the cases again that crashed or ran out of memory"
    run.add_argument("--retry-failed", action="store_true", help=about)
    run.set_defaults(command=_run)

    traffic = commands.add_parser("traffic", help="how many tenants, in live traffic", description=_traffic.__doc__)
    traffic.add_argument("scenario", type=Path, help="a YAML file of traffic, or a name that `perfbench list` has")
    add_set(traffic)
    add_plugin(traffic)
    add_out(traffic, "runs/<scenario>-<time>")
    traffic.set_defaults(command=_traffic)

    show = commands.add_parser("show", help="print a run's table again", description=_show.__doc__)
    show.add_argument("run", type=Path, metavar="RUN", help="a folder that run, traffic, finetune or accuracy wrote")
    add_format(show, "table")
    about = "`main`, `tails` (p50, p95, p99), or figures of `perfbench list`, separated by commas (default: main)"
    show.add_argument("--columns", default="main", metavar="NAMES", help=about)
    show.set_defaults(command=_show)

    verify = commands.add_parser("verify", help="prove that what is fast is right", description=_verify.__doc__)
    verify.add_argument("--full", action="store_true", help="the whole grid of speeds, without a limit of time")
    verify.add_argument("--minutes", type=positive, metavar="N", help="end after N minutes (default: 8, on a CPU 2)")
    about = "only these: kernels, q8, replay, generate, isolation, grid, peers, tune"
    verify.add_argument("--section", nargs="+", action="extend", metavar="NAME", help=about)
    verify.add_argument("--tune", action="store_true", help="last, if there is time: find and write launch settings")
    add_out(verify, "runs/verify-<time>")
    verify.set_defaults(command=_verify)

    validate = commands.add_parser("validate", help="check scenario files", description=_validate.__doc__)
    validate.add_argument("files", nargs="*", type=Path, metavar="FILE", help="scenario files; at least one")
    _add_large(validate)
    add_plugin(validate)
    validate.add_argument("--schema", action="store_true", help="print the JSON Schema of a scenario, for editors")
    validate.set_defaults(command=_validate)

    listing = commands.add_parser("list", help="what there is to choose from", description=_list.__doc__)
    listing.add_argument("word", nargs="?", default="", help="show only lines that contain it")
    add_plugin(listing)
    listing.set_defaults(command=_list)

    params = commands.add_parser("params", help="adapter sizes on a backbone", description=_params.__doc__)
    params.add_argument("backbone", nargs="?", default="llama2-7b", help="a named shape, folder or hub id")
    params.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="type in which the bytes are counted")
    add_format(params, "table")
    add_plugin(params)
    params.set_defaults(command=_params)

    roof = commands.add_parser("roof", help="the least possible time on a device", description=_roof.__doc__)
    roof.add_argument("backbone", nargs="?", default="llama2-7b", help="a named shape, folder or hub id")
    roof.add_argument("--device", default="a40", help="a GPU, such as a40 or h200; `here` measures this machine")
    roof.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="type of weights, cache and arithmetic")
    roof.add_argument(
        "--quantisation", choices=tuple(QUANTISATIONS), default="none", help="how linear weights are kept"
    )
    about = "batch sizes, each of which gets a table (default: 1 8 64)"
    roof.add_argument("--requests", type=positive, nargs="+", default=[1, 8, 64], metavar="N", help=about)
    about = "how many tenants the requests of a batch belong to (default: one tenant for each request)"
    roof.add_argument("--tenants", type=positive, metavar="N", help=about)
    about = "tokens of each prompt (default: 274, as in the PARA paper)"
    roof.add_argument("--prompt-tokens", type=positive, default=274, metavar="N", help=about)
    about = "tokens generated for each request (default: 32)"
    roof.add_argument("--new-tokens", type=positive, default=32, metavar="N", help=about)
    about = "beams of each request; 1 is greedy search (default: 1)"
    roof.add_argument("--beams", type=positive, default=1, metavar="N", help=about)
    add_format(roof, "table")
    add_plugin(roof)
    roof.set_defaults(command=_roof)

    doctor = commands.add_parser("doctor", help="what this machine can do", description=_doctor.__doc__)
    doctor.set_defaults(command=_doctor)


def _add_large(parser: argparse.ArgumentParser) -> None:
    about = "go on above the limits: 2,000 cases, a million turns, 1 GiB on disk, and this machine's memory"
    parser.add_argument("--large", action="store_true", help=about)


def _run(arguments: argparse.Namespace) -> int:
    """Measures every case of a scenario and prints the table. Exit codes: 0 all measured, 1 some case failed its
    check, 2 bad input, 4 some case crashed or ran out of memory."""
    from rich.console import Console

    from perfbench import api
    from perfbench.files.plain_text import printable_lines
    from perfbench.report.table import render
    from perfbench.spec import cost

    if arguments.retry_failed and not arguments.resume:
        raise PerfbenchError("--retry-failed: say with --resume and --out which run to go on with")
    notes = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    processes = [f"processes={arguments.processes}"] if arguments.processes else []
    prepared = api.prepare(
        arguments.scenario,
        set=arguments.set + processes,
        case=arguments.case,
        large=arguments.large,
        say=notes.print,
    )
    if arguments.dry_run:
        print(printable_lines("\n".join(prepared.case_ids)))
        notes.print(f"{prepared.work}; nothing was run")
        return 0
    out = out_of(arguments, prepared.default_out, "run directory")
    try:
        run = prepared.measure(
            out,
            resume=arguments.resume,
            retry_failed=arguments.retry_failed,
            cluster=arguments.cluster,
            say=notes.print,
        )
    except KeyboardInterrupt:
        case = ["--case", arguments.case] if arguments.case else []
        again = ["--processes", str(arguments.processes)] if arguments.processes else []
        again += [cost.LIFTED] if arguments.large else []
        again += ["--cluster", arguments.cluster] if arguments.cluster else []
        return interrupted(["run", arguments.scenario, *case, *again], arguments, out)
    render(run.manifest, "table")
    notes.print(f"results: {out}")
    return run.exit_code


def _traffic(arguments: argparse.Namespace) -> int:
    """Sends requests of many tenants at random moments to a server with each method, and finds how many tenants it
    holds within targets for latency. Exit codes: 0 all measured, 1 some answers are not those of their adapters, or not
    proved, or some request failed, 2 bad input, 4 some method crashed."""
    from rich.console import Console

    from perfbench import api
    from perfbench.files.plain_text import printable_tree
    from perfbench.report.formats import put
    from perfbench.traffic import traffic_report, traffic_run

    notes = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    scenario = api.prepare_traffic(arguments.scenario, set=arguments.set, say=notes.print)
    out = out_of(arguments, traffic_run.default_out(scenario), "folder")
    try:
        manifest = api.measure_traffic(scenario, out, resume=arguments.resume)
    except KeyboardInterrupt:
        return interrupted(["traffic", arguments.scenario], arguments, out)
    put(traffic_report.TrafficReport(printable_tree(manifest)), "table")
    notes.print(f"results: {out}; a page of them: perfbench report {out}")
    return traffic_report.exit_code(manifest)


def _show(arguments: argparse.Namespace) -> int:
    """Prints a run's table as it was printed at its end, or with other columns, or in another format; a fine-tuning's
    and an accuracy run's as they were printed. Same exit codes as the command that wrote it."""
    from perfbench.commands import stored
    from perfbench.files.plain_text import printable_tree
    from perfbench.report.formats import put
    from perfbench.report.table import RunTable
    from perfbench.run_folder.run_directory import RunDirectory
    from perfbench.traffic import traffic_folder, traffic_report

    if traffic_folder.is_traffic(arguments.run):
        if arguments.columns != "main":
            raise PerfbenchError(f"--columns: {arguments.run} is a run of traffic, which has one table; leave it out")
        manifest = traffic_folder.read_manifest(arguments.run)
        put(traffic_report.TrafficReport(printable_tree(manifest)), arguments.format)
        return traffic_report.exit_code(manifest)
    if stored.is_training(arguments.run):
        return stored.show(arguments.run, arguments.format)
    directory = RunDirectory.open(arguments.run)
    # A table of a run whose samples are damaged would look as good as any.
    samples = directory.samples() if directory.samples_path.exists() else []
    directory.add_tails(samples)
    valid = directory.valid(samples)
    put(RunTable(printable_tree(directory.manifest), arguments.columns, valid), arguments.format)
    return directory.exit_code()


def _verify(arguments: argparse.Namespace) -> int:
    """Checks kernels, runtimes and isolation here and measures speeds, what is worth most first: in eight minutes on a
    GPU, in two on a CPU, where a small shape stands in. Exit codes: 0 all passed (what is skipped is named), 1 some
    check failed, 2 bad input."""
    from rich.console import Console

    from perfbench.files import run_lock
    from perfbench.machine.device import device_kind
    from perfbench.verify import verification, verify_report

    sections = verification.choose(arguments.section, tune=arguments.tune)
    notes = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    out = out_of(arguments, verification.default_out(), "folder")
    kind, name = device_kind("auto")
    name = name if kind == "cuda" else "the CPU"
    try:
        with run_lock.held(out, resume=arguments.resume):
            found = verification.verify(
                kind, name, out, full=arguments.full, minutes=arguments.minutes, resume=arguments.resume, notes=notes,
                sections=sections,
            )  # fmt: skip
    except KeyboardInterrupt:
        again = ["--full"] if arguments.full else []
        again += ["--section", *sections] if arguments.section else ["--tune"] if arguments.tune else []
        return interrupted(["verify", *again], arguments, out)
    verify_report.render(found)
    notes.print(f"results: {out / verify_report.JSON}, {out / verify_report.MARKDOWN}")
    return verify_report.exit_code(found)


def _validate(arguments: argparse.Namespace) -> int:
    """Checks scenario files for every kind of device, without torch or a network. Exit code 2 if one is bad."""
    import json

    from perfbench.commands.validation import validate
    from perfbench.spec.scenario_schema import schema

    if arguments.schema:
        print(json.dumps(schema(), indent=2))
        return 0
    if not arguments.files:
        raise PerfbenchError("validate: expected at least one scenario file, or --schema")
    return validate(arguments.files, large=arguments.large)


def _list(arguments: argparse.Namespace) -> int:
    """Prints the methods, backbones, runtimes, kernel sets, metrics, shipped scenarios, and the methods and tasks of
    fine-tuning; with a word, only the lines that contain it, in large or small letters."""
    from perfbench.commands.listing import render

    render(arguments.word)
    return 0


def _params(arguments: argparse.Namespace) -> int:
    """Prints parameters and bytes of one tenant's adapter for every method, beside the papers'; allocates nothing."""
    from perfbench.commands.params import table
    from perfbench.report.formats import put

    put(table(arguments.backbone, arguments.dtype), arguments.format)
    return 0


def _roof(arguments: argparse.Namespace) -> int:
    """Prints what each method could reach at most, from bytes and operations over a device's speeds; runs nothing."""
    from perfbench.commands.roof_table import Question, table
    from perfbench.figures.roof import find_device
    from perfbench.report.formats import put

    if arguments.device == "here":
        from perfbench.measure.on_device.measured_roof import measure_here

        device = measure_here(arguments.dtype)
    else:
        device = find_device(arguments.device)
    asked = Question(
        backbone=arguments.backbone,
        dtype=arguments.dtype,
        requests=tuple(arguments.requests),
        tenants=arguments.tenants,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        beams=arguments.beams,
        quantisation=arguments.quantisation,
    )
    put(table(asked, device), arguments.format)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    """Says what this machine can and can't do, and how to mend it; needs no package. Exit code 0 where perfbench can
    run, else 1."""
    from perfbench.doctor import examination

    found = examination.checks()
    examination.show(found)
    return examination.exit_code(found)
