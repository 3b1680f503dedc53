"""The words and tables of a profile, from figures that are known."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from perfbench.profiling.profile_table import answer, legend, render, tables


def kinds(device: bool = False, **ms: float) -> dict[str, dict[str, float]]:
    """Kinds with that many milliseconds, half of them outside of operations (or idle), one operation a millisecond."""
    found = {
        kind: {"host_ms": time, "outside_ms": time / 2, "operations": time, "launches": time if device else 0,
               "device_ms": time if device else 0, "gap_ms": time / 2 if device else 0,
               "low_ms": time - 0.1, "high_ms": time + 0.1}
        for kind, time in ms.items()
    }  # fmt: skip
    found["total"] = {name: sum(one[name] for one in found.values()) for name in found["q"]}
    return found


def arm(step: dict[str, dict[str, float]], ms: float = 1.0) -> dict[str, Any]:
    return {
        "check": {"status": "ok", "reason": None},
        "breakdown": {"prefill": step, "decode step": step},
        "unprofiled_decode_step_ms": ms,
        "decode_step_spread": 0.1,
        "replays": False,
        "peak_bytes": 2**20,
    }


def profile(**arms: dict[str, Any]) -> dict[str, Any]:
    return {"case": "x/lora-eager", "decode_steps": 2, "arms": {f"{name}-eager": one for name, one in arms.items()}}


BOTH = profile(none=arm(kinds(q=2, head=4), 5.0), lora=arm(kinds(q=5, head=5, shrink=2), 7.5))


def test_the_rows_are_sorted_by_what_they_add_and_the_shares_are_of_the_whole() -> None:
    prefill, decode = tables(BOTH)
    assert prefill.title == "prefill, on the host"
    assert decode.heads == ("where", "none ms", "lora ms", "extra ms", "share %", "ops", "extra", "python ms", "extra")
    assert decode.rows == (
        ("q", "2.00", "5.00", "3.00", "50", "5", "3", "2.50", "1.50"),
        ("shrink", "0.00", "2.00", "2.00", "33", "2", "2", "1.00", "1.00"),
        ("head", "4.00", "5.00", "1.00", "17", "5", "1", "2.50", "0.50"),
        ("total", "6.00", "12.00", "6.00", "100", "12", "6", "6.00", "3.00"),
    )


def test_the_answer_says_what_is_added_and_where() -> None:
    said = answer(BOTH)
    assert said[0] == "A decode step takes 7.50 ms with lora and 5.00 ms bare: +2.50 ms (+50%), and +6 operations."
    assert said[1] == ("Under the profiler, which adds to every operation, +6.00 ms, most of it in q +3.00, "
                       "shrink +2.00, head +1.00 ms.")  # fmt: skip
    assert "none: no device: the host computes, and spends 50%" in said[2]


def test_on_a_device_the_columns_are_launches_and_gaps() -> None:
    captured = {**arm(kinds(True, q=3), 3.1), "replays": True}
    found = profile(none=arm(kinds(True, q=2), 4.0), lora=captured)
    assert tables(found)[1].title == "decode step, on the device"
    assert tables(found)[1].rows[0] == ("q", "2.00", "3.00", "1.00", "100", "3", "1", "1.50", "0.50")
    assert "launches" in answer(found)[0]
    bare, own = answer(found)[2:4]
    assert bare == "none: host-bound: the device works for 2.00 ms of a decode step and idles for 50% of it."
    assert own.startswith("lora: device-bound: the device works for 3.00 ms of a decode step and idles for 3% of it")
    assert "captured graph" in own
    assert "gaps" in legend(found)


def test_an_arm_that_adds_nothing_has_no_shares() -> None:
    found = profile(none=arm(kinds(q=2, head=4)), lora=arm(kinds(q=1.999, head=4.001)))
    assert {row[4] for row in tables(found)[1].rows} == {"-"}
    assert tables(found)[1].rows[0][3] == "0.00"
    assert "most of it" not in " ".join(answer(found))
    assert "-0.00" not in str(tables(found))


def test_a_kind_that_varies_by_more_than_it_grew_is_not_named() -> None:
    noisy = kinds(q=5, head=5, shrink=2)
    noisy["q"]["low_ms"] = 1.0
    found = profile(none=arm(kinds(q=2, head=4), 5.0), lora=arm(noisy, 7.5))
    assert [row[4] for row in tables(found)[1].rows] == ["-", "33", "17", "100"]
    assert answer(found)[1].endswith("most of it in shrink +2.00, head +1.00 ms.")


def test_the_bare_backbone_alone() -> None:
    found = profile(none=arm(kinds(q=2, head=4)))
    assert tables(found)[1].heads == ("where", "none ms", "share %", "ops", "python ms")
    assert tables(found)[1].rows[0] == ("head", "4.00", "67", "4", "2.00")


def test_a_failed_check_and_a_busy_machine_are_told_first() -> None:
    failed = {"status": "check_failed", "reason": "logits differ"}
    broken = {**arm(kinds(q=2)), "check": failed, "decode_step_spread": 3.0}
    warnings = answer(profile(none=arm(kinds(q=2)), lora=broken))[:2]
    assert warnings[0].startswith("WARNING: lora-eager did not pass its check (logits differ)")
    assert warnings[1].startswith("WARNING: the decode steps of one arm lie 300% apart")


@pytest.mark.parametrize("width", [80, 100])
def test_it_fits_a_terminal_and_names_are_no_markup(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    long = {**BOTH, "arms": {"none-eager": BOTH["arms"]["none-eager"], "peft-single-eager": BOTH["arms"]["lora-eager"]}}
    render({**long, "case": "[red]x[/]/lora-eager"}, Console(width=width))
    said = capsys.readouterr().out
    assert "[red]x[/]" in said
    assert max(map(len, said.splitlines())) <= width
    assert "…" not in said
