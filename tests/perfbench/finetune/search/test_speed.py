"""The measurement of the speed-up: it runs, and a disagreement is an exit code of 1. No time is judged."""

from __future__ import annotations

import pytest

from perfbench.finetune.search import gates, speed

TINY = ["--backbone", "llama-tiny", "--vocab", "64", "--rows", "1", "--tokens", "8", "--rounds", "2", "--rank", "2"]


def test_it_says_bound_ratio_and_agreement(capsys):
    assert speed.main(TINY) == 0
    said = capsys.readouterr().out
    assert "losses agree" in said
    assert "FLOPs allow 1." in said
    assert said.count("round ") == 2


def test_losses_that_differ_are_an_exit_code(monkeypatch, capsys):
    monkeypatch.setitem(gates.BLOCKS, "up", (5, 5, (0, 1, 2, 3, 4, 0, 0)))
    assert speed.main(TINY) == 1
    assert "DO NOT AGREE" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama-tinny", "/nowhere"])
def test_an_unknown_backbone_is_one_line(name, capsys):
    assert speed.main(["--backbone", name]) == 2
    assert capsys.readouterr().err.startswith("speed: backbone ")
