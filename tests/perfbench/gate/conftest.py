"""The runs that many of these tests compare."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.perfbench.gate import runs


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run as six processes on a quiet machine."""
    return runs.half_of(tmp_path_factory.mktemp("stored") / "baseline", 0, sample=runs.slower_by(0, quiet=True))
