"""The progress bar of a run, on standard error; plain lines where that is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# A log has a line for each case, and one in between where it would be silent for longer.
SILENCE_S = 15.0


def say(text: str) -> None:
    """A line for whoever waits, of work whose steps nobody can count beforehand."""
    print(text, file=sys.stderr, flush=True)


class RunProgress:
    """One bar over all steps of a run: a step is the preparation of a case, or one repetition of it."""

    def __init__(self, steps: int, console: Console | None = None):
        # In a notebook rich would show each line as an output of its own, which is kept with the notebook.
        self._console = console or Console(stderr=True, force_jupyter=False)
        self._bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=steps)
        self._spoken: str | None = None
        self._spoken_at = 0.0

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def say(self, subject: str, text: str) -> None:
        """What is being done now, and to which case."""
        self._bar.update(self._task, description=escape(f"{subject.rsplit('/', 1)[-1]}: {text}"))
        now = time.monotonic()
        # In the rounds the cases take turns, so that each would be a new one.
        new = subject != self._spoken and not text.startswith("round")
        if not self._console.is_terminal and (new or now - self._spoken_at >= SILENCE_S):
            self._console.print(f"{subject}: {text}", markup=False, highlight=False, soft_wrap=True)
            self._spoken, self._spoken_at = subject, now

    def warn(self, text: str) -> None:
        """A line that stays, on a terminal too."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self) -> None:
        """One step done."""
        self._bar.advance(self._task)

    def already(self, steps: int) -> None:
        """Steps that an earlier run has done."""
        self._bar.advance(self._task, steps)
