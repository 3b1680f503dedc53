"""`perfbench plan`: what it says, and what it refuses in one line."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from perfbench.capacity.answer import answer
from perfbench.capacity.question import Question, prepare, targets
from perfbench.cli import main
from perfbench.errors import PerfbenchError
from perfbench.report.plain_tables import PlainTables

RESULTS = Path(__file__).parents[3] / "results"
LENGTHS = {"prompt_tokens": "100", "new_tokens": "20"}
ASKED: dict[str, Any] = {
    "model": "llama2-7b", "device": "a40", "tenants": 200, "rate": 40.0, "slo": "ttft=500ms,itl=40ms",
    "methods": "lora, lora: {rank: 256, label: lora-256}", "dtype": "bf16", **LENGTHS,
}  # fmt: skip
H200 = {
    "device": "h200",
    "methods": "lora",
    "runs": [RESULTS / "h200" / "verify-7b-q1", RESULTS / "h200" / "verify-7b-q8"],
}


@pytest.fixture(scope="module")
def planned() -> PlainTables:
    return answer(prepare(Question(**ASKED, price_per_hour=2.0)))


def test_the_answer_stands_first_and_says_why(planned: PlainTables) -> None:
    one, other = (next(row for row in planned.records() if row["method"] == name) for name in ("lora", "lora-256"))
    assert one["devices"] < other["devices"]
    expected = f"lora needs the fewest devices, at least {one['devices']} (lora-256 {other['devices']}). What binds is "
    assert planned.lead.startswith(expected)
    text = io.StringIO()
    planned.print(Console(file=text, width=80))
    assert text.getvalue().startswith(expected[:60])
    assert max(map(len, text.getvalue().splitlines())) <= 80


def test_cost_and_loads_are_of_the_devices(planned: PlainTables) -> None:
    for row in planned.records():
        assert row["cost_per_hour"] == 2.0 * row["devices"]
        assert row["cost_of_a_million"] == pytest.approx(row["cost_per_hour"] / (40.0 * 20 * 3600) * 1e6)
        if row["method"] != "none":
            assert row["loads_per_s"] == pytest.approx(row["loaded_share"] * row["rate_per_s"])
            assert row["load_bytes_per_s"] == pytest.approx(row["loads_per_s"] * row["bytes_per_tenant"])
        assert row["kept_share"] >= 0.99
        assert row["ttft_ms"] <= 500
        assert row["itl_ms"] <= 40
        assert row["figures"] == "roof"


def test_markdown_has_all_of_it(planned: PlainTables) -> None:
    text = planned.markdown()
    assert text.splitlines()[0] == planned.lead
    assert "| lora-256 |" in text
    assert "roof: from the bytes that are read" in text


def test_what_was_measured_stands_beside_the_roof_and_gives_the_answer() -> None:
    found = answer(prepare(Question(**{**ASKED, **H200, "rate": 100.0})))
    devices = {(row["method"], row["figures"]): row["devices"] for row in found.records()}
    assert devices["lora", "measured"] >= devices["lora", "roof"]
    assert found.lead.startswith(f"lora needs the fewest devices, {devices['lora', 'measured']}. ")
    assert "runtime static, 1, 8 rows" in found.note
    assert all(row["rows"] <= 8 for row in found.records() if row["figures"] == "measured")


def test_a_machine_without_a_table_is_planned_from_its_runs() -> None:
    asked = {"model": "llama-256x8", "dtype": "fp32", "device": "cpu", "runs": [RESULTS / "cpu-traffic"], "rate": 150.0}
    question = Question(**{**ASKED, **asked, "methods": "ia3", "slo": "ttft=100ms,itl=10ms"})
    assert {row["figures"] for row in answer(prepare(question)).records()} == {"measured"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "llama2-7bb"}, "--model: backbone 'llama2-7bb': .*did you mean 'llama2-7b'?"),
        ({"device": "h10"}, "--device: unknown device 'h10'; did you mean 'h100'?"),
        ({"device": "cpu"}, "--device cpu: no table has its speeds; give a measured run"),
        ({"methods": "lroa"}, "--methods.0: unknown method 'lroa'"),
        ({"methods": "mixed"}, "--methods: mixed: expected a method whose options say"),
        ({"methods": "lora: {rnk: 4}"}, "--methods.0.lora.rnk: unknown key 'rnk'.*did you mean 'rank'"),
        ({"methods": "lora, ["}, "--methods: malformed YAML"),
        ({"rate": 0.0}, "--rate: expected a number > 0, got 0.0"),
        ({"rate": float("nan")}, "--rate: expected .*finite number.*nan"),
        ({"slo": "ttft=500,itl=40ms"}, "--slo: ttft: expected a number with its unit, ms or s, .*got '500'"),
        ({"slo": "ttft=500ms,itl=40us"}, "--slo: itl: expected a number with its unit, ms or s, .*got '40us'"),
        ({"slo": "ttfs=500ms,itl=40ms"}, "--slo: unknown target 'ttfs'; did you mean 'ttft'?"),
        ({"slo": "ttft=500ms"}, "--slo: expected itl too"),
        ({"slo": "ttft=500ms,itl=4ms,itl=5ms"}, "--slo: expected itl once"),
        ({"slo": "ttft=500ms,itl=40ms,share=2"}, "--slo.share: expected a number"),
        ({"zipf": 9.0}, "--zipf: expected a number from 0 to 8, got 9.0"),
        ({"prompt_tokens": "9000"}, "--prompt-tokens: expected at most 4096 tokens"),
        ({"new_tokens": "{median: 9, sigma: 1}"}, "--new-tokens.*most"),
        ({"model": "llama2-13b", "device": "rtx-4090"}, "--model: llama2-13b in bf16 has .*of weights, and rtx-4090"),
        ({**H200, "device": "h100"}, "--run .*: expected a run on h100, got one on h200"),
        ({**H200, "rows": 9}, "--rows: expected at most 8, as many as were measured, got 9"),
        ({"runs": [RESULTS / "none"]}, "results/none: not a run directory|no such folder"),
    ],
)  # fmt: skip
def test_bad_input_is_named_in_a_line(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(PerfbenchError) as raised:
        prepare(Question(**{**ASKED, **changed}))
    assert re.search(message, str(raised.value)), str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"slo": "ttft=9ms,itl=40ms"}, r"one takes .* ms to its first token, .* ms more than the 9 ms that it may"),
        ({"slo": "ttft=500ms,itl=9ms"}, r"one takes .* ms between its tokens, .* ms more than the 9 ms that it may"),
        ({"rows": 4000}, "lora does not fit the device: weights, one adapter and 4,000 rows take"),
    ],
)
def test_what_no_number_of_devices_serves_says_which_target_and_by_how_much(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(PerfbenchError, match=f"^no number of devices will do: .*{message}"):
        answer(prepare(Question(**{**ASKED, **changed})))


def test_targets_are_read_with_their_units() -> None:
    assert targets("ttft=1.5s, itl=40ms,share=0.95") == {"ttft_ms": 1500.0, "itl_ms": 40.0, "share": 0.95}


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = "plan --model llama2-7b --device h100 --tenants 50 --rate 5 --slo ttft=500ms,itl=40ms --methods ia3"
    assert main([*words.split(), "--format", "json"]) == 0
    assert [row["method"] for row in json.loads(capsys.readouterr().out)] == ["none", "ia3"]
    assert main(["plan", "--model", "llama2-7b"]) == 2
    assert capsys.readouterr().err == "perfbench: plan: expected --device too (see perfbench plan --help)\n"
