"""What several commands take from the command line, and give back to it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from perfbench.errors import PerfbenchError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


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
    about = "change a field; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=about)


def add_out(parser: argparse.ArgumentParser, default: str) -> None:
    """`--out DIR` and `--resume`."""
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"the folder of results (default: {default})")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")


def add_format(parser: argparse.ArgumentParser, default: str) -> None:
    """`--format NAME`, of `report.formats.FORMATS`, which refuses another by naming the nearest."""
    from perfbench.report.formats import FORMATS

    about = f"{', '.join(FORMATS)} (default: {default})"
    parser.add_argument("--format", default=default, metavar="NAME", help=about)


def stamped(name: str) -> Path:
    """runs/<name>-<time>."""
    return Path("runs") / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def out_of(arguments: argparse.Namespace, default: Path, what: str) -> Path:
    """Where the results go. PerfbenchError where an unnamed `what` is to be resumed."""
    if arguments.resume and not arguments.out:
        raise PerfbenchError(f"--resume: say with --out which {what} to go on with")
    return Path(arguments.out or default)


def interrupted(command: Sequence[str | Path], arguments: argparse.Namespace, out: Path) -> int:
    """Says how to go on, and returns the exit code."""
    if not out.is_dir():
        print(f"interrupted; {out} is not there, so there is nothing to go on with", file=sys.stderr)
        return EXIT_INTERRUPTED
    settings = [word for setting in getattr(arguments, "set", []) for word in ("--set", setting)]
    line = shlex.join(["perfbench", *map(str, command), *settings, "--out", str(out), "--resume"])
    print(f"interrupted; go on with: {line}", file=sys.stderr)
    return EXIT_INTERRUPTED
