"""SIGTERM and SIGHUP end a command as Ctrl-C does: children ended, scratch removed, and a line that says how to go on.

Free of torch.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What a scheduler, a container or a closed terminal sends; Windows has no SIGHUP.
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def as_ctrl_c() -> Iterator[None]:
    """While it is open, these signals raise KeyboardInterrupt, once: what follows it is not interrupted in turn by a
    second. One that was ignored before, as under nohup, stays ignored; outside of the main thread nothing changes."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {one: signal.signal(one, _raise) for one in _ENDING if signal.getsignal(one) is signal.SIG_DFL}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    for one in _ENDING:
        signal.signal(one, signal.SIG_IGN)
    raise KeyboardInterrupt
