"""What a traffic run says: the answer in a sentence, the table, what is odd."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from perfbench.traffic.traffic_report import TrafficReport, exit_code

TAILS = {"median": 20.0, "p95": 41.5, "p99": None}
FIGURES = {
    "counted": 480, "kept_share": 0.995, "goodput_per_s": 11.9, "tokens_per_s": 204.0, "ttft_ms": TAILS,
    "itl_ms": {"median": 3.25, "p95": 6.0, "p99": 8.5}, "total_ms": TAILS, "wait_ms": TAILS, "tenants_seen": 90,
    "worst_tenant_ttft_ms": 61.0, "fairness": 0.93, "loaded_share": 0.25, "wait_growth_ms": 1.5,
}  # fmt: skip


def entry(held: int, failed: int | None, **more: Any) -> dict[str, Any]:
    points = [{"tenants": held, "rate_per_s": held / 10, "held": True, "repetitions": [], "figures": FIGURES}]
    points += [
        {"tenants": failed, "rate_per_s": failed / 10, "held": False, "repetitions": [], "figures": None}
    ] * bool(failed)
    proof = {"status": "ok", "reason": None, "requests": 8, "ties": 0, "control_parted": 8}
    return {"method": "lora", "status": "ok", "points": points, "most_tenants": {"held": held, "failed": failed},
            "throughput_per_s": 17.3, "proof": proof} | more  # fmt: skip


SCENARIO = {
    "name": "traffic", "question": "How many?", "backbone": "llama-256x8", "dtype": "fp32", "device": "cpu",
    "kernels": "eager", "repetitions": 2, "server": {"rows": 8, "resident": 16, "chunk_tokens": 64},
    "targets": {"ttft_ms": 100.0, "itl_ms": 10.0, "share": 0.99},
    "traffic": {"prompt_tokens": {"median": 32, "sigma": 0.7, "most": 128}, "zipf_exponent": 1.0, "tenants": None,
                "new_tokens": {"median": 16, "sigma": 0.0, "most": 16}, "arrivals": "poisson", "requests": 300,
                "rate_per_tenant": 0.1},
}  # fmt: skip
MANIFEST: dict[str, Any] = {
    "scenario": SCENARIO, "environment": {"cpu": {"model": "a CPU", "threads": 2}},
    "arms": {"none": entry(200, 210) | {"method": "none"}, "lora": entry(150, 157), "para": entry(180, 189)},
}  # fmt: skip


def changed(arm: str, **fields: Any) -> dict[str, Any]:
    found = deepcopy(MANIFEST)
    found["arms"][arm] |= fields
    return found


def test_the_answer_names_the_best_method_and_its_share_of_the_bare_backbone() -> None:
    first, tie, second = TrafficReport(MANIFEST).answer()
    assert tie == "One search can't tell para from lora, within a fifth of it."
    assert first == (
        "para serves most tenants within 100 ms to the first token and 10 ms between tokens: 180 (189 missed), each at "
        "0.1 requests/s on average, 90% of the bare backbone's."
    )
    assert second == "The others: none 200 (210 missed); lora 150 (157 missed)."


def test_where_nothing_is_held_that_is_said() -> None:
    manifest = changed("lora", points=[], most_tenants={"held": 0, "failed": 12})
    manifest["arms"]["para"] = deepcopy(manifest["arms"]["lora"])
    report = TrafficReport(manifest)
    assert list(report.answer()) == [
        "Without adapters: none 200 (210 missed).",
        "The targets were missed at every load that was tried: lora not even with 12 tenants; para not even with 12 "
        "tenants.",
    ]
    assert [column.cell(row) for row in report.rows() for column in report.columns()[1:2]] == ["200", "< 12", "< 12"]


def test_methods_that_are_further_apart_are_no_tie() -> None:
    manifest = changed("lora", most_tenants={"held": 149, "failed": 157})
    assert not any("can't tell" in sentence for sentence in TrafficReport(manifest).answer())


def test_the_setting_is_in_words() -> None:
    assert TrafficReport(MANIFEST).setting() == (
        "llama-256x8 fp32 cpu eager; 8 rows, 16 resident adapters; prompts about 32 (at most 128), new 16, poisson "
        "arrivals, Zipf 1 tenants; targets: 100 ms to the first token and 10 ms between tokens, on "
        "average, for 99% of the requests"
    )


def test_the_table_has_the_point_that_held() -> None:
    report = TrafficReport(MANIFEST)
    cells = [[column.cell(row) for column in report.columns()] for row in report.rows()]
    assert cells[1] == [
        "lora", "150", "75.0", "15.0", "90", "99.5", "204", "20.0", "41.5", "3.25", "8.50", "61.0", "25.0", "17.3",
        "ok (8)",
    ]  # fmt: skip
    assert len(report.records()) == 6
    assert [record["held"] for record in report.records()] == [True, False] * 3
    assert report.records()[1]["ttft_ms_p95"] is None


def test_an_arm_that_failed_its_proof_has_no_place_in_the_answer() -> None:
    proof = {"status": "check_failed", "reason": "2 of 8 answers are not those of their adapters (tenant 3, tenant 7)"}
    manifest = changed("para", status="check_failed", proof=proof)
    report = TrafficReport(manifest)
    assert next(iter(report.answer())).startswith("lora serves most tenants")
    assert list(report.reasons()) == [f"para: check_failed: {proof['reason']}"]
    assert exit_code(manifest) == 1


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("check_void", 1), ("crashed", 4), ("pending", 4)])
def test_the_exit_code_is_that_of_the_worst_arm(status: str, code: int) -> None:
    assert exit_code(changed("lora", status=status)) == code


def test_an_arm_without_any_point_is_a_line_of_dashes() -> None:
    manifest = changed(
        "lora", status="crashed", points=[], most_tenants=None, throughput_per_s=None, reason="it died", proof=None
    )
    report = TrafficReport(manifest)
    assert [arm for arm in ("none", "lora", "para") if f"{arm} " in " ".join(report.answer())] == ["none", "para"]
    (row,) = [row for row in report.rows() if row.arm == "lora"]
    assert [column.cell(row) for column in report.columns()][1:] == ["-"] * 13 + ["crashed"]
    assert "lora: crashed: it died" in report.reasons()
    assert "it died" in report.page()


def test_text_of_the_scenario_is_escaped_in_the_page() -> None:
    manifest = deepcopy(MANIFEST)
    manifest["scenario"]["question"] = "<script>alert(1)</script>"
    assert "<script>alert(1)" not in TrafficReport(manifest).page()


def test_points_that_were_asked_for_are_all_there() -> None:
    manifest = deepcopy(MANIFEST)
    manifest["scenario"]["traffic"]["tenants"] = [150, 157]
    report = TrafficReport(manifest)
    assert len(report.rows()) == 6
    assert list(report.answer()) == [
        "The targets were missed by none with 210 tenants at 21.0 requests/s; lora with 157 tenants at 15.7 "
        "requests/s; para with 189 tenants at 18.9 requests/s."
    ]


def test_a_price_per_hour_gives_the_cost_of_a_million_tokens() -> None:
    """204 tokens/s at 1.5 an hour: 1.5 / 3600 / 204 * 1e6."""
    assert "cost of\na million" not in [column.head for column in TrafficReport(MANIFEST).columns()]
    manifest = deepcopy(MANIFEST)
    manifest["scenario"]["price_per_hour"] = 1.5
    report = TrafficReport(manifest)
    (column,) = [column for column in report.columns() if column.head == "cost of\na million"]
    (lora,) = [row for row in report.rows() if row.arm == "lora"]
    assert lora.figures["tokens_per_s"] == 204
    assert column.cell(lora) == "2.04"
    assert "by what an hour of the machine costs, 1.5." in report.legend()
