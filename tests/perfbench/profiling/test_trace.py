"""Traces: found, read within a limit, refused with the remedy."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from perfbench.errors import TraceError
from perfbench.profiling import trace

EVENT = {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1.5, "dur": 2, "pid": 1, "tid": 1}
WHOLE = json.dumps({"schemaVersion": 1, "traceEvents": [EVENT, {"ph": "M", "name": "process_name"}]})


def test_a_packed_and_a_plain_trace_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.trace.json").write_text(WHOLE)
    (tmp_path / "b.trace.json.gz").write_bytes(gzip.compress(WHOLE.encode()))
    files = trace.find(tmp_path)
    assert [file.name for file in files] == ["a.trace.json", "b.trace.json.gz"]
    plain, packed = map(trace.read, files)
    assert plain == packed
    assert plain.events == [EVENT]
    assert plain.head == {"schemaVersion": 1}


def test_traces_further_down_are_found_where_the_folder_has_none(tmp_path: Path) -> None:
    below = tmp_path / "tensorboard" / "lora.pt.trace.json"
    below.parent.mkdir()
    below.write_text(WHOLE)
    assert trace.find(tmp_path) == [below]
    (tmp_path / "a.trace.json").write_text(WHOLE)
    assert trace.find(tmp_path) == [tmp_path / "a.trace.json"]


def test_a_folder_without_a_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(TraceError, match=r"no trace in it.*perfbench profile"):
        trace.find(tmp_path)
    with pytest.raises(TraceError, match="no such folder"):
        trace.find(tmp_path / "nowhere")
    with pytest.raises(TraceError, match="got a file"):
        trace.find(tmp_path / "run.json")


def test_a_gigabyte_is_refused_with_its_size_and_the_remedy(tmp_path: Path) -> None:
    large = tmp_path / "large.trace.json"
    with large.open("wb") as file:
        file.truncate(2**30)  # takes no room on the disk
    with pytest.raises(TraceError, match=r"1,024\.0 MiB, .* at most 256\.0 MiB; profile fewer steps .*perfetto"):
        trace.read(large)


def test_a_file_that_unpacks_without_end_is_read_no_further_than_the_limit(tmp_path: Path) -> None:
    packed = tmp_path / "bomb.trace.json.gz"
    packed.write_bytes(gzip.compress(WHOLE.encode() + b" " * 100_000))
    with pytest.raises(TraceError, match=r"packed, more than .* unpacked"):
        trace.read(packed, largest_bytes=50_000)
    assert trace.read(packed, largest_bytes=150_000).events == [EVENT]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not a whole JSON"),
        (WHOLE[:-10].encode(), "not a whole JSON"),
        (b"\xff\xfe\x00", "not a whole JSON"),
        (b"[" * 100_000, "not a whole JSON"),
        (b'{"cells": []}', "expected a Chrome trace"),
        (b'{"traceEvents": []}', "nothing was recorded"),
        (b'{"traceEvents": [{"ph": "X", "name": "a", "ts": "soon"}]}', "without a name or a time"),
        (b'{"traceEvents": [{"ph": "X", "ts": 1}]}', "without a name or a time"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "bad.trace.json"
    file.write_bytes(content)
    with pytest.raises(TraceError, match=told) as error:
        trace.read(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (b"config.py(0):\x01\x02", "config.py(0):\x01\x02"),
        (b"lib = f(\n(1): <module>", "lib = f(\n(1): <module>"),
        (b"config.py(0): \xb0\xff", "config.py(0): \ufffd\ufffd"),
        (rb"torch\cuda\__init__.py\n\u00e9\\", "torch\\cuda\\__init__.py\n\u00e9\\"),
        (rb"C:\users\\a", "C:\\users\\a"),
    ],
)
def test_a_name_is_shown_as_far_as_it_can_be(tmp_path: Path, written: bytes, shown: str) -> None:
    """As torch's profiler has been known to write names of files and of arguments."""
    file = tmp_path / "a.trace.json"
    file.write_bytes(WHOLE.encode().replace(b"aten::mm", written))
    assert [event["name"] for event in trace.read(file).events] == [shown]


def test_a_torn_packed_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "torn.trace.json.gz"
    for content in (gzip.compress(WHOLE.encode())[:-12], b"not packed at all"):
        file.write_bytes(content)
        with pytest.raises(TraceError, match="can't be read"):
            trace.read(file)


def test_ranges_become_annotations_and_operators_stay() -> None:
    events = [dict(EVENT), dict(EVENT, name="layer 0 / q"), dict(EVENT, name="layer 0 / q", cat="kernel")]
    trace.mark_ranges(events, {"layer 0 / q"})
    assert [event["cat"] for event in events] == ["cpu_op", "user_annotation", "kernel"]
