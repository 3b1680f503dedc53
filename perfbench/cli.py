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
    run.add_argument("--processes", type=_positive, metavar="N", help="repeat all of it in N fresh processes")
    run.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    run.add_argument("--out", type=Path, metavar="DIR", help="the run directory (default: runs/<scenario>-<time>)")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.set_defaults(command=_run)

    show = commands.add_parser("show", help="print a run's table again", description=_show.__doc__)
    show.add_argument("run", type=Path, help="a run directory")
    show.add_argument("--format", choices=("table", "markdown", "csv", "json"), default="table")
    show.set_defaults(command=_show)

    report = commands.add_parser("report", help="one page of one or several runs", description=_report.__doc__)
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run directory")
    report.add_argument("--format", choices=("html", "markdown", "csv", "parquet"), default="html")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: report.html; markdown and csv are printed")
    report.add_argument("--samples", action="store_true", help="csv and parquet: a row for each repetition")
    report.set_defaults(command=_report)

    history = commands.add_parser("history", help="how a figure moved over runs", description=_history.__doc__)
    history.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run directories, or folders of them")
    history.add_argument("--store", type=Path, default=Path("runs/history.sqlite"), metavar="FILE")
    history.add_argument("--figure", default="decode_tokens_per_s", metavar="NAME", help="`perfbench list` has them")
    history.add_argument("--case", default="*", metavar="GLOB", help="only the cases whose id matches")
    history.add_argument("--machine", default="", metavar="TEXT", help="only machines whose name contains it")
    history.add_argument("--format", choices=("table", "csv"), default="table")
    history.add_argument("--html", type=Path, metavar="FILE", help="write a page with a plot of each series")
    history.set_defaults(command=_history)

    listing = commands.add_parser("list", help="what there is to choose from", description=_list.__doc__)
    listing.set_defaults(command=_list)

    params = commands.add_parser("params", help="adapter sizes on a backbone", description=_params.__doc__)
    params.add_argument("backbone", nargs="?", default="llama2-7b", help="a named shape, folder or hub id")
    params.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16", help="what bytes are counted in")
    params.set_defaults(command=_params)

    fanlora = commands.add_parser("fanlora", help="FanLoRA: which modules a layer keeps", description=_search.__doc__)
    search = fanlora.add_subparsers(metavar="COMMAND", required=True).add_parser(
        "search", help="choose a setting by the scores of LoRA modules", description=_search.__doc__
    )
    search.add_argument("config", type=Path, help="a YAML file, such as scenarios/fanlora/alpaca_cpu.yaml")
    search.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field")
    search.add_argument("--out", type=Path, metavar="DIR", help="default: runs/<name>-search-<time>")
    search.add_argument("--resume", action="store_true", help="go on with the search in --out")
    search.set_defaults(command=_search)

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

    profile = commands.add_parser("profile", help="where a case's time goes", description=_profile.__doc__)
    profile.add_argument("scenario", type=Path, help="a YAML file, such as scenarios/multitenant.yaml")
    profile.add_argument("--case", required=True, metavar="ID", help="a case id, or a pattern that fits one alone")
    profile.add_argument("--steps", type=_positive, default=4, metavar="N", help="decode steps (default: 4)")
    profile.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field")
    profile.add_argument("--out", type=Path, metavar="DIR", help="a new folder (default: runs/<scenario>-profile-...)")
    profile.set_defaults(command=_profile)

    view = commands.add_parser("view", help="open a profile in the browser", description=_view.__doc__)
    view.add_argument("folder", type=Path, metavar="DIR", help="what `perfbench profile` wrote, or a folder of traces")
    view.add_argument("--port", type=_port, default=0, metavar="N", help="on 127.0.0.1 (default: one that is free)")
    view.add_argument("--no-browser", action="store_true", help="only serve, and print the address")
    view.add_argument("--tensorboard", action="store_true", help="with TensorBoard and torch-tb-profiler instead")
    view.set_defaults(command=_view)

    compare = commands.add_parser("compare", help="what differs between two runs", description=_compare.__doc__)
    compare.add_argument("baseline", type=Path, help="a run directory, or the run.json in it")
    compare.add_argument("candidate", type=Path)
    compare.add_argument("--all", action="store_true", help="every figure of every case, not what matters only")
    compare.set_defaults(command=_compare)
    _add_gate_options(compare, writes=False)

    gate = commands.add_parser("gate", help="may this run replace that one?", description=_gate.__doc__)
    gate.add_argument("--baseline", type=Path, required=True, metavar="RUN", help="a run directory, or its run.json")
    gate.add_argument("--candidate", type=Path, required=True, metavar="RUN")
    gate.set_defaults(command=_gate)
    _add_gate_options(gate, writes=True)

    ab = commands.add_parser("ab", help="is this commit slower than that one?", description=_ab.__doc__)
    ab.add_argument("scenario", type=Path, help="a YAML file, such as scenarios/gate.yaml")
    ab.add_argument("--baseline", required=True, metavar="GIT_REF")
    ab.add_argument("--candidate", default="HEAD", metavar="GIT_REF", help="default: HEAD")
    ab.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field; may be repeated")
    ab.add_argument("--case", metavar="GLOB", help="only the cases whose id matches, and `none` beside them")
    ab.add_argument("--policy", type=Path, metavar="FILE", help="a YAML of figures and limits")
    ab.add_argument("--pairs", type=_positive, default=12, metavar="N", help="of fresh processes in the first batch")
    ab.add_argument("--blocks", type=_positive, default=10, metavar="N", help="of each case in a pair")
    ab.add_argument("--repetitions", type=_positive, default=1, metavar="N", help="in a block")
    ab.add_argument("--seed", type=int, default=0, help="of the orders in which the arms take turns")
    ab.add_argument("--out", type=Path, metavar="DIR", help="where every pair is kept (default: runs/ab-<time>)")
    ab.add_argument("--record", action="store_true", help="measure the first batch and judge nothing")
    ab.set_defaults(command=_ab)
    _add_write_option(ab)

    finetune = commands.add_parser("finetune", help="train a method on a task", description=_finetune.__doc__)
    finetune.add_argument("config", type=Path, help="a YAML file, such as scenarios/finetune/boolq_para.yaml")
    finetune.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field")
    finetune.add_argument("--out", type=Path, metavar="DIR", help="default: runs/finetune-<name>-<time>")
    finetune.add_argument("--resume", action="store_true", help="go on with the run in --out")
    finetune.set_defaults(command=_finetune)

    accuracy = commands.add_parser("accuracy", help="does accuracy hold, as served?", description=_accuracy.__doc__)
    accuracy.add_argument("config", type=Path, help="a YAML file, such as scenarios/accuracy/cpu.yaml")
    accuracy.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field")
    accuracy.add_argument("--out", type=Path, metavar="DIR", help="default: runs/accuracy-<name>-<time>")
    accuracy.add_argument("--resume", action="store_true", help="go on with the run in --out")
    accuracy.add_argument("--run", type=Path, metavar="RUN", help="a run directory with these methods' speeds")
    accuracy.set_defaults(command=_accuracy)

    about = "Writes a model's answers to MT-Bench, and has a judge rate them."
    mtbench = commands.add_parser("mtbench", help="MT-Bench's answers and ratings", description=about)
    _add_mtbench_options(mtbench)

    doctor = commands.add_parser("doctor", help="what this machine can do", description=_doctor.__doc__)
    doctor.set_defaults(command=_doctor)
    return parser


def _add_mtbench_options(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(metavar="STEP", required=True)
    answer = steps.add_parser("answer", help="write a model's answers", description=_mtbench_answer.__doc__)
    answer.add_argument("backbone", help="a folder or hub id with weights and tokenizer")
    answer.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter folder (default: the bare backbone)")
    answer.add_argument("--questions", required=True, metavar="DIR", help="FastChat's data/mt_bench")
    answer.add_argument("--out", type=Path, required=True, metavar="FILE", help="such as model_answer/mine.jsonl")
    answer.add_argument("--model-id", metavar="NAME", help="default: the name of --out")
    answer.add_argument("--beams", type=_positive, default=3, metavar="N", help="default: 3, as in the papers")
    answer.add_argument("--new-tokens", type=_positive, default=1024, metavar="N", help="at most (default: 1024)")
    answer.add_argument("--batch", type=_positive, default=4, metavar="N", help="questions at a time (default: 4)")
    answer.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    answer.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    answer.set_defaults(command=_mtbench_answer)

    judge = steps.add_parser("judge", help="have them rated", description=_mtbench_judge.__doc__)
    judge.add_argument("answers", type=Path, help="what `answer` wrote")
    judge.add_argument("--questions", required=True, metavar="DIR", help="the same, with judge_prompts.jsonl")
    judge.add_argument("--out", type=Path, required=True, metavar="FILE", help="where each judgment is appended")
    judge.add_argument("--url", required=True, help="of the endpoint, such as http://127.0.0.1:8000/v1")
    judge.add_argument("--model", required=True, help="the judge's name there")
    judge.add_argument("--key-variable", default="OPENAI_API_KEY", metavar="NAME", help="has the key")
    judge.set_defaults(command=_mtbench_judge)


def _add_gate_options(parser: argparse.ArgumentParser, *, writes: bool) -> None:
    parser.add_argument("--policy", type=Path, metavar="FILE", help="a YAML of figures and limits")
    parser.add_argument("--exact-only", action="store_true", help="read run.json alone; any machine will do")
    parser.add_argument("--other-machine", action="store_true", help="go on where hardware, driver or clocks differ")
    if writes:
        _add_write_option(parser)


def _add_write_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--write",
        action="append",
        default=[],
        metavar="FORMAT=FILE",
        help="markdown, junit, annotations, github-benchmark-bigger, github-benchmark-smaller, bencher, "
        "pytest-benchmark or json; may be repeated",
    )


def _positive(text: str) -> int:
    """An integer >= 1 of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def _port(text: str) -> int:
    """A TCP port of the command line; 0 is any that is free."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def _run(arguments: argparse.Namespace) -> int:
    """Measures every case of a scenario and prints the table. Exit codes: 0 all measured, 1 some case failed its
    check, 2 bad input, 4 some case crashed or ran out of memory."""
    from rich.console import Console

    from perfbench import cases, scenario
    from perfbench.device import device_kind
    from perfbench.table import render

    notes = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    processes = [f"processes={arguments.processes}"] if arguments.processes else []
    document = scenario.load(arguments.scenario, arguments.set + processes)
    resolved = scenario.resolve(document, *device_kind(document.device))
    for note in resolved.notes:
        notes.print(note)
    scenario.check_against_backbone(resolved)
    comparisons = cases.expand(resolved)
    if arguments.case:
        comparisons = cases.select(comparisons, arguments.case)
    ids = [case.id for comparison in comparisons for case in comparison.cases]
    work = f"{len(ids)} cases, {resolved.repetitions} repetitions each"
    if resolved.processes > 1:
        work += f" in each of {resolved.processes} processes"
    if arguments.dry_run:
        print("\n".join(ids))
        notes.print(f"{work}; nothing was run")
        return 0
    from perfbench import inputs, run

    if arguments.resume and not arguments.out:
        raise PerfbenchError("--resume: say with --out which run directory to go on with")
    out = arguments.out or run.default_out(resolved)
    inputs.check(comparisons)
    notes.print(f"{work} -> {out}")
    try:
        directory = run.execute(resolved, comparisons, out, resume=arguments.resume)
    except KeyboardInterrupt:
        again = f" --processes {arguments.processes}" if arguments.processes else ""
        notes.print(f"interrupted; go on with: perfbench run {arguments.scenario}{again} --out {out} --resume")
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


def _report(arguments: argparse.Namespace) -> int:
    """Writes an HTML page that opens offline: verdicts, charts with intervals, environment. Or Markdown for a pull
    request, CSV, Parquet. Exit code 2 where a run can't be read or the file can't be written."""
    from perfbench.report.read import read_runs
    from perfbench.report.write import render, write

    content = render(read_runs(arguments.runs), arguments.format, samples=arguments.samples)
    printed = arguments.format in ("markdown", "csv")
    out = arguments.out or (None if printed else Path(f"report.{arguments.format}"))
    if out is None:
        sys.stdout.write(content.decode())
        return 0
    write(out, content)
    print(f"{out}: {len(content) / 1e6:.2f} MB", file=sys.stderr)
    return 0


def _history(arguments: argparse.Namespace) -> int:
    """Imports runs into a store of one file, where each counts once however often it is given, and shows how a figure
    moved from run to run and where its level changed. Exit code 2 where a run can't be read; the rest is imported."""
    from collections import Counter

    from perfbench import history, history_view
    from perfbench.report.write import write

    found, outcomes = history.find_runs(arguments.runs), Counter[str]()
    with history.open_store(arguments.store, create=bool(found)) as store:
        for path in found:
            try:
                outcome = store.add(path)
            except PerfbenchError as error:
                outcome = "refused"
                print(f"perfbench: {error}", file=sys.stderr)
            if outcome == "unfinished":
                print(f"{path}: still being written, or stopped; imported once it is finished", file=sys.stderr)
            outcomes[outcome] += 1
        if found:
            counted = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
            print(f"{len(found)} runs: {counted}", file=sys.stderr)
        series = store.series(arguments.figure, arguments.case, arguments.machine)
    if arguments.html:
        write(arguments.html, history_view.to_html(series).encode())
        print(f"{arguments.html}: {len(series)} plots", file=sys.stderr)
    elif arguments.format == "csv":
        sys.stdout.write(history_view.to_csv(series))
    else:
        history_view.render(series)
    return EXIT_BAD_INPUT if outcomes["refused"] else 0


def _list(arguments: argparse.Namespace) -> int:
    """Prints the methods, backbones, runtimes, kernel sets, metrics, shipped scenarios, and the methods and tasks of
    fine-tuning."""
    from perfbench.finetune.tasks.registry import TASKS
    from perfbench.finetune.trained import TRAINED
    from perfbench.listing import render

    render(
        tasks={name: task.summary for name, task in TASKS.items()},
        trained={name: method.summary for name, method in TRAINED.items()},
    )
    return 0


def _params(arguments: argparse.Namespace) -> int:
    """Prints parameters and bytes of one tenant's adapter for every method, beside the papers'; allocates nothing."""
    from perfbench.params import render

    render(arguments.backbone, arguments.dtype)
    return 0


def _search(arguments: argparse.Namespace) -> int:
    """Trains LoRA on every linear of every layer, scores each module on the examples held out, and writes the setting
    that keeps the best of each layer: a file for `methods: fanlora: {setting: FILE}`. Exit code 0, or 2 for bad
    input."""
    from datetime import UTC, datetime

    from perfbench.finetune.search import command, config

    chosen = config.load(arguments.config, arguments.set)
    if arguments.resume and not arguments.out:
        raise PerfbenchError("--resume: say with --out which search to go on with")
    out = arguments.out or Path("runs") / f"{chosen.training.name}-search-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    try:
        command.search(chosen, out, resume=arguments.resume)
    except KeyboardInterrupt:
        return _say_how_to_go_on("fanlora search", arguments, out)
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


def _profile(arguments: argparse.Namespace) -> int:
    """Profiles a few steps of one case beside the bare backbone, prints where the adapter's time goes, and writes
    traces for `perfbench view`, Perfetto and TensorBoard. Exit codes: 0, 1 the case failed its check, 2 bad input."""
    from rich.console import Console

    from perfbench import cases, inputs, scenario
    from perfbench.device import device_kind
    from perfbench.profiling import profile
    from perfbench.profiling.profile_table import render

    notes = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    document = scenario.load(arguments.scenario, arguments.set)
    resolved = scenario.resolve(document, *device_kind(document.device))
    for note in resolved.notes:
        notes.print(note)
    scenario.check_against_backbone(resolved)
    comparison = profile.choose(cases.expand(resolved), arguments.case)
    steps = profile.decode_steps(comparison, arguments.steps)
    inputs.check([comparison])
    out = arguments.out or profile.default_out(resolved, comparison)
    found = profile.execute(resolved, comparison, steps, out, notes.print)
    render(found)
    notes.print(f"traces: {out}; look at them with: perfbench view {out}")
    return 0 if all(arm["check"]["status"] == "ok" for arm in found["arms"].values()) else 1


def _view(arguments: argparse.Namespace) -> int:
    """Opens a profile's tables, memory and timeline in the browser, served on 127.0.0.1 only, until Ctrl-C."""
    from perfbench.profiling import view

    if arguments.tensorboard:
        return view.tensorboard(arguments.folder, arguments.port)
    return view.serve(arguments.folder, arguments.port, browser=not arguments.no_browser)


def _compare(arguments: argparse.Namespace) -> int:
    """Prints what differs between two runs: exact figures, and timed ones with their bounds. Gates nothing: exit code
    0, or 2 where the runs can't be compared."""
    from perfbench.gate import policy, stored
    from perfbench.gate.text import print_report

    ours, theirs = (stored.load(run, exact_only=arguments.exact_only) for run in _sides(arguments))
    report = stored.compare(
        policy.load(arguments.policy),
        ours,
        theirs,
        exact_only=arguments.exact_only,
        other_machine=arguments.other_machine,
    )
    print_report(report, verdict=False, every=arguments.all)
    return 0


def _gate(arguments: argparse.Namespace) -> int:
    """Judges a run against a stored one by a policy. Exit codes: 0 pass, 1 regression (a missing or crashed case
    too), 2 invalid input, 3 inconclusive, 4 a fault of perfbench itself."""
    from perfbench.gate import policy, stored
    from perfbench.gate.command import verdict_of, writes_of
    from perfbench.gate.report import Report

    def report() -> Report:
        rules = policy.load(arguments.policy)
        ours, theirs = (stored.load(run, exact_only=arguments.exact_only) for run in _sides(arguments))
        return stored.compare(
            rules, ours, theirs, exact_only=arguments.exact_only, other_machine=arguments.other_machine
        )

    return verdict_of(report, writes_of(arguments.write))


def _ab(arguments: argparse.Namespace) -> int:
    """Measures two revisions of this checkout side by side, in pairs of fresh processes that take turns, and judges
    the candidate. Exit codes: 0 pass, 1 regression, 2 invalid input, 3 inconclusive, 4 a fault of perfbench itself, or
    a control that moved."""
    from datetime import UTC, datetime

    from perfbench.gate import policy
    from perfbench.gate.ab import Plan, compare_revisions
    from perfbench.gate.command import verdict_of, writes_of
    from perfbench.gate.report import Report

    out = arguments.out or Path("runs") / f"ab-{datetime.now(UTC):%Y%m%d-%H%M%S}"

    def report() -> Report:
        return compare_revisions(
            Plan(
                baseline=arguments.baseline,
                candidate=arguments.candidate,
                scenario=arguments.scenario,
                settings=tuple(arguments.set),
                case=arguments.case,
                policy=policy.load(arguments.policy),
                pairs=arguments.pairs,
                blocks=arguments.blocks,
                repetitions=arguments.repetitions,
                seed=arguments.seed,
                out=out,
                record=arguments.record,
            )
        )

    return verdict_of(report, writes_of(arguments.write))


def _say_how_to_go_on(command: str, arguments: argparse.Namespace, out: Path) -> int:
    """After Ctrl-C: the command that resumes, as a shell takes it; the exit code."""
    import shlex

    settings = [word for setting in arguments.set for word in ("--set", setting)]
    words = ["perfbench", *command.split(), str(arguments.config), *settings, "--out", str(out), "--resume"]
    run = getattr(arguments, "run", None)
    words += ["--run", str(run)] if run else []
    print(f"interrupted; go on with: {shlex.join(words)}", file=sys.stderr)
    return EXIT_INTERRUPTED


def _finetune(arguments: argparse.Namespace) -> int:
    """Trains one method on one task with every seed and prints the test metric's median and spread. Goes on after a
    kill with --resume; several GPUs through torchrun or accelerate launch. Exit codes: 0, or 2 for bad input and for a
    loss that is not finite."""
    import os
    from datetime import UTC, datetime

    from perfbench.finetune import config, recipe
    from perfbench.finetune.run_folder import FinetuneFolder
    from perfbench.finetune.summary import render

    if not arguments.out and (arguments.resume or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        reason = "which run directory to go on with" if arguments.resume else "where all processes write"
        raise PerfbenchError(f"{'--resume' if arguments.resume else '--out'}: say with --out {reason}")
    resolved = config.load(arguments.config, arguments.set)
    out = arguments.out or Path("runs") / f"finetune-{resolved.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    try:
        recipe.finetune(resolved, out, resume=arguments.resume)
    except KeyboardInterrupt:
        return _say_how_to_go_on("finetune", arguments, out)
    if int(os.environ.get("RANK", 0)) == 0:
        render(FinetuneFolder.open(out).manifest)
        print(f"results: {out}", file=sys.stderr)
    return 0


def _accuracy(arguments: argparse.Namespace) -> int:
    """Trains each method on each task, asks every test item as trained and as served, and judges each method against a
    reference, and what is served against what was trained. Exit codes: 0 pass, 1 a method is inferior or is not served
    as it was trained, 2 invalid input, 3 inconclusive."""
    from datetime import UTC, datetime

    from perfbench.finetune.accuracy import command, config, table
    from perfbench.finetune.accuracy.run_folder import PAGE

    if arguments.resume and not arguments.out:
        raise PerfbenchError("--resume: say with --out which run directory to go on with")
    resolved = config.load(arguments.config, arguments.set)
    out = arguments.out or Path("runs") / f"accuracy-{resolved.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    try:
        folder, verdict = command.execute(resolved, out, resume=arguments.resume, run=arguments.run)
    except KeyboardInterrupt:
        return _say_how_to_go_on("accuracy", arguments, out)
    table.render(folder.manifest, verdict)
    print(f"results: {out}; the page: {out / PAGE}", file=sys.stderr)
    return verdict.exit_code


def _sides(arguments: argparse.Namespace) -> tuple[Path, Path]:
    return arguments.baseline, arguments.candidate


def _mtbench_answer(arguments: argparse.Namespace) -> int:
    """Answers MT-Bench's two-turn questions with beam search and writes them in FastChat's answer format."""
    from perfbench import backbone
    from perfbench.device import device_kind
    from perfbench.finetune.tasks import mt_bench

    mt_bench.questions(arguments.questions)  # a fault in them shows before the weights are loaded
    loaded = backbone.load(arguments.backbone, arguments.dtype, device_kind(arguments.device)[0], seed=0)
    tokenizer = loaded.tokenizer()
    model = loaded.model
    if arguments.adapter:
        from perfbench.finetune import trained

        model = trained.load(model, arguments.adapter)
    settings = {"beams": arguments.beams, "new_tokens": arguments.new_tokens, "batch": arguments.batch}
    name = arguments.model_id or arguments.out.stem
    count = mt_bench.answer_with(model, tokenizer, arguments.questions, arguments.out, name, **settings)
    print(f"{arguments.out}: {count} answers of {name}")
    return 0


def _mtbench_judge(arguments: argparse.Namespace) -> int:
    """Has an OpenAI-compatible endpoint rate each answer from 1 to 10, as FastChat does, and prints the mean. Nothing
    but the questions, references and answers is sent, and to that address alone. Given again, it goes on."""
    import os

    from perfbench.finetune import judge

    endpoint = judge.Endpoint(arguments.url, arguments.model, os.environ.get(arguments.key_variable, ""))
    found = judge.judge(
        arguments.questions, arguments.answers, arguments.out, endpoint, lambda text: print(text, file=sys.stderr)
    )
    turns = ", ".join(f"turn {turn}: {score:.2f}" for turn, score in found.turns.items())
    mean = "none" if found.score is None else f"{found.score:.2f} ({turns})"
    print(f"mean rating by {arguments.model}: {mean}; {found.judged} judged, {found.unrated} without a rating")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    """Says what this machine can and can't do, and how to mend it. Exit code 0 where perfbench can run."""
    from rich.console import Console

    from perfbench import doctor

    found = doctor.checks()
    Console().print(doctor.render(found))
    return 1 if any(check.status == "missing" for check in found) else 0


if __name__ == "__main__":
    sys.exit(main())
