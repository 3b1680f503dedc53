"""The end of `perfbench finetune`: one row a seed, then the figure over the seeds, in words. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from rich.console import Console

from perfbench.files.plain_text import format_bytes, printable_tree
from perfbench.report.tables import Column, grid
from perfbench.report.words import machine


def render(manifest: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints what run.json of a fine-tuning says."""
    console, manifest = console or Console(), printable_tree(manifest)
    config, seeds, test = manifest["config"], manifest["seeds"], manifest["test"]
    if config["question"]:
        console.print(config["question"], markup=False, highlight=False)
    task, examples = config["task"]["name"], manifest["examples"]
    title = f"{config['method']} on {task}: {config['backbone']} {config['dtype']}, {examples['train']} examples"
    metric = test["metric"] if test else "test"
    heads = ("seed", metric, "dev loss", "best step", "of", "to best", "tokens/s", "peak")
    columns = [Column(head, itemgetter(place)) for place, head in enumerate(heads)]
    console.print(grid(columns, [(seed, *_cells(found)) for seed, found in seeds.items()], title))
    console.print(conclusion(manifest), markup=False, highlight=False, soft_wrap=True)
    here = machine(manifest["environment"], manifest["environment"]["device_kind"])
    console.print(
        f"dev loss: the lowest, at best step; to best: seconds until then. On {here}.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def conclusion(manifest: Mapping[str, Any]) -> str:
    """The test metric over the seeds: median and spread."""
    seeds, test = manifest["seeds"], manifest["test"]
    done = [found for found in seeds.values() if found["status"] == "ok"]
    trained = next((found["trainable_parameters"] for found in done), None)
    size = f"; {trained:,} parameters trained" if trained else ""
    if test is None:
        return f"{len(done)} of {len(seeds)} seeds trained, not judged on a test set{size}."
    seeds_in_words = "1 seed" if test["seeds"] == 1 else f"{test['seeds']} seeds"
    spread = f"{test['lowest']:.1%} to {test['highest']:.1%}"
    median = f"{test['metric']}: median {test['median']:.1%} of {seeds_in_words} ({spread})"
    return f"{median}, {test['items']} test items{size}."


def _cells(found: Mapping[str, Any]) -> list[str]:
    if found["status"] != "ok":
        return [found["status"].replace("_", " "), *["-"] * 6]
    return [
        "-" if found["test_score"] is None else f"{found['test_score']:.1%}",
        f"{found['best_dev_loss']:.4f}",
        str(found["best_step"]),
        str(found["steps"]),
        f"{found['time_to_best_s']:.1f} s",
        f"{found['tokens_per_s']:,.0f}",
        format_bytes(found["peak_bytes"]) if found["peak_bytes"] else "-",
    ]
