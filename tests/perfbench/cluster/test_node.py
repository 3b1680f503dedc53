"""What a node does, without a cluster: it is called as Ray would call it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perfbench.cluster import node, ray_cluster
from perfbench.errors import PerfbenchError
from perfbench.machine import environment

# A child that says what it was told.
CHILD = """
import json, os, sys
job = json.loads(sys.stdin.readline())
print("a library's word", file=sys.stderr)
for event in job["say"]:
    print(json.dumps({**event, "threads": job["threads"], "variables": dict(os.environ)}), flush=True)
sys.exit(job["code"])
"""
HOLDER = """
import sys
from pathlib import Path
from perfbench.cluster import node
node.LOCKS = Path(sys.argv[2])
turn = node.Turn(sys.argv[1])
print(turn.taken(), flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else is timed on this machine."""
    monkeypatch.setattr(node, "LOCKS", tmp_path)


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "child_of_a_test.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "child_of_a_test"


def events(child: str, say: list[dict[str, Any]], code: int = 0, **variables: str) -> list[dict[str, Any]]:
    return list(node.measure(child, {"say": say, "code": code}, "cpu", variables))


def test_the_machine_comes_first_and_how_it_ended_last(child: str) -> None:
    found = events(child, [{"event": "phase"}, {"event": "done"}])
    assert [one["event"] for one in found] == ["machine", "phase", "done", "ended"]
    assert found[0]["environment"]["cpu"]["threads"] == node.environment.threads() == found[1]["threads"]
    assert (found[-1]["code"], found[-1]["log"]) == (0, "a library's word\n")


def test_a_child_that_dies_says_its_exit_code(child: str) -> None:
    found = events(child, [{"event": "phase"}], code=3)
    assert [one["event"] for one in found] == ["machine", "phase", "ended"]
    assert found[-1]["code"] == 3


def test_the_user_s_settings_of_speed_are_the_child_s(child: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # as Ray sets it for a task
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("OTHER", "kept")
    variables = events(child, [{"event": "done"}], MALLOC_ARENA_MAX="2", CUDA_VISIBLE_DEVICES="0")[1]["variables"]
    assert "OMP_NUM_THREADS" not in variables
    assert (variables["MALLOC_ARENA_MAX"], variables["CUDA_VISIBLE_DEVICES"], variables["OTHER"]) == ("2", "3", "kept")


def hold(device: str) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, device, str(node.LOCKS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    return holder


def test_one_host_times_one_thing_at_a_time(child: str) -> None:
    stream = node.measure(child, {"say": [{"event": "done"}], "code": 0}, "cpu", {})
    with hold("cpu") as holder:
        assert next(stream)["event"] == "machine"
        waiting = next(stream)
        assert (waiting["event"], "waiting" in waiting["text"]) == ("phase", True)
        holder.communicate()
    assert [one["event"] for one in stream] == ["done", "ended"]


def test_other_gpus_of_a_host_are_timed_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with hold("cuda") as holder:
        assert not node.Turn("cuda").taken()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        with node.Turn("cuda") as other:
            assert other.taken()
        holder.communicate()


@pytest.mark.parametrize("what", ["code", "versions", "shared"])
def test_what_is_other_on_a_node_is_named(child: str, what: str, tmp_path: Path) -> None:
    expected = ray_cluster.expected({})
    said = {"code": "other code of perfbench", "versions": "torch", "shared": "gone: not there"}[what]
    expected[what] = {
        "code": "0" * 64,
        "versions": environment.versions() | {"torch": "0.1"},
        "shared": {str(tmp_path / "gone"): "0"},
    }[what]
    job = {"say": [{"event": "done"}], "code": 0}
    with pytest.raises(PerfbenchError, match=said):
        list(node.measure_checked(child, job, "cpu", {}, expected))
    assert len(list(node.measure_checked(child, job, "cpu", {}, ray_cluster.expected({})))) == 3


def test_the_hash_of_the_code_follows_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for text in ("a = 1", "a = 2"):
        for folder in ("methods", "kernels"):
            (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / "methods" / "one.py").write_text(text)
        monkeypatch.setattr(node, "PACKAGE", tmp_path)
        found.add(node.code())
    assert len(found) == 2


def test_events_are_plain_values(child: str) -> None:
    """They travel between machines, and stand in run.json."""
    found = events(child, [{"event": "done"}])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
