"""A child process that keeps its backbone: job after job, each as worker.py does it, without loading again.

It reads jobs, one line of JSON each, until standard input ends, and says `done` after each. `perfbench run` starts a
fresh process for each job instead; this one is for `perfbench verify`, whose minutes are counted.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

from perfbench.measure.on_device import worker
from perfbench.measure.on_device.worker import Emit, serve


def main() -> int:
    """Serves jobs until standard input ends; exit code 0, or 1 after an `error` event. Its libraries are loaded before
    the first job comes: the parent starts this process ahead of time."""
    return serve(_serve)


def _serve(emit: Emit) -> None:
    import torch

    from perfbench.runtimes import backbone

    kept = KeptBackbone(backbone.load)
    backbone.load = kept.load  # where the worker's sessions get theirs, in this process
    for line in sys.stdin:
        job = json.loads(line)
        worker._run(job, emit)
        kept.tidy()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        emit("done")


class KeptBackbone:
    """`backbone.load` that gives the last one again where it is asked for the same; it holds one at a time."""

    def __init__(self, load: Any):
        self._load = load
        self._asked: tuple[str, str, str, int, str] | None = None
        self._found: Any = None

    def load(self, name: str, dtype: str, device: str, seed: int, quantisation: str = "none") -> Any:
        """As `backbone.load`."""
        asked = (name, dtype, device, seed, quantisation)
        if asked != self._asked:
            self._asked = self._found = None
            self.tidy()
            self._found = self._load(*asked)
            self._asked = asked
        return self._found

    def tidy(self) -> None:
        """Lets go of what the last job's arms left: the tails that runtime static gave the weights, and the objects
        that a warmed-up session takes out of garbage collection."""
        if self._found is not None:
            self._found.fused = None  # is made again, in no time, from the weights where they are
        gc.unfreeze()
        gc.collect()


if __name__ == "__main__":
    sys.exit(main())
