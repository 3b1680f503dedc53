"""Run directories as a report sees them: manifest, valid samples of each case, and what a reader must be told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfbench.errors import RunDirectoryError
from perfbench.files.plain_text import printable, printable_lines, printable_tree
from perfbench.run_folder.run_directory import RunDirectory
from perfbench.run_folder.run_schema import Manifest


@dataclass(frozen=True)
class Run:
    """One run. `label`: the shortest end of its path that tells it from the others; `samples`: case id -> its valid
    repetitions in the order of (process, round); `notices`: what is odd about the run, in plain words."""

    label: str
    path: Path
    manifest: Manifest
    samples: dict[str, list[dict[str, Any]]]
    notices: tuple[str, ...]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these folders, in this order. RunDirectoryError where one can't be read or is given twice."""
    resolved = [path.resolve() for path in paths]
    for place, path in enumerate(resolved):
        if path in resolved[:place]:
            raise RunDirectoryError(f"{paths[place]}: the same run is given twice; give each run once")
    return [_read(path, label) for path, label in zip(paths, _labels(resolved), strict=True)]


def _labels(paths: Sequence[Path]) -> list[str]:
    """The names of the folders, with as many of their parents as it takes to tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    raise AssertionError("different paths have different labels")


def _read(path: Path, label: str) -> Run:
    directory = RunDirectory.open(path)
    written = directory.samples()
    directory.add_tails(written)
    notices = []
    if directory.manifest.get("finished_at") is None:
        notices.append(_summarise_unfinished(directory, written))
    samples: dict[str, list[dict[str, Any]]] = {case_id: [] for case_id in directory.manifest["cases"]}
    for sample in written:
        if sample["void"] is None and sample["case"] in samples:
            samples[sample["case"]].append(sample)
    for own in samples.values():
        own.sort(key=lambda sample: (sample["process"], sample["round"]))
    notices += _missing(directory, samples)
    void = Counter(sample["void"] for sample in written if sample["void"] is not None)
    notices += [
        f"{count} of {len(written)} repetitions are void and left out: {reason}." for reason, count in void.items()
    ]
    shown = {printable_lines(case_id): own for case_id, own in samples.items()}
    return Run(printable(label), path, printable_tree(directory.manifest), shown, tuple(map(printable, notices)))


def _summarise_unfinished(directory: RunDirectory, written: list[dict[str, Any]]) -> str:
    """Summarises what is there so far, in memory only: a case counts once its check has passed and it was timed."""
    timed = {sample["case"] for sample in written}
    for case in directory.manifest["cases"].values():
        if case["status"] == "pending" and case["id"] in timed and (case["check"] or {}).get("passed"):
            case["status"] = "ok"
    directory.summarise()
    planned = len(directory.manifest["cases"]) * (directory.manifest["scenario"].get("repetitions") or 0)
    return (
        f"This run is not finished: it is still being written, or it was stopped. The figures rest on the "
        f"{len(written)} of {planned} planned repetitions that are there so far."
    )


def _missing(directory: RunDirectory, samples: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A line where samples.jsonl holds another number of repetitions than run.json summarises."""
    cases = directory.manifest["cases"].values()
    summarised = {case["id"]: int(case["summary"]["total_ms"]["rounds"] or 0) for case in cases if case["summary"]}
    wrong = [case_id for case_id, rounds in summarised.items() if len(samples[case_id]) != rounds]
    if not wrong:
        return []
    there = sum(len(samples[case_id]) for case_id in summarised)
    return [
        f"samples.jsonl holds {there} valid repetitions, run.json summarises {sum(summarised.values())}: "
        f"{len(wrong)} case(s) differ. Distributions, drift and intervals show what samples.jsonl holds; medians "
        "and kept are run.json's."
    ]
