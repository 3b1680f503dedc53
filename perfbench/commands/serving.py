"""The commands around servers: one that serves, and those that give others the same adapters, or such as they take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from perfbench.commands.arguments import add_plugin, add_set, port, positive
from perfbench.profiling.view import HOST

DEFAULT_PORT, DEFAULT_WAITING = 8000, 1024


def add(commands: Any) -> None:
    """Adds it to the command line."""
    serve = commands.add_parser("serve", help="a server for many tenants, over HTTP", description=_serve.__doc__)
    serve.add_argument("scenario", type=Path, help="a YAML file of traffic, or a name that `perfbench list` has")
    about = f"0 is any that is free (default: {DEFAULT_PORT})"
    serve.add_argument("--port", type=port, default=DEFAULT_PORT, metavar="N", help=about)
    about = f"the address to listen on; anybody who reaches it is served (default: {HOST}, this machine alone)"
    serve.add_argument("--host", default=HOST, metavar="ADDRESS", help=about)
    serve.add_argument("--method", metavar="NAME", help="which of the scenario's methods (default: the first)")
    about = "how many tenants have a model (default: the most of the scenario, or twice the resident ones)"
    serve.add_argument("--tenants", type=positive, metavar="N", help=about)
    about = f"how many requests may wait for a row; more get status 429 (default: {DEFAULT_WAITING})"
    serve.add_argument("--waiting", type=positive, default=DEFAULT_WAITING, metavar="N", help=about)
    add_set(serve)
    add_plugin(serve)
    serve.set_defaults(command=_serve)
    export = commands.add_parser(
        "export", help="a scenario's adapters as folders, for another server", description=_export.__doc__
    )
    export.add_argument("scenario", type=Path, help="a YAML file of traffic, or a name that `perfbench list` has")
    export.add_argument("--method", metavar="NAME", help="which of the scenario's methods (default: the first)")
    about = "how many tenants get a folder (default: the most of the scenario, or twice the resident ones)"
    export.add_argument("--tenants", type=positive, metavar="N", help=about)
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    add_set(export)
    add_plugin(export)
    export.set_defaults(command=_export)
    convert = commands.add_parser("convert", help="an adapter as LoRA", description=_convert.__doc__)
    convert.add_argument("adapter", type=Path, help="an adapter folder, perfbench's or PEFT's")
    convert.add_argument("--rank", type=positive, required=True, metavar="N", help="of the LoRA that it becomes")
    about = "a folder or hub id with its weights (default: what the adapter's configuration names)"
    convert.add_argument("--backbone", metavar="NAME", help=about)
    convert.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    convert.set_defaults(command=_convert)


def _serve(arguments: argparse.Namespace) -> int:
    """Serves one method of a traffic scenario as OpenAI's completions, with a model for each tenant, until Ctrl-C. Exit
    codes: 2 bad input, 4 the engine failed, 130 ended by Ctrl-C."""
    from rich.console import Console

    from perfbench import api
    from perfbench.serving.extra import need

    need("serve")
    from perfbench.serving.on_device import launch

    notes = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    scenario = api.prepare_traffic(arguments.scenario, set=arguments.set, say=notes.print)
    launch.serve(
        scenario, host=arguments.host, port=arguments.port, method=arguments.method, tenants=arguments.tenants,
        most_waiting=arguments.waiting, say=notes.print,
    )  # fmt: skip
    return 0


def _export(arguments: argparse.Namespace) -> int:
    """Writes the random adapters that a traffic scenario's tenants have as PEFT checkpoints, so that another server can
    load the very ones by which its answers are then proved. Exit code: 2 bad input."""
    from rich.console import Console

    from perfbench import api

    notes = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    scenario = api.prepare_traffic(arguments.scenario, set=arguments.set, say=notes.print)
    from perfbench.serving.choice import chosen, most_tenants
    from perfbench.serving.on_device.export import export

    tenants = arguments.tenants or most_tenants(scenario)
    export(scenario, chosen(scenario, arguments.method), tenants, arguments.out, notes.print)
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    """Writes the LoRA of a rank that is nearest to what an adapter does to each weight, as a PEFT checkpoint, and says
    what is lost. Exit code: 2 bad input, such as an adapter whose scales depend on the prompt."""
    from rich.console import Console

    from perfbench.serving.on_device.convert import convert

    notes = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    convert(arguments.adapter, arguments.backbone, arguments.rank, arguments.out, notes.print)
    return 0
