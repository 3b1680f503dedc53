"""Scenarios that come with perfbench, found by name from any folder; files that exist are themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from perfbench.errors import FinetuneError, ScenarioError
from perfbench.files.yaml_source import read
from perfbench.finetune import finetune_config
from perfbench.finetune.accuracy import accuracy_config
from perfbench.finetune.search import search_config
from perfbench.finetune.study import study_config
from perfbench.spec import scenario, shipped, traffic


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", shipped.names())
def test_every_name_leads_to_a_file_that_its_command_reads(name: str) -> None:
    path, note = shipped.find(name)
    assert note is None
    load = {
        "accuracy": accuracy_config.load,
        "fanlora": search_config.load,
        "finetune": finetune_config.load,
        "studies": study_config.load,
    }
    folder = name.partition("/")[0] if "/" in name else ""
    if traffic.is_traffic(read(path).values):
        assert traffic.load(path, [], lambda _: ("cpu", "")).common.name == name
    else:
        assert (load[folder] if folder else scenario.load)(path)  # type: ignore[operator]


@pytest.mark.parametrize("given", ["scenarios/smoke.yaml", "smoke.yaml", "scenarios/smoke"])
def test_a_path_of_the_checkout_is_found_with_a_note(given: str) -> None:
    document = scenario.load(given)
    assert document.path == shipped.FOLDER / "smoke.yaml"
    (note,) = document.notes
    assert note == f"{given}: no such file here; taken is the scenario smoke that comes with perfbench"
    assert scenario.load("smoke").notes == ()


def test_a_file_of_that_name_wins(tmp_path: Path) -> None:
    (tmp_path / "smoke").mkdir()  # a folder is none
    assert scenario.load("smoke").path == shipped.FOLDER / "smoke.yaml"
    text = (shipped.FOLDER / "smoke.yaml").read_text().replace("repetitions: 2", "repetitions: 7")
    (tmp_path / "smoke.yaml").write_text(text)
    document = scenario.load("smoke.yaml")
    assert (document.path, document.source.values["repetitions"], document.notes) == (Path("smoke.yaml"), 7, ())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("multitenent", "multitenent: no such file, and no scenario of that name; did you mean 'multitenant'?"),
        ("scenarios/finetune/boolq_pera.yaml", "did you mean 'finetune/boolq_para'?"),
        ("nothing-alike-at-all", "no such file"),
        ("m\0ultitenant", "m\ufffdultitenant: no such file"),
    ],
)
def test_what_is_neither_is_refused(given: str, said: str) -> None:
    with pytest.raises(ScenarioError) as refused:
        scenario.load(given)
    assert said in str(refused.value)


def test_values_of_a_program_are_checked_like_a_file() -> None:
    values = {"backbone": "llama-tiny", "dtype": "fp32", "methods": ("lora", {"para": {"rank": 2}})}
    load = {"prompt_tokens": 8, "new_tokens": 4, "requests": 2, "tenants": 2}
    document = scenario.load({**values, "workload": load}, ["workload.new_tokens=5"])
    found = scenario.resolve(document, "cpu")
    assert (found.name, found.workload[0].new_tokens, [arm.label for arm in found.methods]) == (
        "scenario",
        (5,),
        ["none", "lora", "para"],
    )
    for wrong, said in (
        ({**load, "tenants": 0}, "scenario: workload.tenants: "),
        ({**load, "tenants": float("nan")}, "scenario: workload.tenants: expected a string, a finite number"),
        ({**load, 3: 4}, "scenario: workload: expected strings as keys, got 3"),
        ({**load, "prompts": Path("x")}, "scenario: workload.prompts: expected a string"),
    ):
        with pytest.raises(ScenarioError) as refused:
            scenario.load({**values, "workload": wrong})
        assert str(refused.value).startswith(said)
    with pytest.raises(FinetuneError, match=r"^settings: backbone"):
        finetune_config.load({"backbone": 3, "method": "para", "task": {"name": "skills"}})
