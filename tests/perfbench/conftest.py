"""Shared by tests of commands: one real profile, made once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder, standard output) of `perfbench profile` of LoRA in the smoke scenario, two decode steps."""
    out = tmp_path_factory.mktemp("profile") / "lora"
    done = subprocess.run(
        [sys.executable, "-m", "perfbench", "profile", "scenarios/smoke.yaml", "--set", "device=cpu",
         "--case", "*b1*/lora-eager", "--steps", "2", "--out", str(out)],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done.stdout
