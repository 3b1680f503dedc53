"""At any width the table shows each arm and its check; what gives way is said."""

from __future__ import annotations

import pytest

from tests.perfbench.report.test_table import LORA, NONE, PARA, cells, failed, manifest, printed, words

PLAIN = {"decode_tokens_per_s": {"ratio": 1.61, "low": 1.5, "high": 1.7, "rounds": 3}}
WIDE = {**PARA, "kept": LORA["kept"], "versus_plain": PLAIN, "arm": "para-of-a-long-name", "id": "c/long"}


@pytest.mark.parametrize("width", [100, 80, 60, 40, 24])
def test_the_check_is_never_lost(width: int) -> None:
    members = (NONE, LORA, WIDE, failed("broken", "check_failed", "other tokens"), failed("big", "out_of_memory", None))
    text = printed(manifest(*members), width)
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("arm "))
    assert head.split()[-1] == "check"
    assert all(
        next(line for line in lines if line.startswith(f"{arm} ")).rstrip().endswith("ok") for arm in ("none", "lora")
    )
    assert next(line for line in lines if line.startswith("broken ")).rstrip().endswith("FAILED")
    assert "MEMORY" in text
    assert "left out at a width of" in words(text)


def test_what_is_left_out_is_said_and_what_is_there_is_whole() -> None:
    text = printed(manifest(NONE, {**LORA, "versus_plain": PLAIN}), 60)
    row = next(line for line in text.splitlines() if line.startswith("lora "))
    assert cells(row) == ["lora", "180", "90.0 [88.0, 92.0]", "1.61", "22.2", "50", "ok"]
    said = "left out at a width of 60: a tenant, more fit, roof %, ops /step; --format csv has every figure"
    assert said in words(text)
