from __future__ import annotations

from pathlib import Path

import pytest

from perfbench.cluster import shared_paths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter" / "inner").mkdir(parents=True)
    (tmp_path / "adapter" / "inner" / "weights").write_bytes(b"one")
    return tmp_path / "adapter"


def test_only_paths_that_are_there_are_found(folder: Path) -> None:
    job = [{"backbone": "llama-tiny", "id": "a/b/c", "options": {"adapters": str(folder), "rank": 4}}]
    assert list(shared_paths.digests(job)) == [str(folder)]


def test_the_same_files_are_alike(folder: Path) -> None:
    assert shared_paths.unlike(shared_paths.digests([str(folder)])) is None


@pytest.mark.parametrize("change", ["content", "name", "more"])
def test_other_files_are_named(folder: Path, change: str) -> None:
    expected = shared_paths.digests([str(folder)])
    file = folder / "inner" / "weights"
    if change == "content":
        file.write_bytes(b"two")
    elif change == "name":
        file.rename(folder / "inner" / "other")
    else:
        (folder / "more").touch()
    assert shared_paths.unlike(expected) == f"{folder}: other content"


def test_a_path_that_is_not_there_is_named(folder: Path) -> None:
    expected = shared_paths.digests([str(folder)])
    folder.rename(folder.with_name("elsewhere"))
    assert shared_paths.unlike(expected) == f"{folder}: not there"


@pytest.mark.parametrize("place", [0, 10, 25])
def test_of_a_large_file_the_begin_the_end_and_the_size_count(
    folder: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_paths, "_WHOLE_BYTES", 8)
    monkeypatch.setattr(shared_paths, "_PART_BYTES", 4)
    file = folder / "inner" / "weights"
    file.write_bytes(bytes(26))
    expected = shared_paths.digests([str(folder)])
    file.write_bytes(bytes(place) + b"x" + bytes(25 - place))
    # What lies between is not read.
    assert shared_paths.unlike(expected) == (None if place == 10 else f"{folder}: other content")
    file.write_bytes(bytes(27))
    assert shared_paths.unlike(expected) == f"{folder}: other content"
