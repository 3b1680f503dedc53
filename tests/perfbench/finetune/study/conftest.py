"""A study of two rows on the tiny Llama: one search, a setting and a training for each row; and what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perfbench.finetune.study import step_kinds, study_config, study_run
from tests.perfbench.finetune.made_up import write_own
from tests.perfbench.finetune.search.conftest import _one_thread, one_thread  # noqa: F401

FILE = """# Which?
question: Which?
paper: fanlora_figure3
let:
  backbone: {model}
  learnt: {learnt}
  data: {data}
for_each:
  - {{k_max: 1, rank: 2}}
  - {{k_max: 2, rank: 1, paper: K_max 2}}
steps:
  search:
    command: fanlora search
    from:
      dtype: fp32
      device: cpu
      task: {{name: own, source: $learnt, dev_examples: 4}}
      max_tokens: 16
      learning_rate: 0.01
      rows: 4
      scores: [ab, sensitivity]
    set: {{backbone: $backbone}}
  kept:
    command: setting
    from: {{search: $search, score: sensitivity, k_max: $k_max}}
  tuned:
    command: finetune
    from:
      dtype: fp32
      device: cpu
      task: {{name: own, source: $data}}
      epochs: 1
      seeds: [0, 1]
      max_tokens: 16
    set:
      backbone: $backbone
      learning_rate: 0.01
      method: {{fanlora: {{rank: $rank, setting: $kept/setting.json}}}}
columns: [tuned.test, tuned.dev_loss, tuned.parameters, kept.modules, kept.likeness]
"""


def write_study(path: Path, model: Path, learnt: Path, data: Path) -> Path:
    """The file above, with these folders in it."""
    path.write_text(FILE.format(model=model, learnt=learnt, data=data), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What is searched on, and what is trained on."""
    folder = tmp_path_factory.mktemp("sets")
    learnt = write_own(folder / "learnt", {"train": 24, "dev": 4})
    return learnt, write_own(folder / "data", {"train": 16, "dev": 4, "test": 4}, start=50)


@pytest.fixture(scope="module")
def study_file(tiny_llama: Path, sets: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its path."""
    return write_study(tmp_path_factory.mktemp("study") / "tiny.yaml", tiny_llama, *sets)


@pytest.fixture(scope="module")
def done(study_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the study leaves that nothing disturbed."""
    out = tmp_path_factory.mktemp("done") / "out"
    with one_thread():
        study_run.execute(study_config.load(study_file), out)
    return out


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders in which a command is run from here on."""
    folders: list[str] = []

    def counted(run: Callable[..., Any]) -> Callable[..., Any]:
        def count(config: Any, folder: Path, begun: bool, console: Any) -> None:
            folders.append(folder.name)
            run(config, folder, begun, console)

        return count

    for name, kind in step_kinds.KINDS.items():
        monkeypatch.setitem(step_kinds.KINDS, name, replace(kind, run=counted(kind.run)))
    return folders
