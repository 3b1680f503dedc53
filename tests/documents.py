"""What README and the documentation show of results and of the code: marked blocks, each of which is made again here.

    <!-- table: results/cpu-multitenant/run.json -->
    ...
    <!-- /table -->

`python -m tests.documents` writes every block anew; the tests only compare. A number within a sentence is a block
inside the line: <!-- fact: least-effect -->3%<!-- /fact -->.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from perfbench.capacity import check
from perfbench.cli import parser
from perfbench.commands.planning import planned
from perfbench.figures import papers, stats
from perfbench.files.plain_text import format_bytes
from perfbench.finetune.study import study_table as study
from perfbench.gate import clocks, policy, power
from perfbench.history import store
from perfbench.report import tables
from perfbench.report.table import render
from perfbench.traffic.traffic_report import TrafficReport

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"<!-- (\w+): (\S+) -->(\n?)(.*?)(\n?)<!-- /\1 -->", re.DOTALL)
NAMES = {"lora": "LoRA", "fanlora": "FanLoRA", "ia3": "(IA)3", "ia3-original": "(IA)3, original", "para": "PARA"}


def pages() -> list[Path]:
    """README, how to contribute, and every page of the documentation that is written by hand."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def stale(text: str) -> list[str]:
    """`KIND: ARGUMENT` of each block of a page which is not what its source gives today."""
    return [
        f"{kind}: {argument}" for kind, argument, _, shown, _ in BLOCK.findall(text) if shown != made(kind, argument)
    ]


def made(kind: str, argument: str) -> str:
    """What a block holds."""
    return KINDS[kind](argument).strip()


def renewed(text: str) -> str:
    """The page with every block made again."""

    def block(found: re.Match[str]) -> str:
        kind, argument, line = found[1], found[2], found[3]
        return f"<!-- {kind}: {argument} -->{line}{made(kind, argument)}{line}<!-- /{kind} -->"

    return BLOCK.sub(block, text)


def _json(path: str) -> Any:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def _rows(path: str) -> list[dict[str, Any]]:
    """One mapping for each case that was measured, as `perfbench show --format json` prints them."""
    flat = json.loads(render(_json(path), "json") or "")
    return [row for row in flat if row["decode_tokens_per_s"] is not None]


def whole_table(path: str) -> str:
    """A run's tables as `perfbench show --format markdown` prints them."""
    return render(_json(path), "markdown") or ""


def short_table(path: str) -> str:
    """The table of README: one line for each method of a run with one comparison, in the words of the field, and above
    it the workload and the machine."""
    heads = ("method", "tokens/s", "speed, baseline = 100%", "memory of a tenant", "free tenant slots")
    lines = [[*heads, "share of the bandwidth limit"], ["---", *["---:"] * 5]]
    ranks = _ranks(path)
    for row in _rows(path):
        ends = [row[f"kept_decode_tokens_per_s{end}"] for end in ("", "_low", "_high")]
        bare = row["method"] == "none"
        name = "baseline: no adapter" if bare else NAMES[row["method"]]
        if row["arm"] in ranks:
            name += f", rank {ranks[row['arm']]}"
        lines.append(
            [
                name,
                f"{row['decode_tokens_per_s']:,.0f}",
                "100%" if bare else f"{ends[0]:.1%} [{100 * ends[1]:.1f}, {100 * ends[2]:.1f}]",
                "–" if bare else format_bytes(row["bytes_per_tenant"]),
                "–" if bare else f"{row['tenants_that_fit']:,}",
                f"{row['roof_share']:.0%}",
            ]
        )
    (comparison,) = _json(path)["comparisons"]
    load, machine = comparison["workload"], _json(path)["environment"]["gpus"][0]["name"]
    above = (
        f"{comparison['backbone']} in {comparison['dtype']} on {machine}: {load['requests']} requests of "
        f"{load['tenants']} tenants in one batch, {load['prompt_tokens']} tokens of prompt and {load['new_tokens']} "
        "new ones"
    )
    return above + ":\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ranks(path: str) -> dict[str, int]:
    """Arm -> its rank, of the methods that several arms of a run have."""
    cases = list(_json(path)["cases"].values())
    methods = [case["method"] for case in cases]
    return {case["arm"]: case["options"]["rank"] for case in cases if methods.count(case["method"]) > 1}


def sweep_table(path: str) -> str:
    """The speed against the baseline, in percent with its interval, over the one field in which the comparisons of a
    run differ."""
    loads = {one["id"]: one["workload"] for one in _json(path)["comparisons"]}
    (axis,) = [field for field in next(iter(loads.values())) if len({load[field] for load in loads.values()}) > 1]
    rows = [row for row in _rows(path) if row["method"] != "none"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [f"| {axis} | {' | '.join(NAMES[method] for method in methods)} |", f"|{' ---: |' * (len(methods) + 1)}"]
    for name, load in loads.items():
        own = {row["method"]: row for row in rows if row["comparison"] == name}
        kept = "kept_decode_tokens_per_s"
        cells = []
        for method in methods:
            mid, low, high = (own[method][f"{kept}{end}"] for end in ("", "_low", "_high"))
            between = "" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
            cells.append(f"{100 * mid:.1f}{between}")
        lines.append(f"| {load[axis]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def quantised_table(path: str) -> str:
    """For each workload and method what weights of 8 bits change: the decode speed, and the share of the bare
    backbone's that is kept, within each."""
    heads = ["requests", "method", "tokens/s", "in 8 bits", "times", "kept, %", "in 8 bits", "read in a step, MiB"]
    lines = [f"| {' | '.join(heads)} |", f"| ---: | --- |{' ---: |' * (len(heads) - 2)}"]
    found = {(row["requests"], row["method"], row["quantisation"]): row for row in _rows(path)}
    for requests, method in dict.fromkeys(key[:2] for key in found):
        pair = [found[requests, method, quantisation] for quantisation in ("none", "int8")]
        speeds = [row["decode_tokens_per_s"] for row in pair]
        kept = []
        for row in pair:
            mid, low, high = (row[f"kept_decode_tokens_per_s{end}"] for end in ("", "_low", "_high"))
            kept.append("-" if mid is None else f"{100 * mid:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        read = " to ".join(f"{row['bytes_per_decode_step'] / 2**20:,.0f}" for row in pair)
        cells = [
            f"{requests}",
            "baseline" if method == "none" else NAMES[method],
            *(f"{speed:,.0f}" for speed in speeds),
        ]
        lines.append(f"| {' | '.join([*cells, f'{speeds[1] / speeds[0]:.2f}', *kept, read])} |")
    return "\n".join(lines)


def answer(path: str) -> str:
    """The sentences under the last table of a run, as they are printed."""
    lines = whole_table(path).splitlines()
    (start,) = [place for place, line in enumerate(lines) if line.startswith("On ")][-1:]
    return "```text\n" + "\n".join(lines[start : lines.index("", start)]) + "\n```"


def power_table(path: str) -> str:
    """What the gate sees, and what it cries wolf at."""
    return power.render(_json(path))


def evaluation_table(path: str) -> str:
    """The score of each adapter of an evaluation, and by how many points it is above the bare backbone."""
    lines = ["| adapter | score % | points to the bare backbone |", "| --- | ---: | ---: |"]
    for row in _json(path)["results"]:
        points, versus = "-", row["versus"]
        if versus is not None:
            difference, low, high = (f"{100 * versus[name]:+.1f}" for name in ("difference", "low", "high"))
            points = f"{difference} [{low}, {high}]"
        lines.append(f"| {row['adapter']} | {100 * row['score']:.1f} | {points} |")
    return "\n".join(lines)


def accuracy_table(path: str) -> str:
    """Each method's test score over the seeds, and against LoRA's; where the run has them, the bare backbone's, the
    learning rate that a sweep chose, the lowest dev loss and the loss on another task's answers."""
    found = _json(path)
    heads = ["method", "trained parameters", "test %, median (lowest to highest seed)", "points to LoRA", "verdict"]
    more = ["learning rate", "dev loss", "loss elsewhere"] if found.get("sweeps") else []
    lines = [f"| {' | '.join(heads + more)} |", f"| --- | ---: | ---: | ---: | --- |{' ---: |' * len(more)}"]
    before = found["forgetting"]["loss_before"] if found.get("forgetting") else 0.0
    for _, test in found["verdict"].get("zero_shot", {}).values():
        cells = ["zero-shot", "0", f"{100 * test['seeds'][0]:.1f}", "-", "-", "-", "-", f"{before:.3f}"]
        lines.append(f"| {' | '.join(cells[: len(heads + more)])} |")
    for row in found["verdict"]["methods"]:
        adapters = found["adapters"][row["task"]][row["method"]]
        trained = adapters["0"]["trainable_parameters"]
        low, median, high = (100 * of(row["test"]["seeds"]) for of in (min, statistics.median, max))
        versus = row["versus"].get("as-trained-fp32")
        points = [f"{100 * versus[key]:+.1f}" for key in ("difference", "low", "high")] if versus else []
        shown = f"{points[0]} [{points[1]}, {points[2]}]" if points else "the reference"
        test = f"{median:.1f} ({low:.1f} to {high:.1f})"
        cells = [row["method"], f"{trained:,}", test, shown, row["verdict"] if points else "-"]
        if more:
            loss = statistics.median(one["best_dev_loss"] for one in adapters.values())
            after = statistics.median(one["loss_elsewhere"] for one in adapters.values()) - before
            cells += [f"{adapters['0']['learning_rate']:g}", f"{loss:.3f}", f"{after:+.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def study_table(path: str) -> str:
    """A study's table, and what the paper that it follows says."""
    found = _json(path)
    return "\n".join([*study.markdown(found), "", *map(tables.plain, study.notes(found)[1:])])


def traffic_table(path: str) -> str:
    """A traffic run as Markdown: its table, its machine and its answer."""
    report = TrafficReport(_json(path))
    lines = tables.markdown(report.columns(), report.rows())
    return "\n".join([report.setting() + ".", "", *lines, "", report.hardware(), *report.answer()])


# Name -> the words of a `perfbench plan` that a page shows.
PLANS = {
    "gpu": "--model llama2-7b --device h100 --tenants 2000 --rate 300 --slo ttft=500ms,itl=40ms "
    "--methods 'lora, lora: {rank: 64, label: lora-64}, para' --price-per-hour 3",
    "measured": "--model llama2-7b --device h200 --tenants 2000 --rate 50 --slo ttft=500ms,itl=40ms "
    "--methods lora,para --run results/h200/verify-7b-q1 results/h200/verify-7b-q8",
}


@cache
def plan(name: str) -> str:
    """A command of PLANS, and what it prints as Markdown."""
    command = f"perfbench plan {PLANS[name]}"
    arguments = parser().parse_args(shlex.split(command)[1:])
    arguments.run = [ROOT / folder for folder in arguments.run]
    text = planned(arguments).markdown().replace(f"{ROOT}/", "")
    return f"```sh\n{command}\n```\n\n{text}"


@cache
def plan_check(path: str) -> str:
    """A measured search beside its simulation."""
    return check.table((ROOT / path).parent).markdown().replace(f"{ROOT}/", "")


def parameter_table(_: str) -> str:
    """Trained parameters of one adapter of LLaMA-2 7B, as the papers print them and to the last one."""
    lines = ["| method | the papers | trained here | |", "| --- | ---: | ---: | --- |"]
    lines += [
        f"| {NAMES[name]} | {one.printed} | {one.exact:,} | {one.note} |" for name, one in papers.PARAMETERS.items()
    ]
    return "\n".join(lines)


def paper_table(name: str) -> str:
    """The speeds and the memory that a paper prints."""
    lines = ["| method | beams | tokens/s | MiB |", "| --- | ---: | ---: | ---: |"]
    for (method, beams), row in papers.PAPERS[name].rows.items():
        lines.append(f"| {NAMES[method]} | {beams} | {row.tokens_per_s or 'illegible'} | {row.mib:,} |")
    return "\n".join(lines)


def fact(name: str) -> str:
    """A number of a sentence."""
    return FACTS[name]()


def _found(path: str, *keys: str) -> Any:
    value = _json(path)
    for key in keys:
        value = value[key]
    return value


ACCURACY = "results/cpu-accuracy/accuracy.json"
COPA = "results/smollm2-copa/accuracy.json"
BOOLQ = "results/smollm2-boolq/accuracy.json"
RIVALS = "results/smollm2-rivals/accuracy.json"
_POLICY = policy.load(None)


def _paths(run: str, dtype: str) -> list[dict[str, Any]]:
    return [row for row in _found(run, "verdict", "paths") if row["path"].endswith(dtype)]


def _served(task: str, run: str) -> dict[str, Callable[[], str]]:
    """How many predictions were made as served, and how many of them changed."""
    return {
        f"{task}-answers": lambda: f"{sum(row['answers'] for row in _paths(run, 'fp32')):,}",
        f"{task}-changed-fp32": lambda: str(sum(row["changed"] for row in _paths(run, "fp32"))),
        f"{task}-changed-bf16": lambda: str(sum(row["changed"] for row in _paths(run, "bf16"))),
    }


def _copa_loss(method: str, rate: str) -> str:
    return f"{_found(COPA, 'sweeps', 'copa', method, rate):.2f}"


FACTS: dict[str, Callable[[], str]] = {
    "least-effect": lambda: f"{_POLICY.primary[0].least_effect:.0%}",
    "least-processes": lambda: str(policy.LEAST_PROCESSES),
    "instructions-tolerance": lambda: f"{_POLICY.tolerances['instructions_per_decode_step']:.1%}",
    "clock-share": lambda: f"{clocks.CLOCK_SHARE:.0%}",
    "throttled-share": lambda: f"{clocks.THROTTLED_SHARE:.0%}",
    "implausible-gain": lambda: f"{_POLICY.implausible_gain:.0%}",
    "least-rounds": lambda: str(stats.LEAST_ROUNDS),
    "least-p95": lambda: f"{stats.TAILS['p95'][1]:,}",
    "least-p99": lambda: f"{stats.TAILS['p99'][1]:,}",
    "least-change": lambda: f"{store.LEAST_CHANGE:.0%}",
    **_served("copa", COPA),
    **_served("boolq", BOOLQ),
    **_served("rivals", RIVALS),
    "copa-items": lambda: str(_found(COPA, "verdict", "zero_shot", "copa")[1]["items"]),
    "copa-bare": lambda: f"{_found(COPA, 'verdict', 'zero_shot', 'copa')[1]['seeds'][0]:.0%}",
    **{
        f"copa-{end}-{method}": partial(_copa_loss, method, rate)
        for end, rate in (("low", "0.001"), ("high", "0.01"))
        for method in ("ia3-all", "adalora")
    },
    "accuracy-margin": lambda: f"{100 * _found(ACCURACY, 'config', 'margin'):.0f}",
}


def file(path: str) -> str:
    """A Python file of the repository, as a block of code."""
    return f"```python\n{(ROOT / path).read_text(encoding='utf-8').strip()}\n```"


KINDS: dict[str, Callable[[str], str]] = {
    "table": whole_table,
    "short": short_table,
    "sweep": sweep_table,
    "quantised": quantised_table,
    "answer": answer,
    "power": power_table,
    "accuracy": accuracy_table,
    "evaluation": evaluation_table,
    "traffic": traffic_table,
    "study": study_table,
    "plan": plan,
    "check": plan_check,
    "parameters": parameter_table,
    "paper": paper_table,
    "fact": fact,
    "file": file,
}


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(kind, argument) of each block of a page."""
    for kind, argument, *_ in BLOCK.findall(text):
        yield kind, argument


if __name__ == "__main__":
    for page in pages():
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
