"""Study files: what is filled in for each row, every fault with its file and line, the shipped ones in all sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from perfbench.errors import FinetuneError, PerfbenchError
from perfbench.figures.papers import STUDIES
from perfbench.files.yaml_source import read
from perfbench.finetune.study import study_config

SHIPPED = sorted((Path(__file__).resolve().parents[4] / "scenarios" / "studies").glob("*.yaml"))
SIZES = [(path, size) for path in SHIPPED for size in read(path).values["sizes"]]


def replaced(path: Path, old: str, new: str, to: Path) -> tuple[Path, int]:
    """A copy at `to` with `new` in the place of `old`, and the line of that."""
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    to.write_text(text.replace(old, new), encoding="utf-8")
    return to, text[: text.index(old)].count("\n") + 1


def test_each_row_has_its_own_values(study_file: Path) -> None:
    study = study_config.load(study_file)
    found = []
    for row in study.rows:
        tuned = row.steps["tuned"]
        assert tuned.uses == ("kept",)
        found.append((tuned.values.values["method"]["fanlora"], row.steps["kept"].values.values["k_max"]))
    setting = "$kept/setting.json"
    assert found == [({"rank": 2, "setting": setting}, 1), ({"rank": 1, "setting": setting}, 2)]
    assert study.rows[0].steps["search"].values.values == study.rows[1].steps["search"].values.values
    assert (study.name, study.size, study.paper) == ("tiny", "", STUDIES["fanlora_figure3"])


def test_a_size_brings_rows_and_values_and_what_let_says_goes_before(study_file: Path, tmp_path: Path) -> None:
    text = study_file.read_text(encoding="utf-8").replace("  learnt: ", "  gone: ")
    learnt = str(study_config.load(study_file).values["let"]["learnt"])
    more = (
        f"sizes:\n  one:\n    let: {{learnt: {learnt}, backbone: no-such-model}}\n    for_each:\n"
        f"      - {{k_max: 5, rank: 1}}\n  two:\n    let: {{learnt: {learnt}}}\n"
    )
    file = tmp_path / "sizes.yaml"
    file.write_text(text + more, encoding="utf-8")
    one, two = study_config.load(file), study_config.load(file, size="two")
    assert (one.size, [row.label for row in one.rows]) == ("one", ["k_max 5, rank 1"])
    assert (two.size, len(two.rows)) == ("two", 2)
    backbone = one.rows[0].steps["search"].values.values["backbone"]
    assert backbone == study_config.load(study_file).values["let"]["backbone"]
    over = study_config.load(file, ["let.backbone=mine"])
    assert over.rows[0].steps["tuned"].values.values["backbone"] == "mine"
    with pytest.raises(FinetuneError, match="--size: unknown size 'tow'; did you mean 'two'"):
        study_config.load(file, size="tow")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("columns: [", "colums: [", "unknown key 'colums'; did you mean 'columns'?"),
        (
            "command: setting",
            "command: seting",
            "steps.kept.command: unknown command 'seting'; did you mean 'setting'?",
        ),
        ("kept.modules, ", "kept.modles, ", "columns.3: unknown column 'kept.modles'; did you mean 'kept.modules'?"),
        ("paper: fanlora_figure3", "paper: fanlora_figure_3", "did you mean 'fanlora_figure3'?"),
        ("paper: K_max 2", "paper: K_max 3", "for_each.1.paper: unknown row 'K_max 3' of the paper's table; did you"),
        ("k_max: $k_max", "k_max: $kmax", "steps.kept.from.k_max: unknown name $kmax; did you mean 'k_max'?"),
        ("search: $search,", "search: $tuned,", "names the step 'tuned', which does not come before it"),
        ("score: sensitivity", "score: sensitvity", "score: unknown score 'sensitvity'; did you mean 'sensitivity'?"),
        ("  - {k_max: 1, rank: 2}", "  - {k_max: 8, rank: 2}", "k_max: expected an integer from 1 to 7, got 8"),
        ("  - {k_max: 1, rank: 2}", "  - {k_max: 1, rank: 0}", "method.fanlora.rank: expected an integer"),
        ("  - {k_max: 1, rank: 2}", "  - {k_max: 2, rank: 1}", "'k_max 2, rank 1' is that of another row too"),
        ("  - {k_max: 1, rank: 2}", "  - {k_max: 1, rank: $rank}", "$rank is made of itself"),
        ("  - {k_max: 1, rank: 2}", "  - {K: 1, k_max: 1, rank: 2}", "expected a name of small letters"),
        ("      epochs: 1", "      epochz: 1", "unknown key 'epochz'; did you mean 'epochs'?"),
        ("    set: {backbone: $backbone}", "    set: {task.name.x: 1}", "task.name is 'own', which has no 'x'"),
        ("  tuned:", "  learnt:", "'learnt' is the name of a value too; give the step another"),
        ("    from: {search: $search, score: sensitivity, k_max: $k_max}", "    from: no/such_file", "no such file"),
        (
            "    from: {search: $search, score: sensitivity, k_max: $k_max}",
            "    from: $k_max",
            "a mapping of fields, got 1",
        ),
        ("$kept/setting.json", "$kept/../setting.json", "expected $kept, or a place in it such as $kept/setting.json"),
        ("$kept/setting.json", "$search/$kept", "a place in it such as"),
        ("$kept/setting.json", "in/$kept", "a place in it such as"),
        ("paper: K_max 2", "paper: {a: 1}", "unknown row {'a': 1} of the paper's table"),
        ("learnt, dev_examples", "backbone/$let, dev_examples", "unknown name $let"),
    ],
)
def test_every_fault_has_its_line(study_file: Path, tmp_path: Path, old: str, new: str, said: str) -> None:
    file, line = replaced(study_file, old, new, tmp_path / "tiny.yaml")
    with pytest.raises(PerfbenchError) as refused:
        study_config.load(file)
    message = str(refused.value)
    assert message.startswith(f"{file}:")
    assert said in message
    # Of what a row says of itself the line is the row's, of what a step is given where it was written.
    assert int(message.removeprefix(f"{file}:").partition(":")[0]) in (line, line + 1)


def test_a_value_of_many_parts_stands_alone(study_file: Path, tmp_path: Path) -> None:
    file, _ = replaced(study_file, "rank: $rank,", "rank: a-$many,", tmp_path / "tiny.yaml")
    file.write_text(file.read_text().replace("let:\n", "let:\n  many: [1, 2]\n"), encoding="utf-8")
    with pytest.raises(FinetuneError, match=r"\$many is more than a word, so it must stand alone"):
        study_config.load(file)


def test_names_that_name_each_other_do_not_fill_the_memory(study_file: Path, tmp_path: Path) -> None:
    many = "".join(f"  a{n}: [{', '.join([f'$a{n + 1}'] * 20)}]\n" for n in range(8)) + "  a8: 1\n"
    file, _ = replaced(study_file, "score: sensitivity", "score: $a0", tmp_path / "tiny.yaml")
    file.write_text(file.read_text().replace("let:\n", f"let:\n{many}"), encoding="utf-8")
    with pytest.raises(FinetuneError, match="expected at most 100,000 values"):
        study_config.load(file)


def test_there_are_studies() -> None:
    assert {path.stem for path in SHIPPED} >= {"k_max", "rank_budget"}


@pytest.mark.parametrize(("path", "size"), SIZES, ids=lambda value: value.stem if isinstance(value, Path) else value)
def test_shipped_studies_are_read_in_every_size(path: Path, size: str) -> None:
    study = study_config.load(path, size=size)
    head = path.read_text(encoding="utf-8").splitlines()
    assert head[0] == f"# {study.question}"
    assert head[1].startswith(f"#   perfbench study scenarios/studies/{path.name}")
    assert study.paper is not None
    if size == "papers":
        configs = [step.values.values for row in study.rows for step in row.steps.values() if step.command != "setting"]
        assert all("/" in config["backbone"] for config in configs)


def test_the_papers_k_max_and_ranks_are_the_papers() -> None:
    (path,) = [path for path in SHIPPED if path.stem == "k_max"]
    for size in ("small", "papers"):
        labels = [row.label for row in study_config.load(path, size=size).rows]
        ranks = zip(range(1, 8), (24, 12, 8, 6, 5, 4, 4), strict=True)
        assert labels == [f"k_max {k_max}, rank {rank}" for k_max, rank in ranks]
