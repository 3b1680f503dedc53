"""accuracy.json is read strictly: what is no perfbench's is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perfbench.errors import RunDirectoryError
from perfbench.finetune.accuracy.accuracy_folder import MANIFEST, AccuracyFolder

COMMITTED = Path(__file__).resolve().parents[4] / "results" / "cpu-accuracy" / "accuracy.json"
GOOD: dict[str, Any] = json.loads(COMMITTED.read_text())
GOOD |= {"paths": {"boolq": {"trained": {"lora": {"items": 3, "identity": None}}}}, "verdict": None}
FIELDS = ("kind", "schema_version", "config", "environment", "adapters", "paths", "verdict")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("wrong", ["x", 3, [], {"a": 3}], ids=repr)
def test_another_type_is_one_line(tmp_path: Path, field: str, wrong: Any) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(GOOD))
    assert AccuracyFolder.open(tmp_path).is_done("boolq", "trained", "lora")
    if field == "verdict" and isinstance(wrong, dict):
        return  # what stands in it is read where it is shown
    (tmp_path / MANIFEST).write_text(json.dumps(GOOD | {field: wrong}))
    with pytest.raises(RunDirectoryError) as refused:
        AccuracyFolder.open(tmp_path)
    assert "\n" not in str(refused.value)
    assert MANIFEST in str(refused.value)
