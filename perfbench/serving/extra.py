"""The web framework is an extra: without it one line says how to have it. Free of torch."""

from __future__ import annotations

from importlib.util import find_spec

from perfbench.errors import PerfbenchError


def need(what: str) -> None:
    """PerfbenchError where aiohttp, which `what` needs, is not installed."""
    if find_spec("aiohttp") is None:
        raise PerfbenchError(f"{what}: needs aiohttp, which is not installed; pip install 'adapter-perfbench[serve]'")
