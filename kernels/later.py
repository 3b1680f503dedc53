"""A Triton form that is imported when it is first called: triton is only there on Linux, and takes its time."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def later(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of kernels/<module>.py. ImportError when it is called where triton is not there."""

    def call(*arguments: Any) -> Any:
        return getattr(import_module(f"perfbench.kernels.{module}"), name)(*arguments)

    return call
