"""What MkDocs runs while it builds the site: the reference pages, made from the code, and formulas as MathML."""

from __future__ import annotations

import argparse
import html
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the site is made of this checkout's code, whatever else is installed

from perfbench import exit_codes  # noqa: E402
from perfbench.cli import parser  # noqa: E402
from perfbench.figures.metrics import METRICS  # noqa: E402
from perfbench.files.yaml_source import read  # noqa: E402
from perfbench.methods.registry import METHODS  # noqa: E402
from perfbench.spec.backbone_config import NAMED_CONFIGS, parameter_count  # noqa: E402
from perfbench.spec.scenario_schema import KERNELS, RUNTIMES, described, schema  # noqa: E402
from perfbench.spec.traffic_schema import schema as traffic_schema  # noqa: E402

MADE = "\n*This page is made from the code when the site is built.*\n"


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; what is in a cell is Markdown already."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *([cell or "—" for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def plain(text: object) -> str:
    """Text of the code as Markdown that shows it as it is; what stands between backticks stays code."""
    parts = " ".join(str(text).split()).split("`")
    shown = [
        part if place % 2 else re.sub(r"([*_\[\]])", r"\\\1", html.escape(part)) for place, part in enumerate(parts)
    ]
    return "`".join(shown)


def subcommands(command: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Name -> parser of the commands below `command`."""
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def leaves(command: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Every command that can be run, in the order of `--help`."""
    below = subcommands(command)
    for one in below.values():
        yield from leaves(one)
    if not below:
        yield command


def argument_row(action: argparse.Action) -> list[str]:
    """The row of one option or positional argument: how it is written, what it means, what it takes, its default."""
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    takes = "" if action.nargs == 0 else f"`{action.metavar or action.dest.upper()}`" if action.option_strings else ""
    if action.choices is not None:
        takes = ", ".join(f"`{choice}`" for choice in action.choices)
    said = plain(str(action.help or "").replace("%%", "%"))
    shown = action.default not in (None, False, [], argparse.SUPPRESS) and "default" not in said
    default = f"`{action.default}`" if shown and not callable(action.default) else ""
    return [names, said + (" (required)" if action.option_strings and action.required else ""), takes, default]


def commands_page() -> str:
    """Every command with its options, from argparse."""
    parts = ["# Commands", MADE]
    for command in leaves(parser()):
        rows = [argument_row(action) for action in command._actions if action.dest != "help"]
        parts += [f"## {command.prog}", plain(command.description or "")]
        command.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=76)
        parts += ["", f"```text\n{command.format_usage().strip()}\n```"]
        parts += ["", table(("argument", "meaning", "takes", "default"), rows)] if rows else []
    return "\n".join(parts)


def exit_codes_page() -> str:
    """What each command says of its exit codes, and the codes that all commands share."""
    rows = []
    for command in leaves(parser()):
        found = re.search(r"(?:Same exit codes|\b[Ee]xit codes?)\b.*", " ".join((command.description or "").split()))
        rows.append([f"`{command.prog}`", plain(found[0] if found else "Only the codes that all commands share.")])
    shared = {
        exit_codes.OK: "The command did what was asked, and found nothing that stands against it.",
        exit_codes.BAD_INPUT: "Something that the user can mend is wrong: a file, a field, an option. One line says "
        "which file and line, what was expected, what came, and the nearest name that would have been right.",
        exit_codes.FAULT: "Nobody foresaw this: a fault of perfbench itself. One line names the traceback's file.",
        exit_codes.INTERRUPTED: "Ctrl-C, SIGTERM or SIGHUP ended the command. It says how to go on, where it can.",
        exit_codes.BROKEN_PIPE: "Whatever was reading the output closed it, as `head` does.",
    }
    return "\n".join(
        ["# Exit codes", MADE, "A script can rely on the exit code alone: no failed check and no regression ends with "
         "`0`, and no fault of the harness with the code of a regression.",
         "\n## Codes that all commands share\n",
         table(("code", "meaning"), ([f"`{code}`", about] for code, about in shared.items())),
         "\n## What each command adds\n", table(("command", "what it says"), rows)]
    )  # fmt: skip


def field_rows(properties: dict[str, Any], required: Iterable[str] = ()) -> Iterator[list[str]]:
    """One row for each field of a JSON Schema object."""
    for name, field in properties.items():
        default = f"`{json.dumps(field['default'])}`" if "default" in field else ""
        kind = "a mapping" if field.get("type") == "object" else described(field)
        needed = "required" if name in required else default
        yield [f"`{name}`", plain(field.get("description", "")), plain(kind), needed]


def scenario_page() -> str:
    """Every field of a scenario, from its JSON Schema."""
    heads, found = ("field", "meaning", "takes", "default"), schema()
    workload = found["properties"]["workload"]["anyOf"][0]
    parts = [
        "# Scenario fields", MADE,
        "A scenario is a YAML file. A key that is not listed here is refused, with the file, the line and the nearest "
        "name. `perfbench validate --schema` prints the same as a JSON Schema, which an editor can use.",
        "\n## Top level\n", table(heads, field_rows(found["properties"], found["required"])),
        "\n## `workload`\n", table(heads, field_rows(workload["properties"], workload["required"])),
        "\n## `methods`\n",
        "A method is a name, or a mapping of one name to its options: `{lora: {rank: 8}}`.",
    ]  # fmt: skip
    for method, options in found["properties"]["methods"]["items"]["anyOf"][1]["properties"].items():
        parts += [f"\n### `{method}`\n", plain(options["description"]), ""]
        rows = list(field_rows(options["properties"]))
        parts.append(table(heads, rows) if rows else "This arm has no options.\n")
    parts += [
        "\n# Fields of a traffic scenario\n",
        "`perfbench traffic` reads these; see [how many tenants a server holds](../how-to/traffic.md).\n",
    ]
    own = traffic_schema()["properties"]
    own = {name: field for name, field in own.items() if name not in ("methods", "overrides")}
    parts.append(table(heads, field_rows(own)))
    for name in ("traffic", "server", "target", "targets"):
        parts += [f"\n## `{name}`\n", table(heads, field_rows(own[name]["properties"], own[name].get("required", ())))]
    return "\n".join(parts)


def metrics_page() -> str:
    """Every figure with its unit, from the one catalogue that defines them."""
    rows = ([f"`{name}`", plain(one.definition), plain(one.unit), one.better or ""] for name, one in METRICS.items())
    return "\n".join(
        ["# Figures", MADE, "N is the number of new tokens, and an arm is one method in one comparison. "
         "[What is measured](../measured/figures.md) explains them in sentences.\n",
         table(("figure", "definition", "unit", "better"), rows)]
    )  # fmt: skip


def choices_page() -> str:
    """Methods, backbones, runtimes, kernel sets and shipped scenarios: what `perfbench list` prints first."""
    folder = ROOT / "scenarios"
    files = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.relative_to(folder).parts), path))
    shapes = ((f"`{name}`", f"{parameter_count(one) / 1e6:,.1f}M parameters") for name, one in NAMED_CONFIGS.items())
    asked = ((f"`{path.relative_to(ROOT)}`", plain(read(path).values.get("question", ""))) for path in files)
    sections = {
        "Methods": ((f"`{name}`", plain(one.summary)) for name, one in METHODS.items()),
        "Named backbones, with random weights": shapes,
        "Runtimes": ((f"`{name}`", plain(about)) for name, about in RUNTIMES.items()),
        "Kernel sets": ((f"`{name}`", plain(about)) for name, about in KERNELS.items()),
        "Shipped scenarios and configurations": asked,
    }
    parts = ["# Choices", MADE, "`perfbench list` prints these, and the tasks and the methods that can be trained."]
    return "\n".join(
        [*parts, *(f"\n## {title}\n\n{table(('name', 'what'), rows)}" for title, rows in sections.items())]
    )


PAGES = {
    "reference/commands.md": commands_page,
    "reference/scenario.md": scenario_page,
    "reference/metrics.md": metrics_page,
    "reference/choices.md": choices_page,
    "reference/exit-codes.md": exit_codes_page,
}


def on_files(files: Any, config: Any) -> Any:
    """MkDocs: adds the pages that are made."""
    from mkdocs.structure.files import File

    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page()))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """MkDocs: each formula, written in LaTeX between dollars, becomes MathML, which browsers draw by themselves."""
    from latex2mathml.converter import convert

    def drawn(found: re.Match[str]) -> str:
        display = "block" if found[1] == r"\[" else "inline"
        return convert(html.unescape(found[2]), display=display)

    return re.sub(r'<(?:span|div) class="arithmatex">(\\[(\[])(.*?)\\[)\]]</(?:span|div)>', drawn, content, flags=re.S)
