"""`perfbench report`: the page in a real browser, hostile names, unfinished and damaged runs, a thousand cases."""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import json
import random
import re
import shutil
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from perfbench.cli import main
from perfbench.errors import PerfbenchError, RunDirectoryError
from perfbench.report import html, write
from perfbench.report.formats import rendered
from perfbench.report.page import SCRIPTS
from perfbench.report.read import read_runs
from perfbench.run_folder.run_directory import RunDirectory

ROOT = Path(__file__).parents[3]
REAL, SWEEP = ROOT / "results" / "cpu-multitenant-1", ROOT / "results" / "cpu-tenant-sweep"
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!-- ' & {{ 7*7 }} --> ]]>"


def page_of(*paths: Path) -> str:
    return html.render(read_runs(paths))


def data_of(page: str) -> dict[str, Any]:
    """What the page's charts are drawn from."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def charts_called(page: str, title: str) -> list[dict[str, Any]]:
    return [chart for several in data_of(page)["charts"] for chart in several if chart["title"].startswith(title)]


def copied(folder: Path, name: str = "run", **changes: Any) -> Path:
    """A copy of the real run with changes in its manifest."""
    shutil.copytree(REAL, folder / name)
    manifest = json.loads((folder / name / "run.json").read_text())
    (folder / name / "run.json").write_text(json.dumps(manifest | changes))
    return folder / name


def large_run(folder: Path, comparisons: int, rounds: int) -> Path:
    """A run of 5 x `comparisons` cases, made from the real one: another number of requests in each comparison."""
    real = json.loads((REAL / "run.json").read_text())
    base, draw = real["comparisons"][1], random.Random(0)
    manifest = copy.deepcopy(real) | {"comparisons": [], "cases": {}}
    lines = []
    for number in range(comparisons):
        prefix = f"{base['id']}/{number}"
        load = base["workload"] | {"requests": 1 + number % 50, "prompt_tokens": 16 * (1 + number // 50)}
        ids = {case_id: f"{prefix}/{case_id.rsplit('/', 1)[1]}" for case_id in base["case_ids"]}
        manifest["comparisons"].append(base | {"id": prefix, "workload": load, "case_ids": list(ids.values())})
        for old, new in ids.items():
            case = copy.deepcopy(real["cases"][old]) | {"id": new, "comparison": prefix}
            for summary in case["summary"].values():
                summary["rounds"] = rounds
            manifest["cases"][new] = case
            for turn in range(rounds):
                steps = [draw.lognormvariate(1.2, 0.2) for _ in range(15)]
                total = 18 + sum(steps)
                speeds = {"decode_tokens_per_s": 60e3 / (total - 18), "tokens_per_s": 64e3 / total}
                rest = dict.fromkeys(("void", "sm_clock_mhz", "throttle_reasons", "energy_mj"))
                lines.append({"case": new, "round": turn, "process": 0, "total_ms": total, "ttft_ms": 18.0,
                              "itl_ms": steps, "unix_time_s": 0.0} | speeds | rest)  # fmt: skip
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(manifest))
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_answer_comes_first_and_is_the_tables():
    page = page_of(REAL)
    answer = page.index("ia3 kept most of the bare backbone&#39;s decode speed, 96.8%, a tie with fanlora and para")
    assert answer < page.index("<table")
    assert "A tenant costs least with ia3: 37.5 KiB." in page
    assert "<td>96.8 [95.0, 98.2]</td>" in page


def test_the_page_has_the_tails_with_a_dash_where_samples_are_too_few():
    page = page_of(REAL)
    assert page.count("A p95 needs 100 values and a p99 1,000; a dash stands where there are fewer.") == 2
    table = page[page.index('<p class="caption">Tails: ') :]
    heads = re.findall(r"<th scope=.col.>(.*?)</th>", table[: table.index("</thead>")], re.DOTALL)
    assert [" ".join(head.split()) for head in heads] == [
        f"{name} p{share} ms" for name in ("ttft", "itl") for share in (50, 95, 99)
    ]
    cells = re.findall(r"<td>(.*?)</td>", table[: table.index("</tr>", table.index("<tbody>"))])
    assert [cell == "-" for cell in cells] == [False, False, True, False, False, False]


def test_a_chart_rounds_as_the_table_does():
    """97.4497 was shortened to 97.45 for the chart, which then wrote 97.5 beside the table's 97.4."""
    page = page_of(ROOT / "results" / "cpu-multitenant")
    (chart,) = [chart for chart in data_of(page)["charts"][0] if chart["title"].startswith("Share of the bare")]
    shown = [f"<td>{kept:.1f} [{low:.1f}, {high:.1f}]</td>" for _, kept, low, high in chart["rows"]]
    assert len(shown) == 6
    assert [cell for cell in shown if cell not in page] == []


def test_every_chart_of_the_issue_is_there_with_its_unit():
    page = page_of(REAL)
    titles = [chart["title"] for chart in data_of(page)["charts"][0]]
    wanted = ["Decode speed", "Share of the bare", "Time of a generate", "Time between tokens: its distribution",
              "Time between tokens over", "Overhead over the bare", "Peak memory", "Share of the roof"]  # fmt: skip
    assert [title for title, start in zip(titles, wanted, strict=True) if not title.startswith(start)] == []
    units = [chart["axis"] for several in data_of(page)["charts"] for chart in several]
    assert all(re.match(r"(tokens/s|ms|%|MiB)\b|% ", unit) for unit in units), units


def test_figures_are_those_of_the_run():
    manifest = RunDirectory.open(REAL).manifest
    page = page_of(REAL)
    speed, *_ = charts_called(page, "Decode speed")
    case = next(case for case in manifest["cases"].values() if case["arm"] == "lora")
    name, value, low, high = speed["rows"][1]
    assert (name, value) == ("lora", pytest.approx(case["summary"]["decode_tokens_per_s"]["median"], rel=1e-4))
    assert low < value < high
    memory, *_ = charts_called(page, "Peak memory")
    peak = case["memory"]["peak_allocated_bytes"] / 2**20
    assert sum(memory["rows"][1][1:]) == pytest.approx(peak, rel=1e-4)
    assert "did not record the KV cache apart" in memory["note"]


def test_the_distribution_counts_every_step_once():
    times, *_ = charts_called(page_of(REAL), "Time between tokens: its distribution")
    beyond = int(re.search(r"(\d+) of 10,500 steps", times["note"])[1])
    assert sum(map(sum, times["data"]["counts"])) + beyond == 7 * 100 * 15


def test_the_chart_library_is_what_its_package_has():
    """The hashes in the vendor folder's README are those of the npm packages' files."""
    vendor = ROOT / "perfbench" / "report" / "vendor"
    said = dict(re.findall(r"\| `(\S+\.js)` .*`([0-9a-f]{64})` \|", (vendor / "README.md").read_text()))
    scripts = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in vendor.glob("*.js")}
    assert said == scripts
    assert {f"vendor/{name}" for name in scripts} < set(SCRIPTS)


def test_overhead_is_the_difference_to_the_bare_backbone():
    overhead, *_ = charts_called(page_of(REAL), "Overhead")
    rows = {row[0]: row for row in overhead["rows"]}
    assert "none" not in rows
    assert rows["lora"][4] == 765 - 485
    samples = read_runs([REAL])[0].samples
    prefix = "llama-256x8-fp32-cpu/transformers/p32-n16-b1-q4-t4-r4-distinct"
    pairs = list(zip(samples[f"{prefix}/lora-eager"], samples[f"{prefix}/none-eager"], strict=True))
    prefill = median(lora["ttft_ms"] - none["ttft_ms"] for lora, none in pairs)
    decode = median((a["total_ms"] - a["ttft_ms"]) - (b["total_ms"] - b["ttft_ms"]) for a, b in pairs)
    assert rows["lora"][1] == pytest.approx(prefill, rel=1e-4)
    assert rows["lora"][2] + rows["lora"][3] == pytest.approx(decode, rel=1e-4)


def test_recorded_parts_of_memory_are_a_true_stack(tmp_path):
    cases = json.loads((REAL / "run.json").read_text())["cases"]
    for case in cases.values():
        case["memory"] |= {"adapter_bytes": 0 if case["arm"] == "none" else 10_000, "kv_cache_bytes": 20_000}
    memory, *_ = charts_called(page_of(copied(tmp_path, cases=cases)), "Peak memory")
    assert memory["columns"] == ["method", "weights", "adapters", "KV cache", "workspace"]
    assert "Not known" not in memory["note"]
    assert memory["rows"][1][3] == pytest.approx(20_000 / 2**20, rel=1e-4)


def test_parts_that_exceed_the_peak_are_not_drawn_and_said(tmp_path):
    cases = json.loads((REAL / "run.json").read_text())["cases"]
    for case in cases.values():
        case["memory"] |= {"adapter_bytes": 0, "kv_cache_bytes": 10**12 if case["arm"] == "lora" else 20_000}
    memory, *_ = charts_called(page_of(copied(tmp_path, cases=cases)), "Peak memory")
    assert "lora" not in [row[0] for row in memory["rows"]]
    assert "more in parts than at the peak: lora." in memory["note"]


def test_the_licences_go_with_every_page():
    page = page_of(REAL)
    assert "Copyright 2010-2026 Mike Bostock" in page
    assert page.count("Permission to use, copy, modify") == 2


def test_scaling_is_drawn_over_what_alone_differs():
    page = page_of(SWEEP / "q8", SWEEP / "q64-lora")
    speed = charts_called(page, "Decode speed by")
    titles = ["Decode speed by tenants in the batch", "Decode speed by resident tenants"]
    assert [chart["title"] for chart in speed] == titles
    assert sorted({row[1] for row in speed[0]["rows"]}) == [1, 2, 4, 8, 16, 32, 64]
    assert sorted({row[1] for row in speed[1]["rows"]}) == [8, 16, 32, 64, 128, 256]


def test_runs_of_one_comparison_lie_side_by_side():
    page = page_of(*(ROOT / "results" / "cpu-110m" / f"q8-run-{number}" for number in (1, 2, 3)))
    across = charts_called(page, "The same comparison in several runs")
    assert len(across) == 2
    assert [row[0] for row in across[0]["rows"]][:3] == [f"fanlora, q8-run-{number}" for number in (1, 2, 3)]
    assert "lines differ between the runs" in page


def test_the_papers_figures_stand_where_the_setting_matches(tmp_path):
    manifest = json.loads((REAL / "run.json").read_text())
    assert "Table 4" not in page_of(REAL)
    page = page_of(copied(tmp_path, scenario=manifest["scenario"] | {"paper": "para_table4"}))
    assert "Beside PARA, Table 4" in page
    assert "14,572" in page


def test_a_planted_shift_is_found_and_a_steady_run_is_not_accused(tmp_path):
    run = copied(tmp_path)
    for slower, expected in ((1.0, "steady"), (1.3, "shifts by")):
        draw, lines = random.Random(1), []
        for line in (REAL / "samples.jsonl").read_text().splitlines():
            sample = json.loads(line)
            factor = slower if sample["round"] >= 50 else 1.0
            sample["itl_ms"] = [factor * draw.gauss(10, 0.5) for _ in sample["itl_ms"]]
            lines.append(json.dumps(sample) + "\n")
        (run / "samples.jsonl").write_text("".join(lines))
        drift, *_ = charts_called(page_of(run), "Time between tokens over")
        assert all(row[1].startswith(expected) for row in drift["rows"]), drift["rows"]
    assert {row[3] for row in drift["rows"]} <= set(range(49, 54))


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """The real run with hostile text in every name that a user chooses."""
    manifest = json.loads((REAL / "run.json").read_text())
    text = json.dumps(manifest)
    for name in ("fanlora", "multitenant", "llama-256x8", "AMD EPYC"):
        text = text.replace(json.dumps(name), json.dumps(f"{name} {HOSTILE}"))
    changed = json.loads(text)
    changed["scenario"]["question"] = changed["environment"]["variables"][HOSTILE] = HOSTILE
    failed = next(iter(changed["cases"].values()))
    failed |= {"status": "crashed", "reason": HOSTILE, "summary": None}
    return copied(tmp_path, "run " + HOSTILE.replace("/", "_"), **changed)


def test_hostile_names_stay_text(hostile):
    page = page_of(hostile)
    assert "<img" not in page
    assert page.count("</script>") == page.count("<script") == 4
    assert "49" not in re.findall(r"&amp; (\S+) --&gt;", page)
    assert HOSTILE in data_of(page)["charts"][0][0]["rows"][1][0]


def test_only_its_own_scripts_may_run():
    page = page_of(REAL)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert len(re.findall(r"&#39;sha256-|'sha256-", policy[1])) == 3
    assert "unsafe-inline" not in policy[1].split("script-src")[1]


def drawn(browser: Any, folder: Path, page: str, **view: Any) -> Any:
    """The page in a browser's tab so tall that every open chart is drawn, once they are."""
    (folder / "report.html").write_text(page, encoding="utf-8")
    tab = browser.open(folder / "report.html", height=40_000, **view)
    tab.wait_for("[...document.querySelectorAll('figure')].every(figure => figure.querySelector('svg'))")
    return tab


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_a_browser_draws_every_chart_and_complains_of_nothing(browser, tmp_path, hostile, width, dark):
    page = page_of(hostile, SWEEP / "q64-lora")
    tab = drawn(browser, tmp_path, page, width=width, dark=dark)
    assert tab.complaints() == []
    assert tab.requests() == [(tmp_path / "report.html").as_uri()]
    charts = data_of(page)["charts"]
    assert tab.ask("document.querySelectorAll('svg').length") == sum(map(len, [*charts[: html.OPEN_FIRST], charts[-1]]))
    # Hostile text is there as text and has made nothing.
    assert HOSTILE in tab.ask("document.body.textContent")
    assert tab.ask("document.querySelectorAll('img').length") == 0
    assert "owned" not in tab.ask("document.title").split("onerror")[0]
    # The page is not wider than the screen, and closed comparisons draw once they are opened.
    assert tab.ask("document.documentElement.scrollWidth - innerWidth") <= 0
    tab.ask("document.getElementById('open-all').click()")
    tab.wait_for(f"document.querySelectorAll('svg').length === {sum(map(len, charts))}")
    # Every chart is a table too.
    tab.ask("document.querySelectorAll('figure details').forEach(details => { details.open = true })")
    tab.wait_for(f"document.querySelectorAll('figure table').length === {sum(map(len, charts))}")
    assert tab.complaints() == []


def test_no_text_of_a_chart_is_cut_off_or_lies_on_another(browser, tmp_path):
    for width in (1200, 390):
        tab = drawn(browser, tmp_path, page_of(REAL), width=width)
        outside = """[...document.querySelectorAll('figure')].flatMap(figure => {
            const frame = figure.getBoundingClientRect();
            return [...figure.querySelectorAll('svg text')].filter(text => {
                const box = text.getBoundingClientRect();
                return box.width && (box.left < frame.left - 2 || box.right > frame.right + 2);
            }).map(text => figure.chart.title + ': ' + text.textContent);
        })"""
        assert tab.ask(outside) == []
        overlapping = """[...document.querySelectorAll('figure svg')].flatMap(svg => {
            const boxes = [...svg.querySelectorAll('text')].filter(text => text.textContent.trim())
                .map(text => [text.textContent, text.getBoundingClientRect()]);
            return boxes.flatMap(([name, a], at) => boxes.slice(at + 1).filter(([, b]) =>
                Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 &&
                Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4).map(([other]) => name + ' / ' + other));
        })"""
        assert tab.ask(overlapping) == []


@pytest.mark.parametrize(
    "fault",
    [
        '<script>document.title = "run"</script>',
        '<img src="data:x" onerror="document.title = 1">',
        '<img src="https://host.invalid/a.png">',
        '<link rel="stylesheet" href="https://host.invalid/a.css">',
    ],
)
def test_the_pages_policy_stops_what_is_planted_and_the_test_sees_it(browser, tmp_path, fault):
    tab = drawn(browser, tmp_path, page_of(REAL).replace("</main>", f"{fault}</main>"))
    assert any("Content Security Policy" in line for line in tab.complaints())
    assert tab.ask("document.title") == "multitenant"


def test_without_the_policy_a_load_and_a_broken_script_are_seen_too(browser, tmp_path):
    page = re.sub(r"<meta http-equiv[^>]*>", "", page_of(REAL))
    tab = drawn(browser, tmp_path, page.replace("</main>", '<img src="https://host.invalid/a.png"></main>'))
    assert "https://host.invalid/a.png" in tab.requests()
    (tmp_path / "broken.html").write_text(page.replace("const data = JSON.parse(", "const data = nothing("))
    assert any("nothing is not defined" in line for line in browser.open(tmp_path / "broken.html").complaints())


def test_a_thousand_cases_stay_under_3_mb_and_closed(tmp_path):
    page = page_of(large_run(tmp_path / "large", comparisons=200, rounds=8))
    assert len(page.encode()) < 3e6
    assert page.count('<details class="comparison">') == 197
    assert page.count('<details class="comparison" open>') == 3
    assert "in 200 of 200 comparisons of several methods" in page


def test_a_run_still_being_written_is_shown_and_said(tmp_path, capsys):
    manifest = json.loads((REAL / "run.json").read_text())
    cases = {
        case_id: case | dict.fromkeys(("summary", "kept", "versus_lora", "versus_plain")) | {"status": "pending"}
        for case_id, case in manifest["cases"].items()
    }
    run = copied(tmp_path, cases=cases, finished_at=None)
    half = (run / "samples.jsonl").read_bytes()[:400_000]
    whole_lines = half.count(b"\n")
    (run / "samples.jsonl").write_bytes(half)
    before = {path: path.read_bytes() for path in run.iterdir()}
    page = page_of(run)
    assert f"{whole_lines} of 1200 planned repetitions" in page
    assert "decode speed, 9" in page
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    # Nothing timed yet.
    (run / "samples.jsonl").unlink()
    assert "0 of 1200 planned" in page_of(run)
    assert "Nothing was measured" in page_of(run)


def test_a_truncated_samples_file_is_said(tmp_path):
    run = copied(tmp_path)
    (run / "samples.jsonl").write_bytes((run / "samples.jsonl").read_bytes()[:300_000])
    page = page_of(run)
    assert re.search(r"samples\.jsonl holds \d+ valid repetitions, run\.json summarises 1200", page)
    (run / "samples.jsonl").write_bytes(b"")
    assert "holds 0 valid repetitions" in page_of(run)


def test_void_repetitions_are_left_out_and_said(tmp_path):
    run = copied(tmp_path)
    lines = (run / "samples.jsonl").read_text().splitlines()
    lines[:2] = [json.dumps(json.loads(line) | {"void": "1 compilation(s) inside the window"}) for line in lines[:2]]
    (run / "samples.jsonl").write_text("\n".join(lines) + "\n")
    assert "2 of 1200 repetitions are void and left out: 1 compilation(s) inside the window." in page_of(run)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: (run / "run.json").write_text('{"schema_version": 1}'), "schema_version: expected 2, got 1"),
        (lambda run: (run / "run.json").write_text("{"), "not valid JSON"),
        (lambda run: (run / "run.json").unlink(), "it has no run.json"),
        (lambda run: (run / "samples.jsonl").unlink(), "samples.jsonl: can't be read"),
        (lambda run: (run / "samples.jsonl").write_text("{}\n"), "samples.jsonl:1: expected a sample"),
    ],
)
def test_a_damaged_run_among_good_ones_is_named(tmp_path, capsys, spoil, said):
    run = copied(tmp_path)
    spoil(run)
    out = tmp_path / "report.html"
    assert main(["report", str(REAL), str(run), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_the_same_run_twice_is_refused():
    with pytest.raises(RunDirectoryError, match="given twice"):
        read_runs([REAL, REAL / ".." / REAL.name])


def test_an_unwritable_out_leaves_what_was_there(tmp_path, capsys):
    out = tmp_path / "report.html"
    out.write_text("old")
    assert main(["report", str(REAL), "--out", str(tmp_path / "nowhere" / "report.html")]) == 2
    assert main(["report", str(REAL), "--out", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert ["No such file or directory" in errors[0], "is a folder" in errors[1]] == [True, True]
    assert main(["report", str(REAL), "--out", str(out)]) == 0
    assert out.read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_markdown_has_the_tables_the_notices_and_the_drift(tmp_path, capsys):
    run = copied(tmp_path, finished_at=None)
    assert main(["report", str(REAL), str(run), "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("### cpu-multitenant-1\n")
    assert "\n> This run is not finished" in text
    assert "| ia3 | 425 | 96.8 [95.0, 98.2] |" in text
    assert "Time between tokens over the repetitions: the level of" in text


def test_csv_has_a_row_for_each_case_or_each_repetition(capsys):
    assert main(["report", str(REAL), "--format", "csv"]) == 0
    cases = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(cases) == 12
    assert cases[1]["arm"] == "lora"
    assert float(cases[1]["kept_decode_tokens_per_s"]) == pytest.approx(0.8879, abs=1e-4)
    assert main(["report", str(REAL), "--format", "csv", "--samples"]) == 0
    repetitions = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(repetitions) == 1200
    assert len(repetitions[0]["itl_ms"].split(" ")) == 15
    assert main(["report", str(REAL), "--samples"]) == 2
    assert "expected --format csv, json or parquet" in capsys.readouterr().err


def test_parquet_without_its_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PerfbenchError, match=r"pip install 'adapter-perfbench\[parquet\]'"):
        rendered(write.RunsReport(read_runs([REAL])), "parquet")


def test_parquet_reads_back(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install 'adapter-perfbench[parquet]'")
    runs = read_runs([REAL])
    (tmp_path / "cases.parquet").write_bytes(rendered(write.RunsReport(runs), "parquet"))
    cases = parquet.read_table(tmp_path / "cases.parquet").to_pylist()
    assert [row["case"] for row in cases] == [row["case"] for row in write.case_rows(runs)]
    assert cases[1]["kept_decode_tokens_per_s"] == pytest.approx(0.8879, abs=1e-4)
    (tmp_path / "samples.parquet").write_bytes(rendered(write.SampleRows(runs), "parquet"))
    samples = parquet.read_table(tmp_path / "samples.parquet").to_pylist()
    assert len(samples) == 1200
    assert samples == list(write.sample_rows(runs))
