"""Every error a user can cause, and how a wrong name is answered. Free of torch.

Each message is one line: where (file and line, or field), what was expected, what came, and the remedy.
The command line prints it without a traceback and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# A message quotes what came, which may be of any length.
_LONGEST = 1400
_END = 300


class PerfbenchError(Exception):
    """The input can't be used as it is. Exit code 2. Its message is made one line that a terminal shows as it is,
    whatever it quotes, and cut in the middle where it is long."""

    def __init__(self, message: str) -> None:
        if not message.isprintable():
            shown = (char if char.isprintable() else " " if char.isspace() else "\ufffd" for char in message)
            message = "".join(shown)
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST - _END]} ... {message[-_END:]}"
        super().__init__(message)


class ScenarioError(PerfbenchError):
    """A scenario file, or a `--set` on top of it, is malformed or asks for the impossible."""


class BackboneError(PerfbenchError):
    """A backbone does not exist, can't be fetched, or is not of the Llama family."""


class AdapterError(PerfbenchError):
    """An adapter folder is malformed, unsafe, not finite, or made for another backbone."""


class RunDirectoryError(PerfbenchError):
    """A run directory can't be written, read or resumed."""


class TraceError(PerfbenchError):
    """A profile or trace is not there, torn, too large, or can't be made or shown."""


class PolicyError(PerfbenchError):
    """A gate's policy file is malformed, or names a figure that can't be gated as it asks."""


class ComparisonError(PerfbenchError):
    """Two runs, or two revisions, can't be compared."""


class TaskError(PerfbenchError):
    """A task's data, or what its metric needs, is missing or malformed."""


class FinetuneError(PerfbenchError):
    """A fine-tuning, a search or a verdict on accuracy can't be done as it is asked for."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail of an error message on an unknown `name`: its nearest neighbour, or all that is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
