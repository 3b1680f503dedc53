"""The verdict in words and cells, for the terminal and the page alike. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from perfbench.figures.papers import POINTS_OVER_LORA, paper_score
from perfbench.finetune.accuracy.accuracy_config import ZERO_SHOT
from perfbench.finetune.accuracy.paired_statistics import LEAST_SEEDS, Paired
from perfbench.finetune.accuracy.paths import AS_TRAINED
from perfbench.finetune.accuracy.verdict import EXIT_CODES, MethodRow, PathRow, Scores, Verdict
from perfbench.methods.registry import METHODS

NOTHING = "-"
# What the papers say is better than LoRA.
CLAIMED = ("para", "fanlora")


def headline(verdict: Verdict) -> str:
    """The answer in one sentence."""
    margin = f"{verdict.margin * 100:g} points"
    worse = _named(verdict.methods, "inferior")
    odd = sorted({f"{row.method} on {row.path} ({row.task})" for row in verdict.paths if row.verdict == "differs"})
    open_ = [
        *_named(verdict.methods, "inconclusive"),
        *sorted({f"{row.method} on {row.path}" for row in verdict.paths if row.verdict == "inconclusive"}),
    ]
    if worse or odd:
        parts = [f"worse than {verdict.reference} by more than {margin}: {', '.join(worse)}"] if worse else []
        parts += [f"not served as trained: {', '.join(odd)}"] if odd else []
        text = "; ".join(parts)
        return f"FAIL. {text[0].upper()}{text[1:]}."  # labels keep their capitals
    if open_:
        text = f"INCONCLUSIVE. Nothing is shown to be worse, but not enough is known of {', '.join(open_)}."
        if _named(verdict.methods, "inconclusive"):
            text += f" Accuracy could not tell these methods from {verdict.reference}: choose among them by cost."
        return text
    if not verdict.paths:
        return f"PASS. No method is worse than {verdict.reference} by {margin} or more. Nothing was served."
    return (
        f"PASS. No method is worse than {verdict.reference} by {margin} or more, and all that is served answers as "
        "what was trained."
    )


def _named(rows: Sequence[MethodRow], verdict: str) -> list[str]:
    return [f"{row.method} ({row.task}, {row.decides})" for row in rows if row.verdict == verdict]


def findings(verdict: Verdict) -> Iterator[str]:
    """Sentence by sentence: what differs from the reference, what can't be told apart, what served paths show."""
    for task in dict.fromkeys(row.task for row in verdict.methods):
        rows = [row for row in verdict.methods if row.task == task]
        for row in rows:
            found = _trained(row)
            if found is not None and found.excludes_zero():
                way = "above" if found.difference > 0 else "below"
                said = f"{task}: {row.method} is {way} {verdict.reference}, {points(found)} points."
                yield said + _claim(row, verdict)
        level = [row.method for row in rows if (found := _trained(row)) is not None and not found.excludes_zero()]
        if level:
            yield _not_told_apart(task, level, rows, verdict.reference)
    exact = [row for row in verdict.paths if row.exact]
    if exact:
        changed, answers = sum(row.changed for row in exact), sum(row.answers for row in exact)
        anchor = exact[0].anchor
        whose = "the trained model" if anchor.startswith(AS_TRAINED) else anchor
        yield f"In fp32 {changed:,} of {answers:,} served predictions are not those of {whose}."
    rounded = [row for row in verdict.paths if not row.exact]
    if rounded:
        changed, answers = sum(row.changed for row in rounded), sum(row.answers for row in rounded)
        worst = max(rounded, key=lambda row: abs(row.versus.difference))
        yield (
            f"In the other dtypes {changed:,} of {answers:,} predictions changed; the largest change of a score is "
            f"{points(worst.versus)} ({worst.method} on {worst.path}, {worst.task})."
        )


def _claim(row: MethodRow, verdict: Verdict) -> str:
    """What has to stand beside a difference that is the other way round in the papers."""
    found = _trained(row)
    if found is None or found.difference > 0 or row.method not in CLAIMED or verdict.reference != "lora":
        return ""
    low, high = POINTS_OVER_LORA
    return (
        f" The papers put it {low} to {high} points above LoRA, on models of 2 to 13 billion parameters; this run "
        "shows the contrary for its own backbone, task and recipe alone."
    )


def _trained(row: MethodRow) -> Paired | None:
    return next((paired for path, paired in row.versus.items() if path.startswith(AS_TRAINED)), None)


def _not_told_apart(task: str, level: Sequence[str], rows: Sequence[MethodRow], reference: str) -> str:
    """What these items can't show, and that the papers' ranking is among it where it is."""
    of_level = (found for row in rows if row.method in level and (found := _trained(row)) is not None)
    widest = max((found.high - found.low) / 2 for found in of_level)
    items, seeds = rows[0].test.items, min(len(row.test.seeds) for row in rows)
    known = f"With {items} items and {seeds} seed{'s' if seeds > 1 else ''}"
    text = f"{task}: {', '.join(level)} can't be told from {reference}: the intervals include 0. "
    if seeds < LEAST_SEEDS:
        text += f"{known} nothing is said of a difference: how much trainings differ takes {LEAST_SEEDS} seeds to see."
    else:
        text += f"{known} a difference below about {widest * 100:.1f} points does not show."
    if reference == "lora" and set(CLAIMED) & {row.method for row in rows}:
        low, high = POINTS_OVER_LORA
        text += (
            f" The papers put PARA and FanLoRA {low} to {high} points above LoRA, on models of 2 to 13 billion "
            "parameters; for the methods named here that ranking is neither confirmed nor refuted by this run."
        )
    return text


def percent(score: float) -> str:
    """Such as 91.2."""
    return f"{score * 100:.1f}"


def spread(scores: Scores | None) -> str:
    """Median of the seeds, with the lowest and the highest where there are several."""
    if scores is None:
        return NOTHING
    text = percent(scores.median)
    return text if len(scores.seeds) == 1 else f"{text} ({percent(min(scores.seeds))}-{percent(max(scores.seeds))})"


def points(paired: Paired) -> str:
    """Such as `+0.8 [-0.5, +2.1]`, in points."""
    return f"{paired.difference * 100:+.1f} [{paired.low * 100:+.1f}, {paired.high * 100:+.1f}]"


METHOD_HEADS = (
    "method", "trained\nparams", "learning\nrate", "dev %", "test %", "paper\n%", "to the reference", "McNemar\np",
    "loss\nelsewhere", "verdict",
)  # fmt: skip


def zero_shot_cells(task: str, verdict: Verdict, manifest: Mapping[str, Any]) -> Iterator[list[str]]:
    """The bare backbone as a row of METHOD_HEADS, where it was asked."""
    if task in verdict.zero_shot:
        dev, test = verdict.zero_shot[task]
        before = manifest.get("forgetting")
        loss = f"{before['loss_before']:.3f}" if before else NOTHING
        yield [
            ZERO_SHOT, "0", NOTHING, percent(dev.median), percent(test.median), *[NOTHING] * 3, loss, NOTHING,
        ]  # fmt: skip


def method_cells(row: MethodRow, manifest: Mapping[str, Any], reference: str) -> list[str]:
    """The row as METHOD_HEADS has it."""
    found = _trained(row)
    entry = _entry(manifest, row.task, row.method)
    adapters = list(manifest["adapters"][row.task][row.method].values())
    is_reference = row.method == reference
    return [
        row.method,
        f"{adapters[0]['trainable_parameters']:,}",
        _rate(manifest, row),
        NOTHING if row.dev is None else percent(row.dev.median),
        spread(row.test),
        _paper(entry),
        "the reference" if is_reference else NOTHING if found is None else points(found),
        NOTHING if found is None or found.p_value is None else f"{found.p_value:.2g}",
        loss_elsewhere(manifest, adapters),
        NOTHING if is_reference else row.verdict,
    ]


def _rate(manifest: Mapping[str, Any], row: MethodRow) -> str:
    """The learning rate that a sweep chose; nothing where there was none."""
    if row.method not in manifest.get("sweeps", {}).get(row.task, {}):
        return NOTHING
    first = next(iter(manifest["adapters"][row.task][row.method].values()))
    return f"{first['learning_rate']:g}"


def loss_elsewhere(manifest: Mapping[str, Any], adapters: Sequence[Mapping[str, Any]]) -> str:
    """By how much the loss of another task's answers rose, the median of the seeds."""
    before = manifest.get("forgetting")
    after = [one["loss_elsewhere"] for one in adapters if "loss_elsewhere" in one]
    return f"{median(after) - before['loss_before']:+.3f}" if before and after else NOTHING


PATH_HEADS = (
    "method", "path", "test %", "to as trained\npoints", "predictions\nchanged", "logits\ndiffer by", "verdict",
)  # fmt: skip


def path_cells(row: PathRow) -> list[str]:
    """The row as PATH_HEADS has it."""
    return [
        row.method,
        row.path,
        percent(row.test.median),
        points(row.versus),
        f"{row.changed:,} of {row.answers:,}",
        _logits([row]),
        row.verdict if row.verdict == "pass" else f"{row.verdict}: {row.reason}",
    ]


SUMMARY_HEADS = ("served on", "predictions\nchanged", "largest change\nof a score", "logits\ndiffer", "verdict")


def summary_cells(rows: Sequence[PathRow]) -> list[str]:
    """All methods of a task on one path in one row, as SUMMARY_HEADS has it."""
    largest = max(rows, key=lambda row: abs(row.versus.difference))
    worst = min(rows, key=lambda row: list(EXIT_CODES).index(row.verdict))
    return [
        rows[0].path,
        f"{sum(row.changed for row in rows):,} of {sum(row.answers for row in rows):,}",
        points(largest.versus) if any(row.changed for row in rows) else "none",
        _logits(rows),
        worst.verdict,
    ]


def _logits(rows: Sequence[PathRow]) -> str:
    found = [row.identity.get("relative_difference") for row in rows]
    known = [value for value in found if value is not None]
    return f"{max(known):.1e}" if known else NOTHING


def _entry(manifest: Mapping[str, Any], task: str, method: str) -> Mapping[str, Any]:
    entries = manifest["config"]["entries"]
    found: Mapping[str, Any] = next(
        one["finetune"] for one in entries if (one["task"], one["method"]) == (task, method)
    )
    return found


def _paper(entry: Mapping[str, Any]) -> str:
    """The paper's score where this is its setting: backbone, task, beams, options, all of the data."""
    task, options = entry["task"], entry["options"]
    whole = all(task.get(key) is None for key in ("train_examples", "dev_examples", "test_examples"))
    default = vars(METHODS[entry["method"]].options()) if entry["method"] in METHODS else {}
    papers = all(key in default and default[key] == value for key, value in options.items())
    found = paper_score(entry["backbone"], entry["method"], task["name"], entry["beams"])
    return f"{found[0]:.1f}" if found and whole and papers else NOTHING


def left_out(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What was not served, and why."""
    reasons: dict[str, list[str]] = {}
    for path in manifest["left_out"]:
        reasons.setdefault(path["reason"], []).append(path["id"])
    for reason, paths in reasons.items():
        yield f"Left out: {', '.join(paths)} ({reason})."
    served = set()
    for paths in manifest["paths"].values():
        served |= {method for path, methods in paths.items() if not path.startswith(AS_TRAINED) for method in methods}
    trained = list(dict.fromkeys(entry["method"] for entry in manifest["config"]["entries"]))
    if never := [method for method in trained if method not in served]:
        yield f"Judged as trained only, because no path here serves them: {', '.join(never)}."


def legend(verdict: Verdict) -> str:
    """How to read the tables."""
    return (
        "Scores are the median over seeds with the lowest and highest seed. Differences are paired by test item, each "
        "item's score being its mean over the seeds; brackets hold the 95% bootstrap interval over items, two made-up "
        "items, +1 and -1, among them, so that few items that agree are not taken for certainty. Between methods it is "
        "over items and seeds: it says how other items would turn out for adapters that are trained again, and is all "
        f"of -100 to +100 with fewer than {LEAST_SEEDS} seeds. Between a served path and as trained it is over items, "
        "for these very adapters. No correction is made "
        f"for several comparisons. pass: the interval lies above -{verdict.margin * 100:g} points on every path; "
        "inferior: it lies below; inconclusive: it holds that value. zero-shot: the bare backbone. Learning rate: the "
        "one with the lowest dev loss of those that were tried with the first seed. Loss elsewhere: of another task's "
        "answers, nats a token, and by how much training raised it. McNemar: exact, for 0/1 scores of "
        "one seed, of these very adapters. "
        "Served in fp32 every prediction must be the trained model's or, if that is not fp32, the first fp32 path's; "
        "elsewhere the interval of the difference to the trained model must hold 0; and each tenant's served logits "
        "must be nearest to its own trained model's, not to another tenant's or the bare backbone's."
    )
