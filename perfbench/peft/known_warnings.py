"""What PEFT warns of while it makes or loads an adapter, and what is meant so here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

KNOWN = (
    # PEFT takes AdaLoRA's ranks, which name parameters, for LoRA's, which name modules.
    "The following rank_pattern keys did not match",
    # It can't merge such a bias into a linear that has none, and nothing here asks it to.
    "`lora_bias=True` was passed but the targeted layer",
    # PEFT asks a model by transformers' old name.
    "`is_gradient_checkpointing` is deprecated",
)


@contextmanager
def unsaid() -> Iterator[None]:
    """Within it PEFT does not say what is known."""
    with warnings.catch_warnings():
        for message in KNOWN:
            warnings.filterwarnings("ignore", message=message)
        yield
