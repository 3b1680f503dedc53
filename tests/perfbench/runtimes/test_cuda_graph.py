"""What surrounds the capture of a CUDA graph, without a GPU: torch's calls are recorders.

A captured product goes on using the cuBLAS workspace that it was captured with, and torch keeps one for each stream for
good. With a stream for each capture workspaces pile up; without clearing, later graphs get the first one's workspace,
which lies in that graph's own memory and is freed with it: seen as an illegal memory access on an H200.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from perfbench.runtimes.static import capture


class Recorder:
    """Stands for torch's streams and graphs; `events` says in order what was done, and on which stream."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.made = 0
        self.current: Any = FakeStream(self, "main")

    def make_stream(self) -> FakeStream:
        self.made += 1
        return FakeStream(self, f"side {self.made}")

    def note(self, what: str) -> None:
        self.events.append((what, self.current.name))

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def graph(self, graph: FakeGraph) -> Iterator[None]:
        self.note("capture begins")
        yield
        self.note("capture ends")


class FakeStream:
    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def wait_stream(self, other: FakeStream) -> None:
        self.recorder.events.append((f"{self.name} waits for {other.name}", self.recorder.current.name))


class FakeGraph:
    def replay(self) -> None:
        raise AssertionError("only captured here")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    found = Recorder()
    monkeypatch.setattr(torch.cuda, "Stream", found.make_stream)
    monkeypatch.setattr(torch.cuda, "stream", found.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: found.current)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", found.graph)
    # A build of torch without CUDA has no such function.
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: found.note("clear"), raising=False)
    forget = getattr(capture._warm_up_stream, "cache_clear", lambda: None)
    forget()
    yield found
    forget()  # no stream of this test is left to another


CAPTURED = [
    ("side 1 waits for main", "main"),
    ("step", "side 1"),
    ("main waits for side 1", "main"),
    ("clear", "main"),
    ("capture begins", "main"),
    ("step", "main"),
    ("capture ends", "main"),
    ("clear", "main"),
]


def test_each_graph_gets_a_workspace_of_its_own_and_all_warm_up_on_one_stream(recorder: Recorder) -> None:
    """The whole order, twice: warm-up on the side stream, cleared, captured, cleared."""
    for _ in range(2):
        replay = capture.cuda_graph(lambda: recorder.note("step"))
        assert isinstance(getattr(replay, "__self__", None), FakeGraph)
    assert recorder.events == CAPTURED * 2
    assert recorder.made == 1, "torch keeps a cuBLAS workspace for every stream, for good"


@pytest.mark.parametrize("fault", ["no clearing", "a stream for each"])
def test_either_fault_would_be_seen(recorder: Recorder, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "no clearing":
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    else:
        monkeypatch.setattr(capture, "_warm_up_stream", recorder.make_stream)
    for _ in range(2):
        capture.cuda_graph(lambda: recorder.note("step"))
    assert recorder.events != CAPTURED * 2
    assert (recorder.made == 1) == (fault == "no clearing")


def test_a_replayed_step_does_not_keep_its_decoder() -> None:
    """A capture may hand back what it was given; with a hold on the decoder its cache would outlive the arm."""

    class Owner:
        runs = 0

        def step(self) -> None:
            self.runs += 1

    owner = Owner()
    step = capture.weak(owner.step)
    step()
    assert owner.runs == 1
    del owner
    with pytest.raises(AssertionError, match="whoever replays"):
        step()
