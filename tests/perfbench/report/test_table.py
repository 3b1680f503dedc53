"""A run as a table: figures in their places, failures said, names as they are, words that follow the data."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
from typing import Any

import pytest
from rich.console import Console

from perfbench.errors import PerfbenchError, ScenarioError
from perfbench.figures.stats import median_interval, summary
from perfbench.report.formats import FORMATS, WIDTH
from perfbench.report.rows import rows
from perfbench.report.table import render
from perfbench.run_folder.run_directory import SCHEMA_VERSION, pending_case

MIB = 2**20


# As few as rank anything.
ROUNDS = 6


def case(
    arm: str, kept: tuple[float, float, float] | None = None, method: str | None = None, **changes: Any
) -> dict[str, Any]:
    """A measured case that kept `kept` (ratio, low, high) of 200 tokens/s; the bare one without it."""
    ratio = kept[0] if kept else 1.0
    speed, step = 200.0 * ratio, 10.0 / ratio
    interval = dict(zip(("ratio", "low", "high"), kept, strict=True)) | {"rounds": ROUNDS} if kept else None
    figures = {
        "total_ms": summary([step * 17] * ROUNDS),
        "ttft_ms": summary([step * 2] * ROUNDS),
        "itl_ms": summary([step] * 15 * ROUNDS),
        "decode_tokens_per_s": summary([speed] * ROUNDS),
        "tokens_per_s": summary([speed * 0.9] * ROUNDS),
    }
    tenant_bytes = int(1.5 * MIB) if kept else 0
    return {
        **pending_case(f"c/{arm}", "c", arm, method or arm, {}, "eager"),
        "status": "ok",
        "check": {"requests": 4, "tokens_equal": True, "ties": 0, "passed": True},
        "memory": {"peak_allocated_bytes": 50 * MIB, "tenants_that_fit": 4321},
        "adapters": {"parameters_per_tenant": 100, "bytes_per_tenant": tenant_bytes, "admit_ms": 2.0},
        "exact": {
            "aten_ops_per_decode_step": 777,
            "bytes_per_first_decode_step": 5_000_000,
            "least_flops_per_first_decode_step": 1_000_000,
            "bytes_per_decode_step": 5_000_000,
            "least_flops_per_decode_step": 1_000_000,
            "kept_bound": 0.97,
        },
        "summary": figures,
        "kept": {"decode_tokens_per_s": interval, "tokens_per_s": interval} if interval else None,
        **changes,
    }


def failed(arm: str, status: str, reason: str | None) -> dict[str, Any]:
    return {**pending_case(f"c/{arm}", "c", arm, "lora", {}, "eager"), "status": status, "reason": reason}


def manifest(*members: dict[str, Any], device: str = "cpu", paper: str | None = None, **load: Any) -> dict[str, Any]:
    workload = {"prompt_tokens": 32, "new_tokens": 16, "beams": 1, "requests": 4, "tenants": 4, "resident": 8}
    comparison = {
        **{"id": "c", "backbone": "llama-tiny", "dtype": "fp32", "device": device, "runtime": "transformers"},
        "workload": {**workload, "tenant_mix": "distinct", "without_adapter": 0.0, **load},
        "case_ids": [member["id"] for member in members],
        "roof": {
            **{"name": "d", "bytes_per_s": 1e9, "flops_per_s": {"fp32": 1e12}},
            **{"memory_bytes": None, "source": "made up"},
        },
    }
    scenario = {"name": "demo", "question": "Which one?", "notes": ["chose the CPU"], "paper": paper}
    return {
        "schema_version": SCHEMA_VERSION,
        **{"perfbench_version": "0", "started_at": "2026-01-01", "finished_at": "2026-01-01", "processes": 1},
        "scenario": {**scenario, "repetitions": ROUNDS},
        "environment": {"cpu": {"model": "Abacus 3000", "threads": 2}, "gpus": [{"name": "Vector 9"}]},
        "comparisons": [comparison],
        "cases": {member["id"]: member for member in members},
    }


def printed(run: dict[str, Any], width: int = WIDTH) -> str:
    """What `render` prints as a table; lines never wider than asked."""
    out = io.StringIO()
    assert render(run, "table", Console(file=out, width=width)) is None
    assert max(map(len, out.getvalue().splitlines())) <= min(width, WIDTH)
    return out.getvalue()


def words(text: str) -> str:
    """`text` without its line breaks, which depend on the width."""
    return " ".join(text.split())


NONE = case("none")
LORA = case("lora", (0.9, 0.88, 0.92))
PARA = case("para", (0.98, 0.97, 0.99), adapters={"parameters_per_tenant": 5, "bytes_per_tenant": 512 * 1024})


def cells(line: str) -> list[str]:
    """The cells of a printed row: columns are two spaces apart."""
    return re.split(r"\s{2,}", line.strip())


def test_the_printed_row_has_every_figure() -> None:
    text = printed(manifest(NONE, LORA))
    row = next(line for line in text.splitlines() if line.startswith("lora "))
    assert cells(row) == [*("lora", "180", "90.0 [88.0, 92.0]", "22.2", "50", "1.5 MiB", "4,321", "45", "777", "ok")]
    bare = next(line for line in text.splitlines() if line.startswith("none "))
    assert cells(bare) == ["none", "200", "the bare one", "20.0", "50", "-", "4,321", "50", "777", "ok"]


def test_the_second_turn_s_time_takes_the_place_of_the_operations() -> None:
    second = {**LORA, "summary": {**LORA["summary"], "follow_up_ttft_ms": summary([7.5] * ROUNDS)}}
    text = printed(manifest(NONE, second, follow_up_tokens=16))
    row = next(line for line in text.splitlines() if line.startswith("lora "))
    assert cells(row) == ["lora", "180", "90.0 [88.0, 92.0]", "22.2", "7.50", "50", "1.5 MiB", "4,321", "45", "ok"]
    assert "second turn 16" in text
    assert "ops: ATen" not in words(text)
    assert "ops: ATen" in words(printed(manifest(NONE, LORA)))
    assert "turn 2 ttft: the time until the first token of the second turn" in words(text)


def test_the_ratio_to_plain_stands_there_where_it_was_measured() -> None:
    plain = {"decode_tokens_per_s": {"ratio": 1.61, "low": 1.5, "high": 1.7, "rounds": 3}}
    text = printed(manifest(NONE, {**LORA, "versus_plain": plain}))
    row = next(line for line in text.splitlines() if line.startswith("lora "))
    assert cells(row)[3] == "1.61"
    assert "times plain: decode speed over" in words(text)
    assert "times plain" not in words(printed(manifest(NONE, LORA)))


def test_an_unknown_roof_leaves_its_share_out() -> None:
    run = manifest(NONE)
    run["comparisons"][0]["roof"] = None
    row = rows(run)[0]
    assert row["least_ms_per_decode_step"] is None
    assert row["roof_share"] is None
    assert rows(manifest(NONE))[0]["least_ms_per_decode_step"] == pytest.approx(5.0)


def test_title_and_hardware_stand_beside_the_numbers() -> None:
    text = words(printed(manifest(NONE, LORA)))
    assert text.startswith("demo: Which one? chose the CPU llama-tiny fp32 cpu transformers; ")
    assert "prompt 32, new 16, beams 1, requests 4; tenants 4 (distinct), resident 8 " in text
    assert "On Abacus 3000, 2 threads; medians of 6 rounds." in text
    text = words(printed(manifest(NONE, LORA, device="cuda", prompt_tokens=None)))
    assert "On Vector 9 (host: Abacus 3000, 2 threads); medians of 6 rounds." in text
    assert "prompt as in the file, " in text


def test_an_environment_that_says_nothing_is_not_papered_over() -> None:
    run = manifest(NONE, device="cuda")
    run["environment"] = {}
    assert "On unknown GPU (host: unknown CPU, unknown threads)" in words(printed(run))


def test_lost_rounds_are_said() -> None:
    run = manifest(NONE, LORA)
    run["scenario"]["repetitions"] = 8
    assert "medians of 6 of 8 planned rounds." in words(printed(run))


def test_what_the_workloads_differ_in_is_in_the_titles() -> None:
    run, other = manifest(NONE), manifest(case("lora", (0.9, 0.8, 1.0)), without_adapter=0.5)
    other["comparisons"][0]["id"] = "d"
    run["comparisons"] += other["comparisons"]
    run["cases"] |= other["cases"]
    text = words(printed(run))
    assert "resident 8; without_adapter 0.0 " in text
    assert "resident 8; without_adapter 0.5 " in text
    assert "without_adapter" not in printed(manifest(NONE))


def test_a_mean_of_tenants_that_differ_is_marked() -> None:
    adapters = {"bytes_per_tenant": 512 * 1024, "of_tenants": {"bytes": {"least": 1, "median": 2, "most": 3}}}
    text = render(manifest(NONE, case("lora", (0.9, 0.88, 0.92), adapters=adapters)), "markdown")
    assert text is not None
    assert "| ~512.0 KiB |" in text


def test_memory_of_the_process_is_not_shown_as_an_arm_s() -> None:
    """It rises with the order of the arms."""
    memory = {"peak_allocated_bytes": None, "peak_resident_bytes": 900 * MIB, "tenants_that_fit": None}
    text = render(manifest(case("none", memory=memory)), "markdown")
    assert text is not None
    assert "| peak MiB |" in text
    assert "900" not in text


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        ("check_failed", "FAILED"),
        ("check_void", "void"),
        ("crashed", "CRASHED"),
        ("out_of_memory", "OUT OF MEMORY"),
    ],
)
def test_a_failed_case_is_a_row_that_says_so(status: str, verdict: str) -> None:
    reason = "relative difference 0.3 is over\nthe tolerance 0.02"
    run = manifest(NONE, failed("lora", status, reason))
    text = words(printed(run))
    assert f"lora: {verdict} relative difference 0.3 is over the tolerance 0.02" in text
    markdown = render(run, "markdown")
    assert markdown is not None
    row = next(line for line in markdown.splitlines() if line.startswith("| lora |"))
    assert row.endswith(f"| - | {verdict} relative difference 0.3 is over the tolerance 0.02 |")


def test_ties_and_cases_without_a_valid_sample_are_said() -> None:
    tied = case("lora", (0.9, 0.8, 1.0), check={"ties": 2})
    text = printed(manifest(NONE, tied, case("para", summary=None), failed("ia3", "pending", None)))
    assert next(line for line in text.splitlines() if line.startswith("lora ")).rstrip().endswith("tie 2")
    assert "no valid sample" in words(printed(manifest(case("para", summary=None))))
    assert next(line for line in text.splitlines() if line.startswith("ia3 ")).rstrip().endswith("pending")
    nothing = words(printed(manifest(failed("ia3", "pending", None))))
    assert "On Abacus 3000, 2 threads; nothing was timed." in nothing


def test_the_conclusion_names_a_clear_winner_and_the_cheapest() -> None:
    text = words(printed(manifest(NONE, LORA, PARA)))
    assert "para kept most of the bare backbone's decode speed, 98.0%, and no other arm's interval" in text
    assert "A tenant costs least with para: 512.0 KiB." in text


def test_overlapping_intervals_are_a_tie() -> None:
    near = case("ia3", (0.96, 0.95, 0.975))
    text = words(printed(manifest(NONE, LORA, PARA, near)))
    assert "decode speed, 98.0%, a tie with ia3: the intervals overlap." in text


def test_a_single_round_orders_nothing() -> None:
    one = {"decode_tokens_per_s": median_interval([0.99]), "tokens_per_s": median_interval([0.99])}
    text = words(printed(manifest(NONE, LORA, {**PARA, "kept": one})))
    assert "Nothing is ranked: fewer than 6 rounds, as here, don't tell arms apart." in text
    assert "kept most" not in text


def test_five_rounds_rank_nothing() -> None:
    run = copy.deepcopy(manifest(NONE, LORA, PARA))
    for member in run["cases"].values():
        member["summary"]["total_ms"]["rounds"] = 5
    assert "Nothing is ranked: fewer than 6 rounds" in words(printed(run))


def test_two_rounds_say_nothing_of_a_single_arm() -> None:
    run = copy.deepcopy(manifest(NONE, LORA))
    for member in run["cases"].values():
        member["summary"]["total_ms"]["rounds"] = 2
    text = words(printed(run))
    assert "Nothing is ranked: fewer than 6 rounds" in text
    assert "of the bare backbone's decode speed." not in text


def test_an_interval_of_few_rounds_is_not_printed_even_where_a_run_has_one() -> None:
    """As perfbench 0.1 wrote it: of three rounds, it held the truth in 74%."""
    text = printed(manifest(NONE, LORA, beside_lora(PARA, 1.09, rounds=3), paper="para_table4"))
    para = next(line for line in text[text.index("Beside PARA") :].splitlines() if line.startswith("para "))
    assert cells(para)[1] == "1.09"


def test_correlated_rounds_are_told() -> None:
    run = copy.deepcopy(manifest(NONE, LORA, PARA))
    assert "correlated" not in printed(run)
    lora = next(member for member in run["cases"].values() if member["arm"] == "lora")
    lora["kept"]["decode_tokens_per_s"]["correlated"] = True
    assert "The rounds of lora are correlated, each with the one before it" in words(printed(run))
    assert "measure in several processes (--processes 6)" in words(printed(run))


def test_faster_with_an_adapter_than_without_is_implausible() -> None:
    text = words(printed(manifest(NONE, LORA, case("para", (1.2, 1.1, 1.3)))))
    assert "Implausible: with para decoding was faster than without adapters" in text
    assert "Implausible" not in words(printed(manifest(NONE, LORA, case("para", (1.01, 0.99, 1.03)))))


def test_a_single_arm_wins_nothing() -> None:
    assert "lora kept 90.0% of the bare backbone's decode speed." in words(printed(manifest(NONE, LORA)))
    alone = words(printed(manifest(NONE)))
    assert "kept most" not in alone
    assert "A tenant costs least" not in alone


def test_kernel_sets_are_told_apart() -> None:
    fused = {**LORA, "id": "c/lora-triton", "kernels": "triton"}
    text = words(printed(manifest(NONE, LORA, fused)))
    assert "lora (eager)" in text
    assert "lora (triton)" in text


def test_names_are_shown_as_they_are() -> None:
    nasty = case("[red]a|b[/red]\\", (0.9, 0.8, 1.0), method="lora")
    run = manifest(NONE, nasty)
    run["scenario"]["question"] = "[bold]Which[/bold] one?"
    text = printed(run)
    assert "[bold]Which[/bold] one?" in text
    assert "[red]a|b[/red]\\ kept 90.0%" in words(text)
    markdown = render(run, "markdown")
    assert markdown is not None
    row = next(line for line in markdown.splitlines() if "[red]" in line)
    assert row.startswith("| [red]a\\|b[/red]\\\\ | ")
    heads = next(line for line in markdown.splitlines() if line.startswith("| arm "))
    assert len(re.findall(r"(?<!\\)\|", row)) == heads.count("|")


def test_a_long_arm_and_a_narrow_terminal_stay_inside() -> None:
    run = manifest(NONE, case("lora-with-a-name-that-goes-on-and-on", (0.9, 0.8, 1.0), method="lora"))
    printed(run)
    printed(run, width=60)
    printed(run, width=300)


def test_csv_is_one_row_a_case_with_units_in_its_names() -> None:
    text = render(manifest(NONE, LORA, failed("para", "crashed", "signal 9,\nkilled")), "csv")
    assert text is not None
    read = list(csv.DictReader(io.StringIO(text)))
    assert [row["arm"] for row in read] == ["none", "lora", "para"]
    lora = read[1]
    assert float(lora["decode_tokens_per_s"]) == 180.0
    assert float(lora["kept_decode_tokens_per_s_low"]) == 0.88
    assert int(lora["peak_allocated_bytes"]) == 50 * MIB
    assert lora["energy_mj_per_token"] == ""
    assert (read[2]["status"], read[2]["reason"]) == ("crashed", "signal 9,\nkilled")
    assert read[2]["tokens_per_s"] == ""


def test_a_tie_of_several_arms_is_enumerated() -> None:
    members = [case(name, (0.9, 0.8, 1.0), method="lora") for name in ("first", "second", "third", "fourth")]
    assert "a tie with second, third and fourth: the intervals overlap." in words(printed(manifest(NONE, *members)))


def test_json_is_the_rows() -> None:
    run = manifest(NONE, LORA)
    text = render(run, "json")
    assert text is not None
    assert json.loads(text) == rows(run)
    assert rows(run)[1]["beams"] == 1


def test_a_run_without_cases_still_renders() -> None:
    pytest.importorskip("pyarrow")
    console = Console(file=io.StringIO())
    texts = {format: render(manifest(), format, console) for format in FORMATS}
    assert texts.pop("table") is None
    assert "which" in console.file.getvalue().lower()  # type: ignore[attr-defined]
    assert all(text is not None for text in texts.values())
    assert json.loads(texts["json"] or "null") == []


def test_an_unknown_format_is_answered_with_the_nearest() -> None:
    with pytest.raises(PerfbenchError, match="--format: unknown format 'markdwon'; did you mean 'markdown'"):
        render(manifest(), "markdwon")


def beside_lora(member: dict[str, Any], ratio: float, rounds: int = 6) -> dict[str, Any]:
    interval = {"ratio": ratio, "low": ratio - 0.01, "high": ratio + 0.01, "rounds": rounds}
    return {**member, "versus_lora": {"decode_tokens_per_s": interval, "tokens_per_s": interval}}


def test_para_table_4_is_laid_beside_ours() -> None:
    run = manifest(beside_lora(NONE, 1.11), LORA, beside_lora(PARA, 1.09), paper="para_table4")
    text = printed(run)
    beside = text[text.index("Beside PARA, Table 4") :]
    assert "NVIDIA A40 48 GB" in words(beside)
    lines = beside.splitlines()
    lora = next(line for line in lines if line.startswith("lora "))
    assert cells(lora) == ["lora", "1.00", "1.00", "50", "14,616"]
    para = next(line for line in lines if line.startswith("para "))
    assert cells(para) == ["para", "1.09 [1.08, 1.10]", "1.31", "50", "14,512"]
    assert not any(line.startswith("none ") for line in lines)
    markdown = render(run, "markdown")
    assert markdown is not None
    assert "| 1.09 [1.08, 1.10] | 1.31 | 50 | 14,512 | ok |" in markdown
    assert rows(run)[2]["paper_versus_lora_tokens_per_s"] == pytest.approx(32.8 / 25.1)
    assert rows(run)[0]["paper"] is None


def test_nothing_is_laid_beside_beams_that_the_paper_has_not() -> None:
    run = manifest(NONE, LORA, paper="para_table4", beams=2)
    assert "Beside" not in printed(run)
    assert {row["paper"] for row in rows(run)} == {None}


def test_fanlora_table_3_says_illegible() -> None:
    run = manifest(NONE, case("fanlora", (0.9, 0.8, 1.0)), LORA, paper="fanlora_table3", beams=3)
    text = printed(run)
    beside = text[text.index("Beside FanLoRA, Table 3") :].splitlines()
    assert cells(next(line for line in beside if line.startswith("fanlora "))) == [
        *("fanlora", "-", "illegible", "50", "16,054")
    ]
    assert not any(line.startswith("lora ") for line in beside)


def test_an_unknown_paper_is_refused() -> None:
    with pytest.raises(ScenarioError, match="unknown table 'para_table5'; did you mean 'para_table4'"):
        render(manifest(NONE, paper="para_table5"), "json")


@pytest.mark.parametrize(("load", "said"), [(0.9, False), (2.1, False), (6.5, True)])
def test_a_machine_that_was_busy_is_named(load: float, said: bool) -> None:
    run = manifest(NONE, LORA)
    run["environment"] |= {"load_average": [load, 1.0, 1.0]}
    run["environment"]["cpu"] |= {"usable_cores": 2}
    assert (f"busy when the run began (load {load:.1f} on 2 cores)" in words(printed(run))) is said
