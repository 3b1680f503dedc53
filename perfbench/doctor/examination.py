"""All checks in the order in which one would mend things, and how they are printed; by rich where it is there.

The doctor is what one calls where packages are missing: it needs none of them, and a check that does is skipped.
"""

from __future__ import annotations

from typing import Any

from perfbench import exit_codes
from perfbench.doctor import machine, packages
from perfbench.doctor.check import Check, Status

STYLES: dict[Status, str] = {"ok": "green", "warn": "yellow", "missing": "red"}
HEADINGS = ("", "check", "finding", "what to do")


def checks() -> list[Check]:
    """Every check. Takes some seconds: it imports torch."""
    return [*packages.all_of_them(), *machine.all_of_them()]


def exit_code(found: list[Check]) -> int:
    """0 where perfbench can run, else 1."""
    return exit_codes.FAILED if any(check.status == "missing" for check in found) else exit_codes.OK


def show(found: list[Check]) -> None:
    """Prints the checks with a closing line, as a table of rich's, or, without rich, as plain lines."""
    try:
        from rich.console import Console
    except ImportError:
        print(plain(found))
    else:
        Console().print(render(found))


def render(found: list[Check]) -> Any:
    """The checks as a rich table with a closing line; text from the machine is never read as markup."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(*HEADINGS, show_header=True, box=None, pad_edge=False)
    for check in found:
        status = Text(check.status, style=STYLES[check.status])
        table.add_row(status, Text(check.name), Text(check.finding), Text(check.remedy))
    return Group(table, Text(), *(Text(line) for line in closing(found)))


def plain(found: list[Check]) -> str:
    """The same as text: a line for each check, and below it what to do."""
    wide = max((len(check.name) for check in found), default=0)
    lines = []
    for check in found:
        lines.append(f"{check.status:7}  {check.name:{wide}}  {check.finding}")
        if check.remedy:
            lines.append(f"{'':7}  {'':{wide}}  -> {check.remedy}")
    return "\n".join([*lines, "", *closing(found)])


def closing(found: list[Check]) -> list[str]:
    """The verdict, and, where several packages are to be installed, one command for all of them."""
    wanted = [
        check.remedy.removeprefix(packages.INSTALL)
        for check in found
        if check.status != "ok" and check.remedy.startswith(packages.INSTALL)
    ]
    at_once = [f"All packages at once: {packages.INSTALL}{' '.join(wanted)}"] if len(wanted) > 1 else []
    return [verdict(found), *at_once]


def verdict(found: list[Check]) -> str:
    """One sentence: whether this machine can measure, and how many lines ask for attention."""
    missing = [check.name for check in found if check.status == "missing"]
    warned = [check.name for check in found if check.status == "warn"]
    if missing:
        return f"This machine can't run perfbench yet: mend {', '.join(missing)}."
    if warned:
        return f"This machine can run perfbench; read what is said of {', '.join(warned)}."
    return "This machine can run perfbench."
