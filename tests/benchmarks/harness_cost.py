"""What measuring costs: the time that a repetition reports against the same generation timed by hand.

    python -m tests.benchmarks.harness_cost --rounds 60

Both take turns in an order drawn for each round; the ratio is theirs within a round. `transformers` by hand is a call
of `generate()` between two looks at the clock, `static` a loop over its decoder.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable
from typing import Any

import torch

from perfbench.figures.stats import median_interval
from perfbench.measure.on_device.arms import PLAN_ARMS
from perfbench.measure.on_device.repetition import repetition
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch

NEW = 32


def by_hand_transformers(arm: Any, batch: Batch) -> float:
    """Milliseconds of one generation on the Hugging Face model."""
    start = time.perf_counter()
    with torch.inference_mode():
        arm.model.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask,
            min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False, pad_token_id=0,
        )  # fmt: skip
    return (time.perf_counter() - start) * 1e3


def by_hand_static(arm: Any, batch: Batch) -> float:
    """Milliseconds of one generation on the decoder that the arm has made for this batch."""
    start = time.perf_counter()
    with torch.inference_mode():
        arm.decoder.start(batch)
        tokens = [arm.decoder.prefill().argmax(dim=-1)]
        for _ in range(NEW - 1):
            tokens.append(arm.decoder.step(tokens[-1]).argmax(dim=-1))
        torch.stack(tokens, dim=1)
    return (time.perf_counter() - start) * 1e3


BY_HAND: dict[str, Callable[[Any, Batch], float]] = {
    "transformers": by_hand_transformers,
    "static": by_hand_static,
}


def ratios(runtime: str, base: backbone.Backbone, rounds: int, seed: int = 0) -> list[float]:
    """The reported time / the time by hand, one for each round; the bare backbone, 4 requests of 64 tokens."""
    ids = torch.randint(3, base.shape.vocab, (4, 64), generator=torch.Generator().manual_seed(seed))
    batch = Batch(ids, torch.ones_like(ids), (-1,) * 4, beams=1, new_tokens=NEW)
    arm, draw = PLAN_ARMS[runtime](base, None, "eager"), random.Random(seed)
    arm.generate(batch)  # static makes its decoder for the first batch of a size
    gc.collect()
    gc.freeze()  # as the worker does once all is warm: a long collection would leave cold caches to what follows
    turns: dict[str, Callable[[], float]] = {
        "reported": lambda: repetition(arm, batch, base.device, None).sample["total_ms"],
        "by hand": lambda: BY_HAND[runtime](arm, batch),
    }
    found = []
    for _ in range(rounds + 2):
        times = {name: turns[name]() for name in draw.sample(list(turns), 2)}
        found.append(times["reported"] / times["by hand"])
    return found[2:]  # the first two warm up


def main() -> None:
    """Prints one line for each runtime."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.harness_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--backbone", default="llama-256x8")
    arguments = parser.parse_args()
    for runtime in BY_HAND:
        base = backbone.load(arguments.backbone, "fp32", "cpu", seed=0)
        found = median_interval(ratios(runtime, base, arguments.rounds))
        print(f"{runtime}: reported / by hand {found['ratio']:.4f} [{found['low']:.4f}, {found['high']:.4f}]")


if __name__ == "__main__":
    main()
