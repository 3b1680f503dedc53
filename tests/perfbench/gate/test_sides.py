"""What a side of `perfbench ab` is, told from its text alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from perfbench.errors import ComparisonError
from perfbench.gate.sides import Side, side_of, without


@pytest.mark.parametrize(
    ("text", "requirements"),
    [
        ("main", ()),
        ("HEAD~1", ()),
        ("v1.0", ()),
        ("feature/torch-2", ()),
        ("torch==2.12.*", ("torch==2.12.*",)),
        ("torch >= 2.11, <2.13", ("torch >= 2.11, <2.13",)),
        ("transformers[torch]~=5.0", ("transformers[torch]~=5.0",)),
    ],
)
def test_a_commit_or_a_requirement(text: str, requirements: tuple[str, ...]) -> None:
    assert side_of(text) == Side(text, "HEAD" if requirements else text, requirements)


def test_a_requirements_file(tmp_path: Path) -> None:
    file = tmp_path / "cpu.txt"
    file.write_text("# what we try\n\n--extra-index-url https://example.org/cpu\ntorch==2.12.*  # the older one\n")
    lines = ("--extra-index-url https://example.org/cpu", "torch==2.12.*")
    assert side_of(str(file)) == Side(str(file), "HEAD", lines)
    for text, words in (
        ("torch=2\n", r"cpu.txt:1: expected a requirement such as torch==2\.12"),
        ("# none\n", "found none"),
    ):
        file.write_text(text)
        with pytest.raises(ComparisonError, match=words):
            side_of(str(file))


def test_constraints_on_what_is_asked_for_are_let_go() -> None:
    constraints = "# tested\ntorch==2.13.0\nTorch_Audio==2.13.0\nnumpy==2.4.6\n"
    assert without(constraints, ("torch==2.12.*", "--no-index")) == "# tested\nTorch_Audio==2.13.0\nnumpy==2.4.6\n"
    assert without(constraints, ("torch-audio<3",)) == "# tested\ntorch==2.13.0\nnumpy==2.4.6\n"


def test_a_server_is_a_command_of_ours() -> None:
    side = side_of("http://127.0.0.1:8000/v1")
    assert side.ref is None
    assert side.command[-2:] == ("perfbench.traffic.on_device.server_side", "http://127.0.0.1:8000/v1")
    assert importlib.util.find_spec(side.command[-2]), "the module is there"


@pytest.mark.parametrize("text", ["http://", "http://me:secret@127.0.0.1/v1", "https://127.0.0.1/v1?key=secret"])
def test_an_address_that_is_none(text: str) -> None:
    with pytest.raises(ComparisonError, match="expected an address such as") as refused:
        side_of(text)
    assert "secret" not in str(refused.value)
