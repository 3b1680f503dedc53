"""Shared by the tests of the verdict: one whole run of four methods on a tiny random Llama, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from perfbench.finetune.accuracy import accuracy_config, accuracy_run
from perfbench.finetune.accuracy.verdict import Verdict

QUIET = Console(quiet=True)


@pytest.fixture(scope="session")
def write_config(tiny_llama: Path, sums: Path) -> Callable[..., Path]:
    """Writes an accuracy file of four methods on made-up sums, with the fields that are given changed; None drops
    one."""

    def write(folder: Path, **changed: Any) -> Path:
        values = {
            "question": "Is it so?",
            "backbone": str(tiny_llama),
            "device": "cpu",
            "methods": ["lora", {"fanlora": {"rank": 3}}, "ia3", "para"],
            "tasks": [{"name": "own", "source": str(sums), "label": "sums"}],
            "seeds": [0, 1],
            "max_tokens": 16,
            "learning_rate": 0.1,
            "epochs": 1,
            "batch": 8,
            "evaluate_every": 100,
            "margin": 0.5,
            "serve": {"requests": 5},
        } | changed
        path = folder / "tiny.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return path

    return write


@pytest.fixture(scope="session")
def finished(write_config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Verdict]:
    """(the file, the run folder, the verdict) of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("accuracy")
    path = write_config(folder)
    torch.set_num_threads(1)
    _, verdict = accuracy_run.execute(accuracy_config.load(path), folder / "run", resume=False, console=QUIET)
    return path, folder / "run", verdict
