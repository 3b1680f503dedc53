"""What a step of a study can be: an existing command, by the functions that the command itself calls."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from perfbench.errors import FinetuneError
from perfbench.files import strict_json
from perfbench.files.yaml_source import Source
from perfbench.finetune import evaluation, finetune_config, recipe
from perfbench.finetune.accuracy import accuracy_config, accuracy_run
from perfbench.finetune.accuracy.accuracy_config import AccuracyConfig, Entry
from perfbench.finetune.accuracy.accuracy_folder import AccuracyFolder
from perfbench.finetune.evaluation import Asked
from perfbench.finetune.finetune_config import FinetuneConfig, check
from perfbench.finetune.finetune_folder import FinetuneFolder
from perfbench.finetune.search import outcome, search_config, search_run
from perfbench.finetune.search.search_config import SearchConfig
from perfbench.finetune.study import kept_setting
from perfbench.methods.dtypes import DTYPES
from perfbench.run_folder.run_directory import ACCURACY_MANIFEST, MANIFEST
from perfbench.spec.scenario_schema import DEVICES


@dataclass(frozen=True)
class Figure:
    """What the table shows of a step: `read` gives one number or more of its folder, of which the median is shown and,
    between brackets, the lowest and highest; `form`: how one is written; `title`: with the unit."""

    title: str
    form: str
    read: Callable[[Path], list[float]]
    times: float = 1

    def of(self, folder: Path) -> list[float]:
        """The numbers as they are shown. FinetuneError where the folder does not hold them."""
        try:
            return [value * self.times for value in self.read(folder)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise FinetuneError(f"{folder}: {self.title} can't be read ({problem}); delete it, and run again") from None


@dataclass(frozen=True)
class Kind:
    """A command. load: its fields, strictly; run: (config, folder, whether it was begun there, console); reads: the
    data and backbones of a config, paths or hub ids; figures: what a config's folder will hold; manifest: the file that
    is there once it was begun, "" where it can't go on and begins anew; differs: what the folder says is
    not served as it was trained, or was not shown to be, a line each."""

    load: Callable[[Source], Any]
    run: Callable[[Any, Path, bool, Console], object]
    reads: Callable[[Any], list[str]]
    figures: Callable[[Any], Mapping[str, Figure]]
    manifest: str = ""
    differs: Callable[[Path], list[str]] = lambda folder: []


def _json(path: Path) -> Any:
    return strict_json.parse(path.read_bytes())


# Search.


def _search_reads(config: SearchConfig) -> list[str]:
    return [config.training.backbone, config.training.task.source, *config.adapters]


def _search_figures(config: SearchConfig) -> dict[str, Figure]:
    def between_seeds(folder: Path, name: str) -> list[float]:
        seeds = _json(folder / outcome.MANIFEST)["spearman"]["seeds"]
        return [one["rho"] for one in seeds if one["score"] == name and one["rho"] is not None]

    found = {"modules": Figure("modules", ".0f", lambda folder: [_modules(folder / kept_setting.FILE)])}
    for name in config.scores:
        title = f"Spearman between seeds, {name}"
        found[f"seeds_{name}"] = Figure(title, ".3f", lambda folder, name=name: between_seeds(folder, name))  # type: ignore[misc]
    return found


def _modules(path: Path) -> float:
    return float(sum(map(len, _json(path)["layers"])))


# A setting of a search's scores.


def _likeness(folder: Path) -> list[float]:
    found = _json(folder / kept_setting.FILE)["scores"]["likeness_to_first"]
    return [] if found is None else [found]


def _setting_figures(config: kept_setting.Kept) -> dict[str, Figure]:
    return {
        "modules": Figure("modules", ".0f", lambda folder: [_modules(folder / kept_setting.FILE)]),
        "likeness": Figure("Spearman to the search's first score", ".3f", _likeness),
    }


# Fine-tuning.


def _of_seeds(name: str) -> Callable[[Path], list[float]]:
    def read(folder: Path) -> list[float]:
        seeds = FinetuneFolder.open(folder).manifest["seeds"].values()
        return [float(one[name]) for one in seeds if one[name] is not None]

    return read


def _finetune_figures(config: FinetuneConfig) -> dict[str, Figure]:
    return {
        "test": Figure("test %", ".1f", _of_seeds("test_score"), times=100),
        "dev_loss": Figure("dev loss", ".3f", _of_seeds("best_dev_loss")),
        "parameters": Figure("parameters", ",.0f", _of_seeds("trainable_parameters")),
    }


# Accuracy.


def _accuracy_reads(config: AccuracyConfig) -> list[str]:
    sources = [name for entry in config.entries for name in (entry.config.backbone, entry.config.task.source)]
    return sources + ([config.forgetting.source] if config.forgetting else [])


# Name -> (title, how a number is written, its name in accuracy.json).
_OF_ADAPTERS = {
    "dev_loss": ("dev loss", ".3f", "best_dev_loss"),
    "parameters": ("parameters", ",.0f", "trainable_parameters"),
    "learning_rate": ("learning rate", ".3f", "learning_rate"),
}


def _accuracy_figures(config: AccuracyConfig) -> dict[str, Figure]:
    """Of each method on each task; of one alone they have the names of a fine-tuning's."""
    found = {}
    for entry in config.entries:
        one = len(config.entries) == 1
        prefix, of = ("", "") if one else (f"{entry.task}/{entry.method}/", f"{entry.method} on {entry.task}, ")
        found[f"{prefix}test"] = Figure(f"{of}test %", ".1f", _test_scores(entry), times=100)
        for name, (title, form, key) in _OF_ADAPTERS.items():
            found[prefix + name] = Figure(of + title, form, _of_adapters(entry, key))
    return found


def _test_scores(entry: Entry) -> Callable[[Path], list[float]]:
    """As trained, of each seed."""

    def read(folder: Path) -> list[float]:
        rows = AccuracyFolder.open(folder).manifest["verdict"]["methods"]
        (found,) = [row for row in rows if (row["task"], row["method"]) == (entry.task, entry.method)]
        return [float(score) for score in found["test"]["seeds"]]

    return read


def _of_adapters(entry: Entry, key: str) -> Callable[[Path], list[float]]:
    def read(folder: Path) -> list[float]:
        seeds = AccuracyFolder.open(folder).manifest["adapters"][entry.task][entry.method]
        return [float(seed[key]) for seed in seeds.values()]

    return read


def _accuracy_differs(folder: Path) -> list[str]:
    paths = AccuracyFolder.open(folder).manifest["verdict"]["paths"]
    return [f"{one['task']}, {one['path']}: {one['reason']}" for one in paths if one["verdict"] == "differs"]


def _accuracy(config: AccuracyConfig, folder: Path, begun: bool, console: Console) -> None:
    accuracy_run.execute(config, folder, resume=begun, console=console)


# Evaluation.

_TEXT = {"type": "string", "minLength": 1}
_COUNT = {"type": "integer", "minimum": 1}
_EVALUATE_FIELDS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": finetune_config.SCHEMA["properties"]["name"],
        **dict.fromkeys(("backbone", "task", "source", "metric"), _TEXT),
        "adapters": {"type": "array", "items": _TEXT},
        "split": {"type": "string", "enum": ["dev", "test"], "title": "split"},
        "dtype": {"type": "string", "enum": list(DTYPES), "title": "dtype"},
        "device": {"type": "string", "enum": list(DEVICES), "title": "device"},
        "served": {"type": "string", "enum": ["static", "transformers"], "title": "runtime"},
        **dict.fromkeys(("examples", "batch", "beams"), _COUNT),
    },
    "required": ["backbone", "task", "source"],
    "additionalProperties": False,
}


def _load_evaluate(source: Source) -> Asked:
    check(source, _EVALUATE_FIELDS)
    fields = {key: value for key, value in source.values.items() if key != "name"}
    finetune_config.task_source(source, {"name": fields["task"], "metric": fields.get("metric")}, Path(), "task")
    return Asked(**{**fields, "adapters": tuple(fields.get("adapters", ()))})


def _evaluate(config: Asked, folder: Path, begun: bool, console: Console) -> None:
    evaluation.evaluate(config, folder, lambda text: console.print(text, markup=False, highlight=False))


def _evaluate_differs(folder: Path) -> list[str]:
    found = [evaluation.Result(**one) for one in _json(folder / evaluation.MANIFEST)["results"]]
    reasons = ((one, (one.identity or {}).get("reason")) for one in found if not one.sound)
    return [f"{one.path}: {why or f'{one.changed} predictions are not as trained'}" for one, why in reasons]


def _evaluate_figures(config: Asked) -> dict[str, Figure]:
    def read(folder: Path, which: str) -> list[float]:
        results = _json(folder / evaluation.MANIFEST)["results"]
        groups: dict[str, list[float]] = {"bare": [], "as_trained": [], "served": []}
        for one in results:
            bare, trained = one["adapter"] == evaluation.BARE, one["changed"] is None
            groups["bare" if bare else "as_trained" if trained else "served"].append(float(one["score"]))
        return groups[which]

    titles = {"bare": "bare backbone, %", "as_trained": "as trained, %", "served": "as served, %"}
    return {
        name: Figure(title, ".1f", lambda folder, name=name: read(folder, name), times=100)  # type: ignore[misc]
        for name, title in titles.items()
    }


def to_json(config: Any) -> dict[str, Any]:
    """The resolved configuration of any of these commands as plain JSON data."""
    if isinstance(config, AccuracyConfig):
        entries = [dataclasses.asdict(entry) for entry in config.entries]
        return dict(json.loads(json.dumps({"values": config.values, "entries": entries})))
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


KINDS: dict[str, Kind] = {
    "fanlora search": Kind(
        load=search_config.load,
        run=lambda config, folder, begun, console: search_run.search(config, folder, resume=begun, console=console),
        reads=_search_reads,
        figures=_search_figures,
        manifest=outcome.MANIFEST,
    ),
    "setting": Kind(kept_setting.load, kept_setting.keep, lambda config: [], _setting_figures),
    "finetune": Kind(
        load=finetune_config.load,
        run=lambda config, folder, begun, console: recipe.finetune(config, folder, resume=begun, console=console),
        reads=lambda config: [config.backbone, config.task.source],
        figures=_finetune_figures,
        manifest=MANIFEST,
    ),
    "accuracy": Kind(
        accuracy_config.load, _accuracy, _accuracy_reads, _accuracy_figures, ACCURACY_MANIFEST, _accuracy_differs
    ),
    "evaluate": Kind(
        _load_evaluate,
        _evaluate,
        lambda config: [config.backbone, config.source, *config.adapters],
        _evaluate_figures,
        differs=_evaluate_differs,
    ),
}
