"""The command that plans a fleet."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfbench.commands.arguments import add_format, add_plugin, positive
from perfbench.errors import PerfbenchError
from perfbench.methods.dtypes import DTYPES

if TYPE_CHECKING:
    from perfbench.report.plain_tables import PlainTables

_NEEDED = ("model", "device", "tenants", "rate", "slo")


def add(commands: Any) -> None:
    """Adds it to the command line."""
    plan = commands.add_parser("plan", help="how many devices a fleet needs", description=_plan.__doc__)
    plan.add_argument("--model", metavar="NAME", help="the backbone: a named shape, folder or hub id")
    plan.add_argument("--device", metavar="NAME", help="a GPU, such as h100; cpu with --run only")
    plan.add_argument("--tenants", type=positive, metavar="N", help="how many send requests")
    plan.add_argument("--rate", type=float, metavar="R", help="requests a second of all tenants together")
    about = "targets with their units, such as ttft=500ms,itl=40ms; share=0.99 of the requests keep both"
    plan.add_argument("--slo", metavar="TARGETS", help=about)
    about = "methods, with options as in a scenario: 'lora, fanlora: {rank: 8}' (default: lora, fanlora, ia3, para)"
    plan.add_argument("--methods", default="lora, fanlora, ia3, para", metavar="NAMES", help=about)
    plan.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="type of weights, cache and arithmetic")
    about = "tokens, or as a traffic file has them: '{median: 128, sigma: 0.7, most: 512}' (default: this)"
    plan.add_argument("--prompt-tokens", metavar="N", help=about)
    about = "likewise, of each answer (default: '{median: 64, sigma: 0.5, most: 128}')"
    plan.add_argument("--new-tokens", metavar="N", help=about)
    about = "exponent of the tenants' popularity; 0: all send alike (default: 1)"
    plan.add_argument("--zipf", type=float, metavar="S", help=about)
    about = "requests in flight of a device (default: with which fewest devices are needed)"
    plan.add_argument("--rows", type=positive, metavar="N", help=about)
    about = "what an hour of a device costs, in any currency"
    plan.add_argument("--price-per-hour", type=float, metavar="X", help=about)
    about = "a run of this model on this device, whose step times are used beside the roof; may be repeated"
    plan.add_argument("--run", type=Path, nargs="+", action="extend", default=[], metavar="FOLDER", help=about)
    about = "in place of all that: simulate a measured traffic run, and show both"
    plan.add_argument("--check", type=Path, metavar="FOLDER", help=about)
    add_format(plan, "table")
    add_plugin(plan)
    plan.set_defaults(command=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    """Says how many devices a fleet of tenants needs with each method, by simulating the server with step times from
    the device's roof, or from measured runs; runs nothing. Exit code 2 where no number of devices will do."""
    from perfbench.report.formats import put

    put(planned(arguments), arguments.format)
    return 0


def planned(arguments: argparse.Namespace) -> PlainTables:
    """What the command's arguments ask for. PerfbenchError for what can't be planned."""
    from perfbench.capacity import check
    from perfbench.capacity.answer import answer
    from perfbench.capacity.question import Question, prepare

    if arguments.check is not None:
        return check.table(arguments.check)
    if missing := [name for name in _NEEDED if getattr(arguments, name) is None]:
        raise PerfbenchError(f"plan: expected --{missing[0]} too (see perfbench plan --help)")
    names = {field.name for field in fields(Question)} - {"runs"}
    asked = {name: value for name, value in vars(arguments).items() if name in names}
    return answer(prepare(Question(**asked, runs=arguments.run)))
