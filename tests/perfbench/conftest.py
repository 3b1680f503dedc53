"""Shared by tests of commands: one real profile, made once."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from perfbench.profiling import profile, profile_table
from perfbench.spec import cases, scenario

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder, what is printed) of a profile of LoRA in the smoke scenario, two decode steps, one thread."""
    out = tmp_path_factory.mktemp("profile") / "lora"
    resolved = scenario.resolve(scenario.load(ROOT / "scenarios" / "smoke.yaml", ["device=cpu"]), "cpu", "asked for")
    comparison = profile.choose(cases.expand(resolved), "*b1*/lora-eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile.environment, "threads", lambda: 1)
        found = profile.execute(resolved, comparison, 2, out, lambda text: None)
    said = StringIO()
    profile_table.render(found, Console(width=100, file=said))
    return out, said.getvalue()
