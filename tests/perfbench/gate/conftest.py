"""Makes `runs.py` importable beside these tests, and the runs that many of them compare."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import runs


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run as six processes on a quiet machine."""
    return runs.half_of(tmp_path_factory.mktemp("stored") / "baseline", 0, sample=runs.slower_by(0, quiet=True))
