"""The command that plans a fleet."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from perfbench.commands.arguments import add_format, add_plugin, positive
from perfbench.errors import PerfbenchError
from perfbench.methods.dtypes import DTYPES

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

    if arguments.check is not None:
        from perfbench.capacity import check

        put(check.table(arguments.check), arguments.format)
        return 0
    from perfbench.capacity.answer import answer
    from perfbench.capacity.question import Question, prepare

    if missing := [name for name in _NEEDED if getattr(arguments, name) is None]:
        raise PerfbenchError(f"plan: expected --{missing[0]} too (see perfbench plan --help)")
    asked = Question(
        model=arguments.model,
        device=arguments.device,
        tenants=arguments.tenants,
        rate=arguments.rate,
        slo=arguments.slo,
        methods=arguments.methods,
        dtype=arguments.dtype,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        zipf=arguments.zipf,
        price_per_hour=arguments.price_per_hour,
        rows=arguments.rows,
        runs=arguments.run,
    )
    put(answer(prepare(asked)), arguments.format)
    return 0
