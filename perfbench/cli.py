"""The command line. Each command imports what it needs, so that `--help` and `validate` answer in a blink."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from perfbench import __version__
from perfbench.errors import PerfbenchError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 2 for any error that the user can mend, in one line."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except PerfbenchError as error:
        print(f"perfbench: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("perfbench: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perfbench",
        description="Which adapter method should one language model serve to many tenants, and what does it cost?",
    )
    parser.add_argument("--version", action="version", version=f"perfbench {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="measure a scenario", description=_run.__doc__)
    run.add_argument("scenario", type=Path, help="a YAML file, such as scenarios/multitenant.yaml")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field; may be repeated")
    run.add_argument("--case", metavar="GLOB", help="only the cases whose id matches, and `none` beside them")
    run.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    run.add_argument("--out", type=Path, metavar="DIR", help="the run directory (default: runs/<scenario>-<time>)")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.set_defaults(command=_run)

    show = commands.add_parser("show", help="print a run's table again", description=_show.__doc__)
    show.add_argument("run", type=Path, help="a run directory")
    show.add_argument("--format", choices=("table", "markdown", "csv", "json"), default="table")
    show.set_defaults(command=_show)

    listing = commands.add_parser("list", help="what there is to choose from", description=_list.__doc__)
    listing.set_defaults(command=_list)

    params = commands.add_parser("params", help="adapter sizes on a backbone", description=_params.__doc__)
    params.add_argument("backbone", nargs="?", default="llama2-7b", help="a named shape, folder or hub id")
    params.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16", help="what bytes are counted in")
    params.set_defaults(command=_params)

    roof = commands.add_parser("roof", help="the least possible time on a device", description=_roof.__doc__)
    roof.add_argument("backbone", nargs="?", default="llama2-7b", help="a named shape, folder or hub id")
    roof.add_argument("--device", default="a40", help="such as a40 or h200; `here` measures this machine")
    roof.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16")
    roof.add_argument("--requests", type=_positive, nargs="+", default=[1, 8, 64], metavar="N")
    roof.add_argument("--tenants", type=_positive, metavar="N", help="default: one for each request")
    roof.add_argument("--prompt-tokens", type=_positive, default=274, metavar="N")
    roof.add_argument("--new-tokens", type=_positive, default=32, metavar="N")
    roof.add_argument("--beams", type=_positive, default=1, metavar="N")
    roof.set_defaults(command=_roof)

    verify = commands.add_parser("verify", help="prove that what is fast is right", description=_verify.__doc__)
    verify.add_argument("--out", type=Path, metavar="DIR", help="the folder (default: runs/verify-<time>)")
    verify.add_argument("--full", action="store_true", help="the whole grid of speeds, without a limit of time")
    verify.add_argument("--minutes", type=_positive, metavar="N", help="end after N minutes (default: 8, on a CPU 2)")
    verify.add_argument("--resume", action="store_true", help="go on with what is in --out")
    verify.set_defaults(command=_verify)

    validate = commands.add_parser("validate", help="check scenario files", description=_validate.__doc__)
    validate.add_argument("files", nargs="*", type=Path)
    validate.add_argument("--schema", action="store_true", help="print the JSON Schema of a scenario, for editors")
    validate.set_defaults(command=_validate)

    doctor = commands.add_parser("doctor", help="what this machine can do", description=_doctor.__doc__)
    doctor.set_defaults(command=_doctor)
    return parser


def _positive(text: str) -> int:
    """An integer >= 1 of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def _run(arguments: argparse.Namespace) -> int:
    """Measures every case of a scenario and prints the table. Exit codes: 0 all measured, 1 some case failed its
    check, 2 bad input, 4 some case crashed or ran out of memory."""
    from rich.console import Console

    from perfbench import cases, scenario
    from perfbench.device import device_kind
    from perfbench.table import render

    notes = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    document = scenario.load(arguments.scenario, arguments.set)
    resolved = scenario.resolve(document, *device_kind(document.device))
    for note in resolved.notes:
        notes.print(note)
    scenario.check_against_backbone(resolved)
    comparisons = cases.expand(resolved)
    if arguments.case:
        comparisons = cases.select(comparisons, arguments.case)
    ids = [case.id for comparison in comparisons for case in comparison.cases]
    if arguments.dry_run:
        print("\n".join(ids))
        notes.print(f"{len(ids)} cases, {resolved.repetitions} repetitions each; nothing was run")
        return 0
    from perfbench import inputs, run

    if arguments.resume and not arguments.out:
        raise PerfbenchError("--resume: say with --out which run directory to go on with")
    out = arguments.out or run.default_out(resolved)
    inputs.check(comparisons)
    notes.print(f"{len(ids)} cases, {resolved.repetitions} repetitions each -> {out}")
    try:
        directory = run.execute(resolved, comparisons, out, resume=arguments.resume)
    except KeyboardInterrupt:
        notes.print(f"interrupted; go on with: perfbench run {arguments.scenario} --out {out} --resume")
        return EXIT_INTERRUPTED
    render(directory.manifest, "table")
    notes.print(f"results: {out}")
    return directory.exit_code()


def _show(arguments: argparse.Namespace) -> int:
    """Prints a run's table as it was printed at its end, or as Markdown, CSV or JSON. Same exit codes as `run`."""
    from perfbench.result import RunDirectory
    from perfbench.table import render

    directory = RunDirectory.open(arguments.run)
    text = render(directory.manifest, arguments.format)
    if text is not None:
        print(text)
    return directory.exit_code()


def _list(arguments: argparse.Namespace) -> int:
    """Prints the methods, backbones, runtimes, kernel sets, metrics and shipped scenarios."""
    from perfbench.listing import render

    render()
    return 0


def _params(arguments: argparse.Namespace) -> int:
    """Prints parameters and bytes of one tenant's adapter for every method, beside the papers'; allocates nothing."""
    from perfbench.params import render

    render(arguments.backbone, arguments.dtype)
    return 0


def _roof(arguments: argparse.Namespace) -> int:
    """Prints what each method could reach at most, from bytes and operations over a device's speeds; runs nothing."""
    from perfbench.roof import find_device
    from perfbench.roof_table import Question, render

    if arguments.device == "here":
        from perfbench.measured_roof import measure_here

        device = measure_here(arguments.dtype)
    else:
        device = find_device(arguments.device)
    render(
        Question(
            backbone=arguments.backbone,
            dtype=arguments.dtype,
            requests=tuple(arguments.requests),
            tenants=arguments.tenants,
            prompt_tokens=arguments.prompt_tokens,
            new_tokens=arguments.new_tokens,
            beams=arguments.beams,
        ),
        device,
    )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    """Checks kernels, runtimes and isolation here, then measures speeds: under eight minutes on a GPU, under two on a
    CPU, where a small shape stands in. Exit codes: 0 all passed (what is skipped is named), 1 some check failed, 2 bad
    input."""
    from rich.console import Console

    from perfbench.device import device_kind
    from perfbench.verify import command, report

    notes = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    if arguments.resume and not arguments.out:
        raise PerfbenchError("--resume: say with --out which folder to go on with")
    out = arguments.out or command.default_out()
    kind, name = device_kind("auto")
    name = name if kind == "cuda" else "the CPU"
    try:
        found = command.verify(
            kind, name, out, full=arguments.full, minutes=arguments.minutes, resume=arguments.resume, notes=notes
        )
    except KeyboardInterrupt:
        full = " --full" if arguments.full else ""
        notes.print(f"interrupted; go on with: perfbench verify{full} --out {out} --resume")
        return EXIT_INTERRUPTED
    report.render(found)
    notes.print(f"results: {out / report.JSON}, {out / report.MARKDOWN}")
    return report.exit_code(found)


def _validate(arguments: argparse.Namespace) -> int:
    """Checks scenario files for every kind of device, without torch or a network. Exit code 2 if one is bad."""
    import json

    from perfbench.scenario_schema import SCHEMA
    from perfbench.validation import validate

    if arguments.schema:
        print(json.dumps(SCHEMA, indent=2))
        return 0
    if not arguments.files:
        raise PerfbenchError("validate: expected at least one scenario file, or --schema")
    return validate(arguments.files)


def _doctor(arguments: argparse.Namespace) -> int:
    """Says what this machine can and can't do, and how to mend it. Exit code 0 where perfbench can run."""
    from rich.console import Console

    from perfbench import doctor

    found = doctor.checks()
    Console().print(doctor.render(found))
    return 1 if any(check.status == "missing" for check in found) else 0


if __name__ == "__main__":
    sys.exit(main())
