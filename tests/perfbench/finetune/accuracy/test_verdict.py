"""From answers to verdicts: what counts as inferior, as served otherwise than trained, and as not known."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from perfbench.finetune.accuracy import verdict_words
from perfbench.finetune.accuracy.verdict import Verdict, judge

TRAINED, FP32, BF16 = "as-trained-fp32", "static-eager-fp32", "static-eager-bf16"
OK = {"status": "ok", "reason": "", "relative_difference": 1e-6}
Rule = Callable[[str, int, str, int], bool]  # (method, seed, path, item) -> whether the answer is right


def answers(
    right: Rule, items: int = 400, methods: tuple[str, ...] = ("lora", "para"), seeds: int = 3
) -> Iterator[dict[str, Any]]:
    for method in methods:
        for seed in range(seeds):
            for path in (TRAINED, FP32, BF16):
                for item in range(items):
                    good = right(method, seed, path, item)
                    yield {
                        "task": "t", "method": method, "seed": seed, "split": "test", "path": path, "id": f"i{item}",
                        "prediction": "yes" if good else "no", "score": float(good),
                    }  # fmt: skip


def verdict_on(right: Rule, identities: Mapping[tuple[str, str, str], Any] | None = None, **more: Any) -> Verdict:
    sound = {("t", path, method): OK for path in (FP32, BF16) for method in ("lora", "para")}
    return judge(
        answers(right, **more),
        tasks=["t"],
        methods=["lora", "para"],
        reference="lora",
        margin=0.05,
        trained_path=TRAINED,
        anchors={FP32: TRAINED},
        identities=sound | (identities or {}),
    )


def every_other(method: str, seed: int, path: str, item: int) -> bool:
    return item % 2 == 0


def rows(verdict: Verdict, method: str = "para") -> dict[str, str]:
    """path -> verdict, with that against the reference under `reference`."""
    found = {row.path: row.verdict for row in verdict.paths if row.method == method}
    return found | {"reference": next(row.verdict for row in verdict.methods if row.method == method)}


def test_equal_answers_pass() -> None:
    verdict = verdict_on(every_other)
    assert rows(verdict) == {FP32: "pass", BF16: "pass", "reference": "pass"}
    assert verdict.exit_code == 0
    (lora, para) = verdict.methods
    assert (lora.test.seeds, lora.test.items, lora.versus) == ((0.5, 0.5, 0.5), 400, {})
    assert set(para.versus) == {TRAINED, FP32, BF16}
    assert verdict.to_json()["exit_code"] == 0


def test_a_method_that_is_clearly_worse_is_inferior() -> None:
    verdict = verdict_on(lambda method, seed, path, item: item % 10 < (9 if method == "lora" else 6))
    assert rows(verdict)["reference"] == "inferior"
    assert verdict.exit_code == 1


def test_labels_keep_their_capitals_in_the_headline() -> None:
    verdict = verdict_on(lambda method, seed, path, item: method == "lora")
    rows = tuple(replace(row, method=row.method.upper()) for row in verdict.methods)
    assert "PARA (t, " in verdict_words.headline(replace(verdict, methods=rows))


def test_few_items_leave_it_open() -> None:
    verdict = verdict_on(every_other, items=20)
    assert rows(verdict)["reference"] == "inconclusive"
    assert verdict.exit_code == 3


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds_leave_it_open_whatever_the_items_say(seeds: int) -> None:
    """Between methods; what is served is held against its own adapters, and few of them do."""
    for rule in (every_other, lambda method, seed, path, item: (method == "lora") == (item % 10 < 9)):
        found = rows(verdict_on(rule, seeds=seeds))
        assert found == {FP32: "pass", BF16: "pass", "reference": "inconclusive"}
        assert verdict_on(rule, seeds=seeds).exit_code == 3


def test_a_spread_of_seeds_as_wide_as_the_margin_leaves_it_open() -> None:
    """Of 400 items the resampling of items alone would pass it: every seed but one is LoRA's equal, and that better."""

    def right(method: str, seed: int, path: str, item: int) -> bool:
        return item % 10 < (9 if (method, seed) == ("para", 2) else 7)

    verdict = verdict_on(right)
    assert rows(verdict) == {FP32: "pass", BF16: "pass", "reference": "inconclusive"}
    assert verdict.methods[1].versus[TRAINED].difference > 0


def test_the_order_of_the_answers_decides_nothing() -> None:
    """Served answers come as their batches were mixed; whose seed is whose must stay."""

    def right(method: str, seed: int, path: str, item: int) -> bool:
        return (item * 7 + 3 * seed) % 10 < 7 + (seed == 1)

    told = list(answers(right))
    mixed = random.Random(0).sample(told, len(told))
    found = []
    for items in (told, mixed):
        verdict = judge(items, tasks=["t"], methods=["lora", "para"], reference="lora", margin=0.05,
                        trained_path=TRAINED, anchors={}, identities={})  # fmt: skip
        found.append(verdict.methods[1].versus[TRAINED])
    assert found[0] == found[1]
    assert found[0].high - found[0].low > 0.1, "the seeds differ, and that shows"


def test_a_method_that_loses_as_served_only_is_inferior_there() -> None:
    """In bf16 both are served, and only PARA suffers: as trained it is LoRA's equal."""
    verdict = verdict_on(lambda method, seed, path, item: item % 10 < (6 if (method, path) == ("para", BF16) else 9))
    assert rows(verdict) == {FP32: "pass", BF16: "differs", "reference": "inferior"}
    assert next(row.decides for row in verdict.methods if row.method == "para") == BF16


def test_one_other_prediction_in_fp32_is_a_difference() -> None:
    """Right or wrong: the same score from other answers is no equality."""
    swapped = {0: 1, 1: 0}
    verdict = verdict_on(
        lambda method, seed, path, item: every_other(
            method, seed, path, swapped.get(item, item) if (method, path) == ("para", FP32) else item
        )
    )
    row = next(row for row in verdict.paths if (row.method, row.path) == ("para", FP32))
    assert (row.versus.difference, row.changed, row.answers, row.verdict) == (0, 6, 1200, "differs")
    assert rows(verdict, "lora")[FP32] == "pass"
    assert verdict.exit_code == 1


def test_what_was_trained_in_bf16_is_served_alike_in_fp32() -> None:
    """No path gives the trained model's very answers then; those in fp32 must still give each other's."""
    paths = {TRAINED: "as-trained-bf16", FP32: "transformers-eager-fp32", BF16: FP32}

    def verdict(odd: int) -> Verdict:
        items = [
            item | {"path": paths[item["path"]]}
            for item in answers(
                lambda method, seed, path, item: every_other(method, seed, path, item) ^ (path == BF16 and item < odd)
            )
        ]
        sound = {("t", path, method): OK for path in paths.values() for method in ("lora", "para")}
        return judge(
            items, tasks=["t"], methods=["lora", "para"], reference="lora", margin=0.05, trained_path="as-trained-bf16",
            anchors={FP32: "transformers-eager-fp32"}, identities=sound,
        )  # fmt: skip

    assert verdict(0).exit_code == 0
    wrong = [row for row in verdict(2).paths if row.verdict == "differs"]
    assert {(row.path, row.changed, row.reason) for row in wrong} == {
        (FP32, 6, "6 of 1200 predictions are not those of transformers-eager-fp32")
    }


def test_in_bf16_a_few_other_predictions_are_rounding() -> None:
    verdict = verdict_on(
        lambda method, seed, path, item: every_other(method, seed, path, item) ^ (path == BF16 and item < 2)
    )
    assert rows(verdict)[BF16] == "pass"


@pytest.mark.parametrize(("status", "expected"), [("wrong", "differs"), ("void", "inconclusive")])
def test_whose_logits_were_served_counts(status: str, expected: str) -> None:
    wrong = {"status": status, "reason": "para seed 0 is served as none", "relative_difference": 0.5}
    verdict = verdict_on(every_other, {("t", BF16, "para"): wrong})
    assert rows(verdict) == {FP32: "pass", BF16: expected, "reference": "pass"}
    assert verdict.exit_code == {"differs": 1, "inconclusive": 3}[expected]


def test_a_path_whose_logits_were_not_looked_at_does_not_pass() -> None:
    verdict = verdict_on(every_other, {("t", FP32, "para"): {}})
    assert rows(verdict)[FP32] == "inconclusive"


def test_an_item_without_an_answer_is_refused() -> None:
    items = [item for item in answers(every_other, items=5) if (item["method"], item["id"]) != ("para", "i3")]
    with pytest.raises(ValueError, match="i3: answered on one side only"):
        judge(items, tasks=["t"], methods=["lora", "para"], reference="lora", margin=0.1, trained_path=TRAINED,
              anchors={}, identities={})  # fmt: skip
