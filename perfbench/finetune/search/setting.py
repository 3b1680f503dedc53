"""A FanLoRA setting: the modules that each layer keeps, chosen by their scores, as a file that `methods` takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perfbench.errors import FinetuneError
from perfbench.files.whole import replace
from perfbench.methods.shape import MODULES, Setting


def keep(values: Sequence[Sequence[float]], k_max: int) -> Setting:
    """In each layer the `k_max` modules with the highest scores, those with a negative one dropped; of equal ones the
    first in running order. FinetuneError where the scores tell nothing apart, or nothing is left."""
    if len({value for layer in values for value in layer}) == 1:
        raise FinetuneError(
            f"every module has the same score {values[0][0]:g}: the adapter changes nothing that the held-out set "
            "shows; train it first, or for longer"
        )
    kept = []
    for layer in values:
        best = sorted(range(len(MODULES)), key=lambda at: -layer[at])[:k_max]
        kept.append(tuple(MODULES[at] for at in sorted(best) if layer[at] >= 0))
    if not any(kept):
        raise FinetuneError(
            "every module of every layer has a negative score: the adapter makes the held-out set less likely, so no "
            "setting keeps any; train it on data like the held-out set, or with a lower learning rate"
        )
    return tuple(kept)


def share(setting: Setting) -> dict[str, tuple[float, float, float]]:
    """Module kind -> (share of the layers that keep it; of those in the lower half; of those in the upper half)."""
    half = (len(setting) + 1) // 2
    parts = (setting, setting[:half], setting[half:])

    def of(module: str, part: Setting) -> float:
        return sum(module in layer for layer in part) / len(part) if part else 0.0

    return {module: (of(module, parts[0]), of(module, parts[1]), of(module, parts[2])) for module in MODULES}


def write(path: Path, setting: Setting, scores: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """The setting as JSON, whole or not at all. FinetuneError where it can't be written."""
    write_json(path, {"layers": setting, "provenance": provenance, "scores": scores})


def write_json(path: Path, content: Any) -> None:
    """`content` as JSON at `path`, whole or not at all. FinetuneError where it can't be written."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """`text` at `path`, whole or not at all. FinetuneError where it can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, text.encode())
    except OSError as error:
        raise FinetuneError(f"{path}: can't be written: {error.strerror}; give another --out") from None
