"""What comes of a search: the manifest, the settings, the pictures, and what is printed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from perfbench.errors import FinetuneError
from perfbench.finetune.search import pictures, setting
from perfbench.finetune.search.scores import SCORES, Scores, mean, spearman
from perfbench.finetune.search.search_config import SearchConfig
from perfbench.methods.shape import MODULES, Setting

MANIFEST = "search.json"


@dataclass(frozen=True)
class Found:
    """scores: name -> mean over the seeds. kept: name -> setting, or why there is none. manifest: what search.json
    has."""

    scores: Mapping[str, Scores]
    kept: Mapping[str, Setting | FinetuneError]
    manifest: Mapping[str, Any]


def conclude(
    config: SearchConfig,
    by_seed: Mapping[int, Mapping[str, Scores]],
    check: Mapping[str, float] | None,
    manifest: dict[str, Any],
) -> Found:
    """Step 3 for every score, and how alike seeds and scores rank the modules; `manifest` is completed."""
    scores = {name: mean([found[name] for found in by_seed.values()]) for name in config.scores}
    kept: dict[str, Setting | FinetuneError] = {}
    for name, score in scores.items():
        try:
            kept[name] = setting.keep(score.values, config.k_max)
        except FinetuneError as error:
            kept[name] = error
    for seed, found in by_seed.items():
        manifest["seeds"][str(seed)]["scores"] = {name: vars(one) for name, one in found.items()}
    manifest["finished_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    manifest["scores"] = {name: vars(one) for name, one in scores.items()}
    manifest["kept"] = {name: None if isinstance(one, FinetuneError) else one for name, one in kept.items()}
    manifest["check"] = check
    manifest["spearman"] = {
        "seeds": [
            {"score": name, "seeds": [a, b], "rho": spearman(by_seed[a][name].flat(), by_seed[b][name].flat())}
            for name in config.scores
            for a, b in itertools.combinations(by_seed, 2)
        ],
        "scores": [
            {"scores": [a, b], "rho": spearman(scores[a].flat(), scores[b].flat())}
            for a, b in itertools.combinations(config.scores, 2)
        ],
    }
    return Found(scores, kept, manifest)


def write(config: SearchConfig, out: Path, found: Found) -> None:
    """search.json, a setting and pictures for each score. FinetuneError where the first score keeps nothing; the
    scores are on disk then too."""
    setting.write_json(out / MANIFEST, found.manifest)
    for position, (name, kept) in enumerate(found.kept.items()):
        if isinstance(kept, FinetuneError):
            if position == 0:
                raise FinetuneError(f"{name}: {kept} ({out / MANIFEST} has the scores)")
            continue
        scores = vars(found.scores[name]) | {"score": name, "modules": MODULES, "unit": SCORES[name].unit}
        setting.write(out / file_of(config, name), kept, scores, provenance(config, found, name))
        _draw(config, out, found.scores[name], name, kept)


def file_of(config: SearchConfig, name: str) -> str:
    """The file of the setting by score `name`."""
    return "setting.json" if name == config.scores[0] else f"setting-{name}.json"


def provenance(config: SearchConfig, found: Found, name: str) -> dict[str, Any]:
    """Where a setting comes from, so that it can be made again."""
    manifest, training = found.manifest, config.training
    return {
        "made_by": f"perfbench {manifest['perfbench_version']} fanlora search",
        "made_at": manifest["finished_at"],
        "score": name,
        "k_max": config.k_max,
        "backbone": training.backbone,
        "dtype": training.dtype,
        "task": training.to_json()["task"],
        "held_out": manifest["held_out"],
        "adapters": {
            seed: {key: one[key] for key in ("adapter", "adapter_sha256", "rank")}
            for seed, one in manifest["seeds"].items()
        },
    }


def _draw(config: SearchConfig, out: Path, scores: Scores, name: str, kept: Setting) -> None:
    held_out_of = f"{config.training.task.name}, {len(config.training.seeds)} seeds"
    subtitle = f"{config.training.name}: {Path(config.training.backbone).name}, {held_out_of}"
    title, unit = SCORES[name].title, SCORES[name].unit
    drawn = {
        "scores": pictures.score_map(f"{title} of each LoRA module", subtitle, scores.values, kept, unit),
        "kept": pictures.kept_map(f"Kept by {title}, K_max {config.k_max}", subtitle, scores.values, kept),
        "share": pictures.share_bars(f"Share of the layers that keep each kind, by {title}", subtitle, kept),
    }
    for what, text in drawn.items():
        setting.write_text(out / f"{what}-{name}.svg", text)


def show(config: SearchConfig, out: Path, found: Found, console: Console) -> None:
    """Prints the first score of every module, what is kept, how alike the rankings are, and where it all is."""
    name = config.scores[0]
    kept, scores = found.kept[name], found.scores[name]
    assert not isinstance(kept, FinetuneError)  # `write` has raised it
    most = max(map(abs, scores.flat()))
    exponent = math.floor(math.log10(most))
    table = Table(title=f"{SCORES[name].title}, in 1e{exponent} {SCORES[name].unit}; * kept", title_justify="left")
    table.add_column("layer", justify="right")
    for module in MODULES:
        table.add_column(module, justify="right")
    for layer, values in enumerate(scores.values):
        marks = ["*" if module in kept[layer] else " " for module in MODULES]
        cells = [f"{value / 10**exponent:.2f}{mark}" for value, mark in zip(values, marks, strict=True)]
        table.add_row(str(layer), *cells)
    console.print(table)
    shares = ", ".join(f"{module} {whole:.0%}" for module, (whole, _, _) in setting.share(kept).items())
    total = f"{sum(map(len, kept))} modules"
    console.print(f"kept: {total}; share of the layers: {shares}", highlight=False, soft_wrap=True)
    console.print(doubt(scores), highlight=False, soft_wrap=True)
    for line in notes(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"setting: {out / file_of(config, name)}; pictures: {out}/*.svg", highlight=False, soft_wrap=True)


def doubt(scores: Scores) -> str:
    """How many scores can't be told from nought: within two standard errors of it."""
    pairs = zip(scores.flat(), (error for layer in scores.errors for error in layer), strict=True)
    near = sum(abs(value) <= 2 * error for value, error in pairs)
    return f"{near} of {len(scores.flat())} scores lie within two standard errors of nought"


def notes(found: Found) -> list[str]:
    """Correlations, the check against the naive evaluation, and the scores by which nothing can be kept."""
    lines = []
    for one in found.manifest["spearman"]["seeds"]:
        a, b = one["seeds"]
        lines.append(f"Spearman of {one['score']} between seeds {a} and {b}: {_rho(one['rho'])}")
    for one in found.manifest["spearman"]["scores"]:
        a, b = one["scores"]
        lines.append(f"Spearman between {a} and {b}: {_rho(one['rho'])}")
    check = found.manifest["check"]
    if check:
        lines.append(
            f"on one batch the naive evaluation gives the same to {check['apart']:.1g} nats per token; the shared one "
            f"is {check['speed_up']:.2f} times as fast (FLOPs allow {check['bound']:.2f}; measured once)"
        )
    lines += [f"no setting by {name}: {why}" for name, why in found.kept.items() if isinstance(why, FinetuneError)]
    return lines


def _rho(rho: float | None) -> str:
    return "undefined, one of them is constant" if rho is None else f"{rho:.3f}"
