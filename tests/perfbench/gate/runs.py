"""Runs to compare, made from a committed one: real samples, dealt out to processes, with a fault planted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perfbench.run_folder.run_directory import MANIFEST, SAMPLES, RunDirectory

ROOT = Path(__file__).resolve().parents[3]
COMMITTED = ROOT / "results" / "cpu-multitenant-1"
LORA = "llama-256x8-fp32-cpu/transformers/p32-n16-b1-q4-t4-r4-distinct/lora-eager"

Change = Callable[[dict[str, Any]], None]


def copy_of(folder: Path, *, manifest: Change = lambda _: None, source: Path = COMMITTED) -> Path:
    """The committed run in `folder`, its manifest changed."""
    folder.mkdir()
    shutil.copy(source / SAMPLES, folder / SAMPLES)
    found = json.loads((source / MANIFEST).read_text())
    manifest(found)
    (folder / MANIFEST).write_text(json.dumps(found))
    return folder


def half_of(folder: Path, rest: int, processes: int = 6, sample: Change = lambda _: None) -> Path:
    """Every second round of the committed run, the even or the odd ones: two runs of one commit on one machine, whose
    rounds are dealt out to `processes`, as if each had been measured in a process of its own."""
    copy_of(folder)
    kept = []
    for line in (COMMITTED / SAMPLES).read_text().splitlines():
        one = json.loads(line)
        if one["round"] % 2 == rest:
            one["process"] = one["round"] // 2 % processes
            sample(one)
            kept.append(json.dumps(one))
    (folder / SAMPLES).write_text("\n".join(kept) + "\n")
    run = RunDirectory.open(folder)
    for case_id, case in run.manifest["cases"].items():
        # What the gate reads of a summary; `summarise` would draw bootstrap intervals that no test looks at.
        case["summary"]["total_ms"]["rounds"] = sum(json.loads(one)["case"] == case_id for one in kept)
    run.write_manifest()
    return folder


def slower_by(share: float, *, quiet: bool = False) -> Change:
    """A sample in which everything took `share` longer; on a `quiet` machine it is also five times as close to its
    case's median as it was."""
    medians = {}
    if quiet:
        cases = json.loads((COMMITTED / MANIFEST).read_text())["cases"]
        medians = {case_id: case["summary"]["total_ms"]["median"] for case_id, case in cases.items()}

    def change(sample: dict[str, Any]) -> None:
        factor = 1 + share
        if quiet:
            factor *= (medians[sample["case"]] / sample["total_ms"]) ** 0.8
        for name in ("total_ms", "ttft_ms"):
            sample[name] *= factor
        sample["itl_ms"] = [step * factor for step in sample["itl_ms"]]
        for name in ("decode_tokens_per_s", "tokens_per_s"):
            sample[name] /= factor

    return change
