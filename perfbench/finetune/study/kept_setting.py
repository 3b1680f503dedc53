"""The one step that is no command of its own: FanLoRA's setting of other K_max, or by another score, of one search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from perfbench.errors import FinetuneError
from perfbench.files import strict_json
from perfbench.files.yaml_source import Source
from perfbench.finetune import finetune_config
from perfbench.finetune.finetune_config import check
from perfbench.finetune.search import outcome, search_config, setting
from perfbench.finetune.search.scores import SCORES, spearman
from perfbench.methods.shape import MODULES

# What a search, too, calls the setting of its first score.
FILE = "setting.json"

_FIELDS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": finetune_config.SCHEMA["properties"]["name"],
        "search": {"type": "string", "minLength": 1},
        "score": {"type": "string", "enum": list(SCORES), "title": "score"},
        "k_max": search_config.SCHEMA["properties"]["k_max"],
    },
    "required": ["search", "score", "k_max"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Kept:
    """The `k_max` best modules of each layer by `score` of the search in the folder `search`."""

    search: str
    score: str
    k_max: int


def load(source: Source) -> Kept:
    """The fields of the step. FinetuneError, with the line, for what can't be used."""
    check(source, _FIELDS)
    return Kept(*(source.values[key] for key in ("search", "score", "k_max")))


def keep(config: Kept, folder: Path, begun: bool, console: Console) -> None:
    """Writes setting.json into `folder`, as a search writes it. FinetuneError where the search has no such score, or
    nothing is kept by it."""
    file = Path(config.search) / outcome.MANIFEST
    scores = _scores(file)
    if config.score not in scores:
        raise FinetuneError(f"{file}: has no score {config.score}; add it to the search's `scores`")
    kept = setting.keep(scores[config.score]["values"], config.k_max)
    # No time of day: the same scores make the same bytes, and what hangs on them need not be done again.
    made = {"made_by": "perfbench study", "k_max": config.k_max}
    likeness = spearman(*(_flat(scores[name]["values"]) for name in (next(iter(scores)), config.score)))
    more = {"score": config.score, "modules": MODULES, "likeness_to_first": likeness}
    setting.write(folder / FILE, kept, more, made)


def _scores(file: Path) -> Mapping[str, Any]:
    try:
        scores = strict_json.parse(file.read_bytes())["scores"]
        return {name: scores[name] for name in scores}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FinetuneError(f"{file}: expected a search's scores ({type(error).__name__}: {error})") from None


def _flat(values: list[list[float]]) -> list[float]:
    return [value for layer in values for value in layer]
