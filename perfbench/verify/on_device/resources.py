"""What each Triton kernel takes of a GPU as LLaMA-2 7B calls it, compiled ahead of time; needs no GPU.

    python -m perfbench.verify.on_device.resources            # prints the table
    python -m perfbench.verify.on_device.resources --write    # commits it to kernels/resources.json

Registers, spills and shared memory of every program that prefills and decode steps of each method launch, and that
the kernels' launchers do by themselves, for each architecture. A program is named after the call that launches it
first. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from perfbench.kernels import settings, tune
from perfbench.kernels.ahead_of_time import ARCHITECTURES, Launch, compiled, distinct, recording
from perfbench.verify.on_device import call_sites

TABLE = Path(__file__).parents[2] / "kernels" / "resources.json"

ROWS = 8


def launched(kernel: str, rows: int = ROWS, sizes: tune.Sizes | None = None) -> list[Launch]:
    """What `tune` times of `kernel` (a key of settings.DEFAULTS), in bf16 with as many requests as `rows`."""
    call = tune.Problems(rows, sizes or tune.Sizes(), "cpu", torch.bfloat16).call(kernel)
    with recording() as launches:
        call()
    return launches


def sites() -> Iterator[tuple[str, list[Launch]]]:
    """(name, launches) of every call that the table is made of."""
    yield from call_sites.of_seven_b()
    for kernel in tune.CANDIDATES:
        yield "alone", launched(kernel)
    # By default it is the library's; these are the widest tiles that are tried.
    with settings.instead("few_rows_product", "", tune.CANDIDATES["few_rows_product"][-1]):
        yield "alone", launched("few_rows_product")


def named(calls: Iterable[tuple[str, list[Launch]]]) -> dict[str, Launch]:
    """Every program once: "<kernel>: <the call that launches it first>", numbered where that launches several."""
    found: dict[str, Launch] = {}
    known: set[Launch] = set()
    for site, launches in calls:
        for launch in distinct(launches):
            if launch not in known:
                known.add(launch)
                name = f"{launch.name}: {site}"
                taken = sum(1 for other in found if other == name or other.startswith(f"{name} #"))
                found[f"{name} #{taken + 1}" if taken else name] = launch
    return found


def table(capabilities: Sequence[int] = tuple(ARCHITECTURES)) -> dict[str, dict[str, dict[str, int]]]:
    """{program: {sm_<capability>: figures}} of all."""
    programs = sorted(named(sites()).items())
    return {name: {f"sm_{one}": compiled(launch, one) for one in capabilities} for name, launch in programs}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, or writes it where the test finds it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"to {TABLE.name}")
    arguments = parser.parse_args(argv)
    found: dict[str, Any] = {"triton": triton.__version__, "kernels": table()}
    text = json.dumps(found, indent=1)
    if arguments.write:
        TABLE.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
