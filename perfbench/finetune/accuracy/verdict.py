"""From every answer to the verdict: is a method as accurate as the reference, and is it served as it was trained?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from perfbench import exit_codes
from perfbench.finetune.accuracy.accuracy_config import ZERO_SHOT
from perfbench.finetune.accuracy.paired_statistics import Paired, compare, compare_methods, non_inferior

# What a verdict can be, the worst first, and what each does to the exit code.
EXIT_CODES = {
    "inferior": exit_codes.FAILED,
    "differs": exit_codes.FAILED,
    "inconclusive": exit_codes.INCONCLUSIVE,
    "pass": exit_codes.OK,
}

# Of one item: seed -> (prediction, score).
Answers = dict[int, tuple[str, float]]


@dataclass(frozen=True)
class Scores:
    """One method on one task: its mean score for each seed, in the order of the seeds."""

    seeds: tuple[float, ...]
    items: int

    @property
    def median(self) -> float:
        """Of the seeds."""
        return median(self.seeds)


@dataclass(frozen=True)
class MethodRow:
    """A method against the reference. `dev`, `test`: as trained; `versus`: path -> the paired difference on it, to the
    reference on the same path; `decides`: the path whose verdict is the worst."""

    task: str
    method: str
    dev: Scores | None
    test: Scores
    versus: dict[str, Paired]
    verdict: str
    decides: str


@dataclass(frozen=True)
class PathRow:
    """A method served on one path against the same adapters as trained. `changed` of `answers` predictions are others
    than those of the path `anchor`, which they must equal where `exact` (one in fp32), else than as trained;
    `identity` is whose logits were served (perfbench.finetune.accuracy.identity)."""

    task: str
    method: str
    path: str
    test: Scores
    versus: Paired
    changed: int
    answers: int
    anchor: str
    exact: bool
    identity: Mapping[str, Any]
    verdict: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """All rows, and the exit code: 0 pass, 1 inferior or served otherwise than trained, 3 inconclusive. `zero_shot`:
    task -> (dev, test) of the bare backbone, which is no method and is not judged; none in older runs."""

    methods: tuple[MethodRow, ...]
    paths: tuple[PathRow, ...]
    margin: float
    reference: str
    zero_shot: Mapping[str, tuple[Scores, Scores]] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """1 wins over 3."""
        verdicts = [row.verdict for row in self.methods] + [row.verdict for row in self.paths]
        codes = {EXIT_CODES[verdict] for verdict in verdicts}
        return exit_codes.FAILED if exit_codes.FAILED in codes else max(codes, default=exit_codes.INCONCLUSIVE)

    def to_json(self) -> dict[str, Any]:
        """As accuracy.json has it."""
        return {"exit_code": self.exit_code, **asdict(self)}


def judge(
    items: Iterable[Mapping[str, Any]],
    *,
    tasks: Sequence[str],
    methods: Sequence[str],
    reference: str,
    margin: float,
    trained_path: str,
    anchors: Mapping[str, str],
    identities: Mapping[tuple[str, str, str], Mapping[str, Any]],
    seed: int = 0,
) -> Verdict:
    """`items`: rows of items.jsonl; `trained_path`: that all others are compared with; `anchors`: path -> the one
    whose very predictions it must give; `identities`: (task, path, method) -> whose logits were served.

    ValueError where a method lacks an item that the reference has.
    """
    table = _by_place(items)
    method_rows, path_rows = [], []
    for task in tasks:
        test = {method: table.get(("test", task, method), {}) for method in methods}
        for method in methods:
            own = test[method]
            versus = {
                path: _versus(compare_methods, own[path], test[reference][path], seed)
                for path in own
                if method != reference and path in test[reference]
            }
            verdicts = {path: non_inferior(paired, margin) for path, paired in versus.items()}
            worst = min(verdicts, key=lambda path: list(EXIT_CODES).index(verdicts[path]), default="")
            dev = table.get(("dev", task, method), {}).get(trained_path)
            method_rows.append(
                MethodRow(
                    task=task,
                    method=method,
                    dev=None if dev is None else _scores(dev),
                    test=_scores(own[trained_path]),
                    versus=versus,
                    verdict=verdicts.get(worst, "pass"),
                    decides=worst,
                )
            )
            for path in own:
                if path != trained_path:
                    identity = identities.get((task, path, method), {})
                    anchor = anchors.get(path)
                    anchor = anchor if anchor in own else None
                    path_rows.append(_path_row(task, method, path, own, trained_path, anchor, identity, seed))
    bare = {}
    for task in tasks:
        if ("test", task, ZERO_SHOT) in table:
            held_out, asked = (_scores(table[split, task, ZERO_SHOT][trained_path]) for split in ("dev", "test"))
            bare[task] = (held_out, asked)
    return Verdict(tuple(method_rows), tuple(path_rows), margin, reference, bare)


def _path_row(
    task: str, method: str, path: str, own: Mapping[str, Mapping[str, Answers]], trained_path: str, anchor: str | None,
    identity: Mapping[str, Any], seed: int,
) -> PathRow:  # fmt: skip
    served, trained = own[path], own[trained_path]
    paired = _versus(compare, served, trained, seed)
    compared = own[anchor or trained_path]
    pairs = [(served[i][k][0], compared[i][k][0]) for i in compared for k in compared[i]]
    changed = sum(a != b for a, b in pairs)
    verdict, reason = "pass", ""
    if identity.get("status", "void") == "void":
        verdict, reason = "inconclusive", identity.get("reason", "whose adapter answered was not looked at")
    if anchor and changed:
        whose = "the trained model" if anchor == trained_path else anchor
        verdict, reason = "differs", f"{changed} of {len(pairs)} predictions are not those of {whose}"
    elif anchor != trained_path and paired.excludes_zero():
        verdict, reason = "differs", "the paired interval of the difference excludes 0"
    if identity.get("status") == "wrong":
        verdict, reason = "differs", identity["reason"]
    return PathRow(
        task, method, path, _scores(served), paired, changed, len(pairs), anchor or trained_path, anchor is not None,
        dict(identity), verdict, reason,
    )  # fmt: skip


def _by_place(items: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], dict[str, dict[str, Answers]]]:
    """(split, task, method) -> path -> item -> seed -> (prediction, score)."""
    table: dict[tuple[str, str, str], dict[str, dict[str, Answers]]] = {}
    for item in items:
        paths = table.setdefault((item["split"], item["task"], item["method"]), {})
        seeds = paths.setdefault(item["path"], {}).setdefault(item["id"], {})
        seeds[item["seed"]] = (item["prediction"], item["score"])
    return table


def _scores(answers: Mapping[str, Answers]) -> Scores:
    seeds = sorted({seed for own in answers.values() for seed in own})
    return Scores(tuple(fmean(own[seed][1] for own in answers.values()) for seed in seeds), len(answers))


def _versus(
    how: Callable[..., Paired], ours: Mapping[str, Answers], theirs: Mapping[str, Answers], seed: int
) -> Paired:
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())[0]
        raise ValueError(f"{odd}: answered on one side only")
    ids = sorted(ours)
    # Served answers come in the order of their batches: the seeds of every item in the same order.
    scores = [[[answers[i][k][1] for k in sorted(answers[i])] for i in ids] for answers in (ours, theirs)]
    return how(scores[0], scores[1], seed)
