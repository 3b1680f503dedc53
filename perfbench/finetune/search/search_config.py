"""A search file: a fine-tuning file of LoRA on every linear, and what is done with it.

config = load("scenarios/fanlora/ultrachat_7b.yaml", ["k_max=3"])
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perfbench.errors import PerfbenchError
from perfbench.files.paths import expanded
from perfbench.files.yaml_source import Source
from perfbench.finetune import finetune_config
from perfbench.finetune.finetune_config import FinetuneConfig, Given, check, read_source, refuse
from perfbench.finetune.search.scores import SCORES
from perfbench.methods.shape import MODULES
from perfbench.spec.arms import frozen


@dataclass(frozen=True)
class SearchConfig:
    """One search. `training`: step 1, LoRA of rank r0 on every linear, one epoch; its dev split is held out for the
    scores.

    adapters: PEFT LoRA folders already trained, one for each seed, in place of step 1. scores: the first decides what
    is kept, the others are compared with it. k_max: most modules that a layer keeps. permutations: random orders of
    the Shapley value. rows: examples of a batch that is scored. tokens_per_forward: most tokens that go through a
    layer side by side, which bounds the memory.
    """

    training: FinetuneConfig
    adapters: tuple[str, ...] = ()
    scores: tuple[str, ...] = ("ab",)
    k_max: int = 2
    permutations: int = 16
    rows: int = 4
    tokens_per_forward: int = 2048

    def to_json(self) -> dict[str, Any]:
        """The resolved configuration as plain JSON data."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data


_COUNT = {"type": "integer", "minimum": 1}
_FOLDER = {"type": "string", "minLength": 1}
_OWN: dict[str, Any] = {
    "adapters": {"anyOf": [_FOLDER, {"type": "array", "items": _FOLDER, "minItems": 1, "uniqueItems": True}]},
    "rank": {"type": "integer", "minimum": 1, "maximum": 1024},
    "scores": {
        "type": "array",
        "items": {"type": "string", "enum": list(SCORES), "title": "score"},
        "minItems": 1,
        "uniqueItems": True,
    },
    "k_max": {"type": "integer", "minimum": 1, "maximum": len(MODULES)},
    "permutations": {"type": "integer", "minimum": 2},
    "rows": _COUNT,
    "tokens_per_forward": _COUNT,
}
# A fine-tuning's fields but for the method, which is LoRA here.
_TRAINING = {k: v for k, v in finetune_config.SCHEMA["properties"].items() if k not in ("method", "beams")}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {**_TRAINING, **_OWN},
    "required": ["backbone", "task"],
    "additionalProperties": False,
}
# The paper's rank in step 1, and its one epoch.
RANK, EPOCHS = 12, 1


def load(given: Given, settings: Sequence[str] = ()) -> SearchConfig:
    """The configuration in the YAML file `given`, or in such values, with every `KEY=VALUE` of `settings` laid over it.

    FinetuneError, in one line with the file and the line, for malformed YAML, unknown keys and scores, values out of
    range, an adapter folder that is not there, more or fewer adapters than seeds.
    """
    source, path = read_source(given, settings, "a search file")
    check(source, SCHEMA)
    return _build(source, path)


def _build(source: Source, path: Path) -> SearchConfig:
    own = {key: value for key, value in source.values.items() if key in _OWN}
    adapters = own.pop("adapters", [])
    adapters = [adapters] if isinstance(adapters, str) else adapters
    rank = own.pop("rank", RANK)
    training = Source(copy.deepcopy(source.values), dict(source.origins))
    for key in _OWN:
        training.values.pop(key, None)
    training.values["method"] = {"lora": {"rank": rank}}
    training.values["task"]["test_examples"] = 0  # nothing is tested here
    training.values.setdefault("epochs", EPOCHS)
    training.values.setdefault("seeds", list(range(len(adapters) or 1)))
    config = finetune_config.from_source(training, path)
    if adapters and len(adapters) != len(config.seeds):
        message = f"expected one adapter for each of {len(config.seeds)} seeds, got {len(adapters)}"
        refuse(source, message, "adapters")
    found = tuple(_folder(source, name, path) for name in adapters)
    fields: dict[str, Any] = {key: frozen(value) for key, value in own.items()}
    return SearchConfig(training=config, adapters=found, **fields)


def _folder(source: Source, name: str, path: Path) -> str:
    try:
        folder = next((one for one in (expanded(name), path.parent / name) if one.is_dir()), None)
    except PerfbenchError as error:
        refuse(source, f"expected a folder, got {error}", "adapters")
    if folder is None:
        refuse(source, f"no such folder {name!r}; expected a PEFT LoRA checkpoint", "adapters")
    return str(folder)
