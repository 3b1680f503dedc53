"""Fine-tuning runs: the committed ones open, and damaged ones are refused in one line by `show`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perfbench.cli import main
from perfbench.finetune.finetune_folder import FinetuneFolder
from perfbench.run_folder.run_directory import MANIFEST, is_finetune

RESULTS = Path(__file__).parents[3] / "results"
RUNS = [file.parent for file in sorted(RESULTS.rglob(MANIFEST)) if is_finetune(file.parent)]


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: str(folder.relative_to(RESULTS)))
def test_every_committed_fine_tuning_opens(folder: Path) -> None:
    FinetuneFolder.open(folder).samples()
    assert main(["show", str(folder)]) == 0


@pytest.mark.parametrize("wrong", [None, "x", -1, True, [], {}, 1e300], ids=repr)
def test_anything_in_the_place_of_anything_ends_in_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: Any
) -> None:
    manifest = json.loads((RUNS[0] / MANIFEST).read_text())
    seed = next(iter(manifest["seeds"]))
    places = [[key] for key in manifest] + [["config", key] for key in manifest["config"]]
    places += [["seeds", seed], *(["seeds", seed, key] for key in manifest["seeds"][seed])]
    places += [["environment", "cpu"], ["environment", "device_kind"]]
    places += [["examples", "train"], ["config", "task", "name"]]
    for place in places:
        changed = copy.deepcopy(manifest)
        inside = changed
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = wrong
        (tmp_path / MANIFEST).write_text(json.dumps(changed))
        assert main(["show", str(tmp_path)]) in (0, 2), place
        said = capsys.readouterr().err
        assert said.count("\n") <= 1, place


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"seed": "x", "step": 1}', '{"seed": 0, "step": NaN}'])
def test_a_damaged_sample_is_named(tmp_path: Path, line: str) -> None:
    from perfbench.errors import RunDirectoryError

    (tmp_path / MANIFEST).write_text((RUNS[0] / MANIFEST).read_text())
    (tmp_path / "samples.jsonl").write_text(f'{{"seed": 0, "step": 1}}\n{line}\n')
    with pytest.raises(RunDirectoryError, match=r"samples\.jsonl:2: not a sample"):
        FinetuneFolder.open(tmp_path).samples()


@pytest.mark.parametrize("seeds", [[], ["1"], ["0", "1"]], ids=repr)
def test_other_seeds_than_those_of_its_configuration_are_refused(tmp_path: Path, seeds: list[str]) -> None:
    """A run that went on looked for its seed, and ended in a KeyError."""
    from perfbench.errors import RunDirectoryError

    manifest = json.loads((RUNS[0] / MANIFEST).read_text())
    config = SimpleNamespace(to_json=lambda: manifest["config"], seeds=(0,))
    (found, *_) = manifest["seeds"].values()
    manifest["seeds"] = {"0": found}
    FinetuneFolder(tmp_path, manifest).check_same(config, manifest["processes"])  # type: ignore[arg-type]
    manifest["seeds"] = dict.fromkeys(seeds, found)
    with pytest.raises(RunDirectoryError, match=r"run\.json: seeds: expected those of its configuration, 0, got "):
        FinetuneFolder(tmp_path, manifest).check_same(config, manifest["processes"])  # type: ignore[arg-type]
