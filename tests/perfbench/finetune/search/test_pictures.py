"""The pictures say what the numbers say, and text from a file stays text."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from perfbench.finetune.search import pictures
from perfbench.methods.shape import MODULES

SVG = "{http://www.w3.org/2000/svg}"
VALUES = [[0.004, -0.002, 0.001, 0, 0, 0, 0.003], [0.001, 0, 0.002, -0.004, 0, 0, 0]]
KEPT = (("q", "down"), ("q", "v"))


def cells(text: str) -> dict[str, dict[str, str]]:
    """What a pointer over it shows -> attributes, of every box."""
    root = ElementTree.fromstring(text)
    found = {}
    for box in root.iter(f"{SVG}rect"):
        tip = box.find(f"{SVG}title")
        if tip is not None:
            found[tip.text] = box.attrib
    return found


def texts(text: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(text).iter(f"{SVG}text")]


def test_the_map_of_scores_has_a_cell_for_each_and_a_frame_where_it_is_kept():
    picture = pictures.score_map("T", "S", VALUES, KEPT, "nats")
    found = cells(picture)
    assert len(found) == 14
    framed = {tip.split(":")[0] for tip, box in found.items() if box["stroke"] != "none"}
    assert framed == {"layer 0, q", "layer 0, down", "layer 1, q", "layer 1, v"}
    assert found["layer 0, q: 0.004 nats"]["fill"] == "#2166ac"  # the largest, positive
    assert found["layer 1, o: -0.004 nats"]["fill"] == "#b2182b"  # the largest, negative
    assert found["layer 0, o: 0 nats"]["fill"] == "#f7f7f7"
    assert {"4.0", "-2.0", "1.0", "3.0"} <= set(texts(picture))
    assert "the numbers are in 1e-3 nats" in texts(picture)
    assert set(MODULES) <= set(texts(picture))


def test_the_map_of_kept_modules_marks_negative_scores():
    picture = pictures.kept_map("T", "S", VALUES, KEPT)
    found = cells(picture)
    assert {tip for tip in found if tip.endswith(": kept")} == {
        "layer 0, q: kept", "layer 0, down: kept", "layer 1, q: kept", "layer 1, v: kept"
    }  # fmt: skip
    assert {tip for tip in found if "negative" in tip} == {
        "layer 0, k: not kept, negative score", "layer 1, o: not kept, negative score"
    }  # fmt: skip
    assert texts(picture).count("−") == 2
    assert "4 of 14 modules are kept; a minus marks a negative score" in texts(picture)


def test_bars_are_as_long_as_their_share():
    picture = pictures.share_bars("T", "S", (("q", "v"), ("q",), ("q",), ("v",)))
    found = cells(picture)
    lower, upper = (found[f"q: kept in {n} layers of the {half} half"] for n, half in ((2, "lower"), (1, "upper")))
    assert float(lower["width"]) == 2 * float(upper["width"])
    assert float(upper["x"]) == float(lower["x"]) + float(lower["width"])
    assert "75% of the layers (3)" in texts(picture)
    assert "50% of the layers (2)" in texts(picture)


def test_many_layers_lose_their_numbers_and_keep_their_tooltips():
    values, kept = [VALUES[0]] * 40, (KEPT[0],) * 40
    picture = pictures.score_map("T", "S", values, kept, "nats")
    assert "4.0" not in texts(picture)
    assert "layer 39, q: 0.004 nats" in cells(picture)


@pytest.mark.parametrize("layers", [1, 2, 24, 25, 80])
def test_everything_lies_inside_the_picture(layers):
    values, kept = [VALUES[0]] * layers, (KEPT[0],) * layers
    for picture in (
        pictures.score_map("T", "S", values, kept, "nats"),
        pictures.kept_map("T", "S", values, kept),
        pictures.share_bars("T", "S", kept),
    ):
        root = ElementTree.fromstring(picture)
        width, height = float(root.attrib["width"]), float(root.attrib["height"])
        for box in root.iter(f"{SVG}rect"):
            assert float(box.attrib.get("x", 0)) + float(box.attrib["width"]) <= width
            assert float(box.attrib.get("y", 0)) + float(box.attrib["height"]) <= height


def test_text_from_a_file_is_escaped():
    hostile = '<script>alert("x")</script>&]]>'
    for picture in (
        pictures.score_map(hostile, hostile, VALUES, KEPT, hostile),
        pictures.kept_map(hostile, hostile, VALUES, KEPT),
        pictures.share_bars(hostile, hostile, KEPT),
    ):
        assert "<script" not in picture
        assert hostile in texts(picture)
