"""What a sample's figures can't be, given its times."""

from __future__ import annotations

from typing import Any

import pytest

from perfbench.figures.metrics import contradiction, sample_metrics


def sample(**changed: Any) -> dict[str, Any]:
    return sample_metrics([10.0, 12.0, 14.0, 16.0], requests=3, total_ms=16.5) | changed


def test_an_honest_sample_has_none() -> None:
    assert contradiction(sample(), requests=3, new_tokens=4) is None


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"itl_ms": [2.0, 2.0]}, "itl_ms: expected 3 steps after the first token, got 2"),
        ({"ttft_ms": 12.0}, "total_ms: the steps take 18.0 ms, the whole call 16.5 ms"),
        ({"tokens_per_s": 3 * sample()["tokens_per_s"]}, "tokens_per_s: 3 requests x 4 tokens in 16.5 ms are not"),
        ({"decode_tokens_per_s": 1.0}, "decode_tokens_per_s: 3 requests x 3 tokens in 6.5 ms are not 1.0"),
    ],
)
def test_one_that_contradicts_itself_is_told(changed: dict[str, Any], what: str) -> None:
    assert (contradiction(sample(**changed), requests=3, new_tokens=4) or "").startswith(what)
