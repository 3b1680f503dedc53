"""The command line: `perfbench COMMAND`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from perfbench import __version__, crash_report, exit_codes, interruption
from perfbench.commands import judging, looking, measuring, planning, serving, studying, training
from perfbench.commands.arguments import Parser
from perfbench.errors import PerfbenchError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 2 for any error that the user can mend, 4 for one that nobody
    foresaw, each in one line."""
    arguments = parser().parse_args(argv)
    try:
        with interruption.as_ctrl_c():
            if hasattr(arguments, "plugin"):
                from perfbench.spec import method_plugins

                method_plugins.load(arguments.plugin)
            code = int(arguments.command(arguments))
        sys.stdout.flush()
        return code
    except PerfbenchError as error:
        print(f"perfbench: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except KeyboardInterrupt:
        print("perfbench: interrupted", file=sys.stderr)
        return exit_codes.INTERRUPTED
    except BrokenPipeError:
        # What is left in the buffer would be written, and fail again, when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.BROKEN_PIPE
    except Exception as error:
        if isinstance(error, OSError) and (refused := crash_report.of_the_system(error)):
            print(f"perfbench: {refused}", file=sys.stderr)
            return exit_codes.BAD_INPUT
        print(f"perfbench: {crash_report.in_one_line(error)}", file=sys.stderr)
        return exit_codes.FAULT


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    made = Parser(
        prog="perfbench",
        description="Which adapter method should one language model serve to many tenants, and what does it cost?",
    )
    made.add_argument("--version", action="version", version=f"perfbench {__version__}")
    commands = made.add_subparsers(metavar="COMMAND", required=True)
    for group in (measuring, planning, serving, looking, judging, training, studying):
        group.add(commands)
    return made


if __name__ == "__main__":
    sys.exit(main())
