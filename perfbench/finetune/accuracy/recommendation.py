"""Which method to serve, from accuracy and speed of one backbone together, in a few sentences. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from perfbench.figures.stats import overlap
from perfbench.files.plain_text import format_bytes
from perfbench.finetune.accuracy.paths import AS_TRAINED
from perfbench.finetune.accuracy.verdict import Verdict
from perfbench.finetune.accuracy.verdict_words import loss_elsewhere
from perfbench.methods.registry import METHODS
from perfbench.report import rows
from perfbench.report import words as run_words
from perfbench.report.read import Run

Arms = Mapping[str, Mapping[str, Any]]


def sentences(manifest: Mapping[str, Any], verdict: Verdict, run: Run) -> Iterator[str]:
    """What to serve, why, and where that ends: of the methods that were neither shown to be worse nor served otherwise
    than trained, those that keep most of the bare backbone's speed, and of these the one with the smallest tenant.
    Nothing where the run is of another backbone, or has none of them with the options that were trained."""
    entries = {entry["method"]: entry["finetune"] for entry in manifest["config"]["entries"]}
    backbone = next(iter(entries.values()))["backbone"]
    if any(comparison["backbone"] != backbone for comparison in run.manifest["comparisons"]):
        return
    refused = {row.method for row in verdict.methods if row.verdict == "inferior"}
    refused |= {row.method for row in verdict.paths if row.verdict == "differs"}
    comparison, measured = _fastest(entries, run)
    arms = {method: arm for method, arm in measured.items() if method not in refused}
    if not arms:
        return
    best = max(arms, key=lambda method: arms[method]["kept_decode_tokens_per_s"])
    level = [method for method in arms if method == best or overlap(_interval(arms[best]), _interval(arms[method]))]
    chosen = min(level, key=lambda method: arms[method]["bytes_per_tenant"])
    others = [method for method in level if method != chosen]
    tie = f", a tie with {' and '.join(others)}, whose tenants are larger" if others else ""
    yield (
        f"Recommended for {backbone}: {chosen}. It was not shown to be less accurate, keeps {_kept(arms[chosen])} of "
        f"the bare backbone's decode speed{tie}, and a tenant takes {format_bytes(arms[chosen]['bytes_per_tenant'])}."
    )
    if (reference := arms.get(verdict.reference)) is not None and chosen != verdict.reference:
        size = format_bytes(reference["bytes_per_tenant"])
        yield f"{verdict.reference} keeps {_kept(reference)}, and a tenant takes {size}."
    yield from _forgotten(manifest, verdict, chosen)
    if unknown := [method for method in entries if method not in measured]:
        yield f"Left out, because the run does not have them with the options that were trained: {', '.join(unknown)}."
    yield from _limits(verdict, run_words.title(comparison, run.manifest["comparisons"]))


def _forgotten(manifest: Mapping[str, Any], verdict: Verdict, chosen: str) -> Iterator[str]:
    """By how much training raised the loss of another task's answers, where that was measured."""
    names = dict.fromkeys((chosen, verdict.reference))
    task = verdict.methods[0].task
    found = {name: loss_elsewhere(manifest, list(manifest["adapters"][task][name].values())) for name in names}
    if manifest.get("forgetting"):
        said = " and ".join(f"{name} by {loss}" for name, loss in found.items())
        yield f"What was known before suffers too: training raised the loss of other answers, in nats a token, {said}."


def _fastest(entries: Arms, run: Run) -> tuple[Any, Arms]:
    """The comparison in which the bare backbone is fastest, and in it the arm of each method as it was trained."""
    found: list[tuple[float, Any, Arms]] = []
    for comparison, group in rows.groups(run.manifest):
        measured = [arm for arm in group if arm["kept_decode_tokens_per_s"] and arm["bytes_per_tenant"]]
        bare = max((arm["decode_tokens_per_s"] or 0.0 for arm in group if arm["method"] == "none"), default=0.0)
        arms: dict[str, Mapping[str, Any]] = {}
        for label, trained in entries.items():
            same = [arm for arm in measured if is_same(run.manifest["cases"][arm["case"]], trained)]
            if same:
                arms[label] = same[0]
        found.append((bare, comparison, arms))
    _, comparison, arms_of_it = max(found, key=lambda one: one[0])
    return comparison, arms_of_it


def is_same(case: Mapping[str, Any], trained: Mapping[str, Any]) -> bool:
    """Whether an arm is the method that was trained, with its options; where its adapters are from does not matter."""
    if case["method"] != trained["method"] or trained["method"] not in METHODS:
        return False
    default = json.loads(json.dumps(vars(METHODS[trained["method"]].options())))
    # A run of an earlier perfbench lacks the options that have come since: it had what is the default now.
    return {**default, **case["options"], "adapters": None} == {**default, **trained["options"], "adapters": None}


def _interval(arm: Mapping[str, Any]) -> dict[str, Any]:
    return {end: arm[f"kept_decode_tokens_per_s_{end}"] for end in ("low", "high")}


def _kept(arm: Mapping[str, Any]) -> str:
    return f"{arm['kept_decode_tokens_per_s']:.1%}"


def _limits(verdict: Verdict, title: str) -> Iterator[str]:
    """What was not seen."""
    widths, items, seeds = [], set(), set()
    for row in verdict.methods:
        paired = next((found for path, found in row.versus.items() if path.startswith(AS_TRAINED)), None)
        if paired is not None:
            widths.append((paired.high - paired.low) / 2)
            items.add(row.test.items)
            seeds.add(len(row.test.seeds))
    if widths:
        yield (
            f"The limits: with {min(items)} test items and {min(seeds)} seeds, a loss of accuracy of less than about "
            f"{max(widths) * 100:.0f} points would not have been seen; the speeds are of {title}."
        )
