"""What is kept, and the file that a scenario takes."""

from __future__ import annotations

import json

import pytest

from perfbench.errors import FinetuneError
from perfbench.finetune.search import setting
from perfbench.methods.shape import MODULES


def test_the_best_of_each_layer_are_kept_in_running_order():
    values = [[1, 5, 2, 3, 4, 0, 0.5], [0, 0, 0, 0, 0, 0, 1]]
    assert setting.keep(values, 2) == (("k", "gate"), ("q", "down"))
    assert setting.keep(values, 1) == (("k",), ("down",))
    assert setting.keep(values, 7) == (MODULES, MODULES)


def test_negative_ones_are_dropped_even_if_fewer_remain():
    values = [[-1, 5, -2, -3, -4, -1, -0.5], [-1] * 7, [1, 2, 3, -1, -1, -1, -1]]
    assert setting.keep(values, 2) == (("k",), (), ("k", "v"))


@pytest.mark.parametrize(("value", "text"), [(0.0, "same score 0: the adapter changes nothing"), (-1.0, "same score")])
def test_scores_that_tell_nothing_apart_are_refused(value, text):
    with pytest.raises(FinetuneError, match=text):
        setting.keep([[value] * 7] * 3, 2)


def test_a_search_that_would_keep_nothing_is_refused():
    with pytest.raises(FinetuneError, match="every module of every layer has a negative score"):
        setting.keep([[-1.0, -2, -3, -4, -5, -6, -7]], 2)


def test_the_share_of_each_kind():
    shares = setting.share((("v", "o"), ("v",), ("up",), (), ("v", "up")))
    assert shares["v"] == pytest.approx((3 / 5, 2 / 3, 1 / 2))
    assert shares["up"] == pytest.approx((2 / 5, 1 / 3, 1 / 2))
    assert shares["q"] == (0, 0, 0)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "setting.json"
    setting.write(path, (("v",), ()), {"values": [[1.0]]}, {"backbone": "x"})
    found = json.loads(path.read_text())
    assert found == {"layers": [["v"], []], "provenance": {"backbone": "x"}, "scores": {"values": [[1.0]]}}
    with pytest.raises(ValueError, match="Out of range"):
        setting.write(path, (("o",), ()), {"values": [[float("nan")]]}, {})
    assert json.loads(path.read_text()) == found
    assert [entry.name for entry in path.parent.iterdir()] == ["setting.json"]


def test_a_folder_that_can_not_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FinetuneError, match=r"file/setting\.json: can't be written: .*; give another --out$"):
        setting.write(tmp_path / "file" / "setting.json", (("v",),), {}, {})
