"""What several commands take from the command line, and give back to it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from perfbench import exit_codes
from perfbench.errors import PerfbenchError, nearest
from perfbench.files.plain_text import printable


class Parser(argparse.ArgumentParser):
    """argparse whose every refusal is one line with the nearest valid word; exit code 2. Sub-commands' parsers are of
    this class too."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """A sub-command, or the value of an option with choices. argparse has no public place for it."""
        if action.choices is not None and value not in action.choices:
            what = "value" if action.option_strings else "command"
            raise argparse.ArgumentError(action, f"unknown {what} {value!r}; {nearest(str(value), action.choices)}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but what is not known is refused here, where the options of the sub-command are known."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            if not word.startswith("-"):
                self.error(f"unexpected argument {word!r}")
            self.error(f"unknown option {word!r}; {nearest(word, self._option_string_actions)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """One line on standard error, and exit code 2."""
        self.exit(exit_codes.BAD_INPUT, f"{self.prog}: {printable(message)} (see {self.prog} --help)\n")


def positive(text: str) -> int:
    """An integer >= 1 of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def port(text: str) -> int:
    """A TCP port of the command line; 0 is any that is free."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def add_set(parser: argparse.ArgumentParser) -> None:
    """`--set KEY=VALUE`."""
    about = "change a field of the file, such as workload.tenants=4; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=about)


def add_plugin(parser: argparse.ArgumentParser) -> None:
    """`--plugin FILE`. What has it knows the methods of installed packages as well."""
    about = "a Python file that adds methods; may be repeated"
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE", help=about)


def add_out(parser: argparse.ArgumentParser, default: str) -> None:
    """`--out DIR` and `--resume`."""
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"the new folder of results (default: {default})")
    parser.add_argument("--resume", action="store_true", help="go on with what was begun in --out")


def add_format(parser: argparse.ArgumentParser, default: str) -> None:
    """`--format NAME`, of `report.formats.FORMATS`."""
    from perfbench.report.formats import FORMATS

    about = f"{', '.join(FORMATS)} (default: {default})"
    parser.add_argument("--format", choices=FORMATS, default=default, metavar="NAME", help=about)


def out_of(arguments: argparse.Namespace, default: Path, what: str) -> Path:
    """Where the results go. PerfbenchError where an unnamed `what` is to be resumed."""
    if arguments.resume and not arguments.out:
        raise PerfbenchError(f"--resume: say with --out which {what} to go on with")
    return Path(arguments.out or default)


def interrupted(command: Sequence[str | Path], arguments: argparse.Namespace, out: Path) -> int:
    """Says how to go on, and returns the exit code."""
    if not out.is_dir():
        print(f"interrupted; {out} is not there, so there is nothing to go on with", file=sys.stderr)
        return exit_codes.INTERRUPTED
    settings = [word for setting in getattr(arguments, "set", []) for word in ("--set", setting)]
    settings += [word for file in getattr(arguments, "plugin", []) for word in ("--plugin", file)]
    line = shlex.join(["perfbench", *map(str, command), *settings, "--out", str(out), "--resume"])
    print(f"interrupted; go on with: {line}", file=sys.stderr)
    return exit_codes.INTERRUPTED
