"""Step times: the roof's are those of `decode_step` itself, measured ones go through what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from perfbench.capacity.fit import bytes_of, plan_of, reads_whole
from perfbench.capacity.times import MeasuredTimes, RoofTimes, host_bytes_per_s, reading_line
from perfbench.figures.roof import DEVICES, decode_step, read_piece
from perfbench.methods.registry import METHODS
from perfbench.spec.backbone_config import NAMED_CONFIGS, find_config

CONFIG = find_config("llama-tiny")


def roof(method: str) -> RoofTimes:
    plan = plan_of(method, METHODS[method].options(), CONFIG)
    return RoofTimes(CONFIG, "bf16", DEVICES["a40"], plan, bytes_of(plan, "bf16"), host_bytes_per_s("a40"))


@pytest.mark.parametrize("method", ["none", "lora", "fanlora", "ia3", "para", "vera"])
@pytest.mark.parametrize(("rows", "length", "tenants"), [(1, 7, 1), (8, 100, 8), (8, 100, 3), (64, 40, 64)])
def test_a_step_of_the_roof_is_what_the_roof_says(method: str, rows: int, length: int, tenants: int) -> None:
    times = roof(method)
    kinds = [(times.plan, [row % tenants for row in range(rows)])] if times.plan else []
    lengths = [length] * rows
    work = decode_step(CONFIG, "bf16", prompt_tokens=lengths, generated_tokens=0, beams=1, adapters=kinds)
    found = times.step_s(rows, rows * length, tenants if times.plan else 0)
    assert found == pytest.approx(work.least_s(DEVICES["a40"], "bf16"), rel=1e-12)


def test_a_step_of_bare_requests_is_that_of_the_bare_backbone() -> None:
    assert roof("lora").step_s(4, 400, 0) == roof("none").step_s(4, 400, 0)


@pytest.mark.parametrize("method", ["none", "lora"])
def test_reading_a_prompt_is_its_tokens_one_by_one_but_for_what_is_done_once(method: str) -> None:
    """Operations: those of a step for each token, of the logits for the last alone. Bytes: once."""
    times, past, tokens = roof(method), 30, 20
    kinds = [(times.plan, [0])] if times.plan else []
    steps = [
        decode_step(CONFIG, "bf16", prompt_tokens=[length], generated_tokens=0, beams=1, adapters=kinds)
        for length in range(past, past + tokens)
    ]
    logits = 2 * CONFIG["vocab_size"] * CONFIG["hidden_size"]
    flops = sum(step.flops for step in steps) - (tokens - 1) * logits
    work = replace(steps[0], flops=flops)
    assert times.read_s(tokens, past, bool(times.plan)) == work.least_s(DEVICES["a40"], "bf16")
    if not times.plan:
        assert read_piece(CONFIG, "bf16", tokens=tokens, past=past) == work


def test_where_a_window_ends_reading_is_bounded_from_below() -> None:
    config = {**NAMED_CONFIGS["llama-tiny"], "model_type": "mistral", "sliding_window": 32}
    steps = [
        decode_step(config, "bf16", prompt_tokens=[length], generated_tokens=0, beams=1) for length in range(20, 60)
    ]
    logits = 2 * config["vocab_size"] * config["hidden_size"]
    exact = sum(step.flops for step in steps) - 39 * logits
    assert 0.9 * exact < read_piece(config, "bf16", tokens=40, past=20).flops <= exact


def test_only_para_reads_a_prompt_whole() -> None:
    served = ("none", "lora", "fanlora", "ia3", "road", "para")
    assert [name for name in served if reads_whole(plan_of(name, METHODS[name].options(), CONFIG))] == ["para"]


def test_a_load_takes_the_bytes_over_the_links_speed() -> None:
    times = roof("lora")
    assert times.load_s() == times.load_bytes / 32e9 > 0
    assert host_bytes_per_s("h100") == 2 * host_bytes_per_s("a40")


def test_between_measured_rows_a_line_is_drawn_and_none_beyond() -> None:
    times = MeasuredTimes({2: 0.010, 8: 0.040}, 0.001, 1e-5, 0.002, "a run")
    assert [times.step_s(rows, 0, 0) for rows in (1, 2, 5, 8)] == pytest.approx([0.010, 0.010, 0.025, 0.040])
    assert times.read_s(100, 0, True) == pytest.approx(0.002)
    assert times.most_rows == 8
    with pytest.raises(IndexError):
        times.step_s(9, 0, 0)


def test_reading_is_a_line_through_what_was_measured() -> None:
    assert reading_line([(10, 0.02), (30, 0.04)], {1: 0.5}) == pytest.approx((0.01, 0.001))
    assert reading_line([(11, 0.02)], {1: 0.01, 4: 0.015}) == pytest.approx((0.009, 0.001)), "one length"
