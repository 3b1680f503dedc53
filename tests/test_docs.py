"""The documentation keeps its word: tables, numbers, commands, links, the reference, and a site that loads nothing."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import perfbench
from perfbench.cli import parser
from perfbench.figures.metrics import METRICS
from perfbench.gate import policy, power
from perfbench.spec.scenario_schema import schema
from tests import documents
from tests.browser import Browser
from tests.documents import ROOT, pages

PAGES = [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages()]
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
# What may have a digit in it and yet be a name, and not a measurement.
NAMES_WITH_DIGITS = re.compile(
    r"\(IA\)3|\(2022\)|\b(?:LLaMA-2|Qwen[123](?:\.5)?|GSM8K|D3|F1|A40|H[12]00|[bf]p?f?(?:16|32|64)|EMNLP 20\d\d|"
    r"\d+B|p\d\d|Python 3\.1\d(?: to 3\.1\d| or later)?|2\.0|(?:16|64)\s+bits|Table \d|Apache(?: License)? 2\.0|"
    r"Apache-2\.0|SHA-256)\b|^\d\. ",
    re.MULTILINE,
)


def sentences(text: str) -> str:
    """The prose of a page: without blocks that are made, code, formulas, drawings, addresses and names."""
    text = documents.BLOCK.sub("", text)
    for pattern in (FENCE, re.compile(r"<svg.*?</svg>", re.DOTALL), re.compile(r"\$\$.*?\$\$", re.DOTALL)):
        text = pattern.sub("", text)
    for pattern in (r"`[^`\n]*`", r"\$[^$\n]+\$", r"\]\([^)]*\)", r"<[^>]*>", r"^#.*$"):
        text = re.sub(pattern, "", text, flags=re.MULTILINE)
    return NAMES_WITH_DIGITS.sub("", text)


def numbers_in_prose(text: str) -> list[str]:
    """The lines that say a number which nothing holds true."""
    return [line.strip() for line in sentences(text).splitlines() if re.search(r"\d", line)]


def commands_in(text: str) -> list[list[str]]:
    """The arguments of every `perfbench` command in the sh blocks of a page."""
    shell = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    parts = re.split(r"\n|&&", shell)
    words = [shlex.split(part, comments=True) for part in parts]
    return [line[1:] for line in words if line and Path(line[0]).name == "perfbench"]


def broken_links(page: Path, text: str) -> list[str]:
    """Targets of links and pictures that are not there; the reference is made when the site is built."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|src=\"([^\"]+)\"", FENCE.sub("", text))
    made = {ROOT / "docs" / path for path in reference().PAGES}
    paths = [one or other for one, other in targets if "://" not in one + other]
    return [path for path in paths if not (found := (page.parent / path).resolve()).exists() and found not in made]


def reference() -> ModuleType:
    """docs/reference.py, as MkDocs imports it."""
    spec = importlib.util.spec_from_file_location("docs_reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.mark.parametrize("page", PAGES)
def test_every_marked_block_is_what_its_source_gives(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert documents.stale(text) == [], "write them anew: python -m tests.documents"
    assert len(re.findall(r"<!-- \w+: ", text)) == len(list(documents.blocks(text))), "a block is not closed"


@pytest.mark.parametrize("page", PAGES)
def test_no_number_of_a_sentence_starts_a_line(page: Path) -> None:
    """A comment at the start of a line ends the paragraph, in Markdown of every kind."""
    assert re.findall(r"^\s*<!-- fact: .*$", page.read_text(encoding="utf-8"), re.MULTILINE) == []


def test_a_changed_digit_in_a_block_is_found() -> None:
    """In each kind of block, and in the table of README its every digit."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for found in documents.BLOCK.finditer(text):
            places = [place for place in range(found.start(4), found.end(4)) if text[place].isdigit()]
            for place in places if found[1] in ("short", "fact") else places[:1]:
                changed = text[found.start() : place] + str((int(text[place]) + 1) % 10) + text[place + 1 : found.end()]
                assert documents.stale(changed) == [f"{found[1]}: {found[2]}"]


def test_every_result_that_is_shown_is_committed() -> None:
    tracked = subprocess.run(["git", "ls-files", "results"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    shown = [block for page in pages() for _, block in documents.blocks(page.read_text(encoding="utf-8"))]
    named = {path for path in shown if path.startswith("results/")}
    assert named
    if tracked:  # a source archive has no git
        assert named <= set(tracked)


def test_the_gates_power_is_what_was_measured() -> None:
    """The table is that of the JSON file (above), and the JSON file what the recorded pairs give with its seed."""
    path = ROOT / "results" / "gate" / "power-12.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    pairs = power.read_pairs(path.with_name("pairs.jsonl"))
    assert len(pairs) >= 60
    rules = policy.load(ROOT / ".github" / "perfbench-policy.yaml")
    # Two effects, each of which has draws of its own; all of the table takes a quarter of a minute.
    again = power.experiment(
        pairs, rules, effects=[0.03, 0.05], sessions=found["sessions"], sizes=[found["first_batch"]], seed=found["seed"]
    )
    again = json.loads(json.dumps(again))
    rows = [row for row in found["rows"] if row["effect"] in (0.03, 0.05)]
    curve = [row for row in found["curve"] if row["first_batch"] == found["first_batch"]]
    assert again == {**found, "rows": rows, "curve": curve, "simulated": {}}


@pytest.mark.parametrize("page", PAGES)
def test_no_number_of_a_sentence_is_untested(page: Path) -> None:
    assert numbers_in_prose(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "planted", ["It keeps 93% of the speed.", "LoRA takes 610 KiB.", "| a | 12.5 |", "1,726 of it"]
)
def test_a_planted_number_is_found(planted: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert numbers_in_prose(f"{text}\n{planted}\n") == [planted]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses_and_names_files_that_exist(page: Path) -> None:
    for command in commands_in(page.read_text(encoding="utf-8")):
        try:
            parser().parse_args(command)
        except SystemExit:
            pytest.fail(f"{page.name}: perfbench {shlex.join(command)}")
        for word in command:
            if word.startswith(("scenarios/", "results/")):
                assert (ROOT / word).exists(), word


def test_the_pages_have_commands() -> None:
    shown = {command[0] for page in pages() for command in commands_in(page.read_text(encoding="utf-8"))}
    assert {"run", "ab", "gate", "report", "history", "profile", "verify", "finetune", "accuracy", "roof"} <= shown


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_found() -> None:
    assert broken_links(ROOT / "README.md", "[a](docs/none.md) [b](docs/index.md)") == ["docs/none.md"]


def test_every_command_option_field_and_figure_is_in_the_reference() -> None:
    made = {path: page() for path, page in reference().PAGES.items()}
    for command in reference().leaves(parser()):
        assert f"## {command.prog}\n" in made["reference/commands.md"]
        assert f"`{command.prog}`" in made["reference/exit-codes.md"]
        for action in command._actions:
            for name in action.option_strings:
                assert name in ("-h", "--help") or f"`{name}`" in made["reference/commands.md"]
    found = schema()
    workload = found["properties"]["workload"]["anyOf"][0]["properties"]
    for field in (*found["properties"], *workload):
        assert f"| `{field}` |" in made["reference/scenario.md"]
    for name, metric in METRICS.items():
        (row,) = [line for line in made["reference/metrics.md"].splitlines() if line.startswith(f"| `{name}` |")]
        assert f" | {metric.unit.replace('_', chr(92) + '_')} | " in row


def test_an_option_that_is_added_is_in_the_reference() -> None:
    command = argparse.ArgumentParser(prog="perfbench added")
    action = command.add_argument("--new|er", type=int, default=3, metavar="N", help="how *many*")
    row = reference().argument_row(action)
    assert row == ["`--new|er`", r"how \*many\*", "`N`", "`3`"]
    assert r"`--new\|er`" in reference().table(("a", "b", "c", "d"), [row])


def test_every_page_is_in_the_navigation() -> None:
    configured = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.SafeLoader)

    def paths(nav: object) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        return [path for item in (nav.values() if isinstance(nav, dict) else nav) for path in paths(item)]  # type: ignore[attr-defined]

    written = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert set(paths(configured["nav"])) == written | set(reference().PAGES)
    assert configured["theme"]["font"] is False


@pytest.mark.usefixtures("own_methods")
def test_the_method_of_the_tutorial_passes_the_contract_tests(tmp_path: Path) -> None:
    testing = pytest.importorskip("perfbench.testing", reason="needs perfbench.testing")
    text = (ROOT / "docs" / "tutorials" / "extend.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[0]
    (tmp_path / "value_scale.py").write_text(code, encoding="utf-8")
    testing.check_method("value-scale", plugin=tmp_path / "value_scale.py")


def test_the_page_of_the_python_api_names_what_there_is() -> None:
    if not hasattr(perfbench, "run"):
        pytest.skip("needs the Python API: perfbench.run and what stands beside it")
    text = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    called = set(re.findall(r"\bperfbench\.(\w+)\(", text))
    assert {"run", "load", "accuracy", "search"} <= called
    assert [name for name in called if not callable(getattr(perfbench, name, None))] == []
    methods = set(re.findall(r"`Run\.(\w+)\(", text))
    assert [name for name in methods if not callable(getattr(perfbench.Run, name, None))] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning fails."""
    for package in ("mkdocs", "material", "latex2mathml"):
        pytest.importorskip(package, reason=f"needs {package}: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.docs
def test_no_page_of_the_site_names_another_host_to_load_from(site: Path) -> None:
    found = sorted(site.rglob("*.html"))
    assert len(found) >= len(pages())
    loads = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*\shref=\"?(?:https?:)?//[^>]*>"
    )
    for page in found:
        wrong = [one[0] for one in loads.finditer(page.read_text(encoding="utf-8")) if 'rel="canonical"' not in one[0]]
        assert wrong == [], page.name
    assert "@import" not in "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))


@pytest.mark.docs
def test_the_reference_and_the_formulas_are_on_the_site(site: Path) -> None:
    assert "--processes" in (site / "reference" / "commands.html").read_text(encoding="utf-8")
    formulas = (site / "measured" / "methods.html").read_text(encoding="utf-8")
    assert formulas.count("<math") >= 10
    assert "arithmatex" not in formulas


@pytest.mark.docs
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_every_page_fits_and_asks_for_nothing_else(site: Path, browser: Browser, width: int, height: int) -> None:
    for page in sorted({*site.rglob("*.html")} - {site / "404.html"}):  # which is for servers alone
        tab = browser.open(page, width=width, height=height)
        assert all(address.startswith(("file:", "data:")) for address in tab.requests()), page.name
        assert tab.complaints() == [], page.name
        overflow = tab.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0, f"{page.name}: {overflow} pixels wider than the window"


@pytest.mark.docs
def test_the_search_needs_no_server(site: Path, browser: Browser) -> None:
    tab = browser.open(site / "index.html")
    tab.ask("location.search = '?q=bandwidth'")
    tab.wait_for("document.querySelectorAll('.md-search-result__item').length > 1")
    assert all(address.startswith(("file:", "data:")) for address in tab.requests())
