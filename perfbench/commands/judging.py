"""The commands that compare runs and commits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from perfbench.commands.arguments import add_set, positive
from perfbench.files.paths import stamped


def add(commands: Any) -> None:
    """Adds them to the command line."""
    compare = commands.add_parser("compare", help="what differs between two runs", description=_compare.__doc__)
    compare.add_argument("baseline", type=Path, help="a run directory, or the run.json in it")
    compare.add_argument("candidate", type=Path, help="the run that is compared with it")
    compare.add_argument("--all", action="store_true", help="print also the figures that did not change")
    compare.set_defaults(command=_compare)
    _add_gate_options(compare, writes=False)

    gate = commands.add_parser("gate", help="may this run replace that one?", description=_gate.__doc__)
    gate.add_argument("--baseline", type=Path, required=True, metavar="RUN", help="a run directory, or its run.json")
    gate.add_argument("--candidate", type=Path, required=True, metavar="RUN", help="the run that is to replace it")
    gate.set_defaults(command=_gate)
    _add_gate_options(gate, writes=True)

    ab = commands.add_parser("ab", help="is this commit slower than that one?", description=_ab.__doc__)
    ab.add_argument("scenario", type=Path, help="a YAML file, such as scenarios/gate.yaml")
    about = (
        "a commit, such as main; HEAD with other packages: 'torch==2.12.*', requirements.txt; a server: "
        "http://127.0.0.1:8000/v1; or 'command: ...'"
    )
    ab.add_argument("--baseline", required=True, metavar="SIDE", help=about)
    about = "what is judged, likewise (default: HEAD)"
    ab.add_argument("--candidate", default="HEAD", metavar="SIDE", help=about)
    add_set(ab)
    about = "a Python file that adds methods; one in this repository is each side's own; may be repeated"
    # Under another name than the option has elsewhere: this process measures nothing, and reads no side's methods.
    ab.add_argument("--plugin", dest="plugins", action="append", default=[], metavar="FILE", help=about)
    ab.add_argument("--case", metavar="GLOB", help="only the cases whose id matches, and `none` beside them")
    ab.add_argument("--policy", type=Path, metavar="FILE", help="a YAML of figures and limits")
    ab.add_argument(
        "--pairs", type=positive, default=12, metavar="N", help="pairs of fresh processes in the first batch"
    )
    about = "turns of each case in a pair (default: as many as make 20 for all cases together, and at least 3)"
    ab.add_argument("--blocks", type=positive, metavar="N", help=about)
    ab.add_argument("--repetitions", type=positive, default=1, metavar="N", help="repetitions in a turn")
    ab.add_argument("--seed", type=int, default=0, help="seed of the orders in which the processes take turns")
    ab.add_argument("--out", type=Path, metavar="DIR", help="where every pair is kept (default: runs/ab-<time>)")
    ab.add_argument("--record", action="store_true", help="measure the first batch and judge nothing")
    ab.add_argument("--even-if-same", action="store_true", help="measure also where both sides run the same code")
    about = "count the instructions of a decode step too, on a CPU; takes minutes where valgrind has to count"
    ab.add_argument("--instructions", action="store_true", help=about)
    ab.set_defaults(command=_ab)
    _add_write_option(ab)


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
    from perfbench.gate.gate_report import Report
    from perfbench.gate.outcome import verdict_of, writes_of

    def report() -> Report:
        rules = policy.load(arguments.policy)
        ours, theirs = (stored.load(run, exact_only=arguments.exact_only) for run in _sides(arguments))
        return stored.compare(
            rules, ours, theirs, exact_only=arguments.exact_only, other_machine=arguments.other_machine
        )

    return verdict_of(report, writes_of(arguments.write, exact_only=arguments.exact_only))


def _ab(arguments: argparse.Namespace) -> int:
    """Measures two revisions of this checkout, perfbench's or that of your methods, one with two sets of packages, two
    servers, or two commands of yours, side by side, in pairs of fresh processes that take turns, and judges the
    candidate. Exit codes: 0 pass, 1 regression, 2 invalid input, 3 inconclusive, 4 a fault of perfbench itself, or a
    control or a GPU's clock that moved."""
    from perfbench.gate import policy
    from perfbench.gate.ab import Plan, compare_revisions
    from perfbench.gate.gate_report import Report
    from perfbench.gate.outcome import verdict_of, writes_of

    out = arguments.out or stamped("ab")

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
                even_if_same=arguments.even_if_same,
                plugins=tuple(arguments.plugins),
                instructions=arguments.instructions,
            )
        )

    return verdict_of(report, writes_of(arguments.write))


def _add_gate_options(parser: argparse.ArgumentParser, *, writes: bool) -> None:
    parser.add_argument("--policy", type=Path, metavar="FILE", help="a YAML of figures and limits")
    parser.add_argument("--exact-only", action="store_true", help="read run.json alone; any machine will do")
    parser.add_argument("--other-machine", action="store_true", help="go on where hardware, driver or clocks differ")
    if writes:
        _add_write_option(parser)


def _add_write_option(parser: argparse.ArgumentParser) -> None:
    from perfbench.gate.formats import names

    parser.add_argument(
        "--write",
        action="append",
        default=[],
        metavar="FORMAT=FILE",
        help=f"{', '.join(names())}; may be repeated",
    )


def _sides(arguments: argparse.Namespace) -> tuple[Path, Path]:
    return arguments.baseline, arguments.candidate
