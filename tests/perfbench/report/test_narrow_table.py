"""From 50 columns on every piece of the table names each arm and shows its check: no figure without its proof."""

from __future__ import annotations

import pytest

from tests.perfbench.report.test_table import LORA, NONE, PARA, failed, manifest, printed

PLAIN = {"decode_tokens_per_s": {"ratio": 1.61, "low": 1.5, "high": 1.7, "rounds": 3}}
WIDE = {**PARA, "kept": LORA["kept"], "versus_plain": PLAIN, "arm": "para-of-a-long-name", "id": "c/long"}


@pytest.mark.parametrize("width", [100, 80, 60, 50])
def test_the_check_is_never_lost(width: int) -> None:
    members = (NONE, LORA, WIDE, failed("broken", "check_failed", "other tokens"), failed("big", "out_of_memory", None))
    lines = [line.rstrip() for line in printed(manifest(*members), width).splitlines()]
    heads = [line for line in lines if line.startswith("arm  ")]
    assert heads
    assert all(line.endswith(" check") for line in heads)
    for arm, verdict in (("none", "ok"), ("lora", "ok"), ("broken", "FAILED")):
        rows = [line for line in lines if line.startswith(f"{arm} ") and "kept most" not in line]
        assert len(rows) == len(heads)
        assert all(line.endswith(f" {verdict}") for line in rows)
    assert any("MEMORY" in line for line in lines)
