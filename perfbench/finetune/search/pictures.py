"""The search's pictures as SVG: heat maps of scores and of kept modules, the share of each kind over the layers.

Every text is escaped; nothing is loaded, no script is run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from perfbench.finetune.search.setting import share
from perfbench.methods.shape import MODULES, Setting

ROW_PX, LEFT_PX, TOP_PX, MARGIN_PX = 26, 56, 66, 16
# Columns are wide enough for a number up to so many layers; beyond, the number is in the cell's tooltip.
NUMBERED_LAYERS = 24
WIDE_PX, NARROW_PX = 42, 20
LEAST_WIDTH_PX = 620

NEGATIVE, MIDDLE, POSITIVE = (178, 24, 43), (247, 247, 247), (33, 102, 172)
INK, FAINT, KEPT, DROPPED = "#1a1a1a", "#666666", "#2166ac", "#e8e8e8"
LOWER, UPPER = "#92c5de", "#2166ac"


def score_map(title: str, subtitle: str, values: Sequence[Sequence[float]], kept: Setting, unit: str) -> str:
    """A cell for each module (down) and layer (across), coloured by its score; kept ones have a frame."""
    most = max(abs(value) for layer in values for value in layer) or 1.0
    exponent = math.floor(math.log10(most))
    grid = _Grid(len(values))
    body = []
    for layer, row, module in grid.places():
        value, frame = values[layer][row], module in kept[layer]
        shade = _colour(value / most)
        body.append(grid.cell(layer, row, shade, f"layer {layer}, {module}: {value:.4g} {unit}", frame=frame))
        if grid.numbered:
            dark = abs(value) / most > 0.6
            number = f"{value / 10**exponent:.1f}".replace("-0.0", "0.0")
            body.append(grid.number(layer, row, number, "#ffffff" if dark else INK))
    notes = [f"blue is positive, red negative, up to {most:.3g} {unit}; a frame marks what is kept"]
    if grid.numbered:
        notes.append(f"the numbers are in 1e{exponent} {unit}")
    return grid.picture(title, subtitle, body, notes)


def kept_map(title: str, subtitle: str, values: Sequence[Sequence[float]], kept: Setting) -> str:
    """A cell for each module and layer: filled where it is kept; a minus where its score is negative."""
    grid = _Grid(len(kept))
    body = []
    for layer, row, module in grid.places():
        is_kept, negative = module in kept[layer], values[layer][row] < 0
        what = "kept" if is_kept else "not kept, negative score" if negative else "not kept"
        body.append(grid.cell(layer, row, KEPT if is_kept else DROPPED, f"layer {layer}, {module}: {what}"))
        if negative:
            body.append(grid.number(layer, row, "−", FAINT))
    total = sum(map(len, kept))
    note = f"{total} of {len(kept) * len(MODULES)} modules are kept; a minus marks a negative score"
    return grid.picture(title, subtitle, body, [note])


def share_bars(title: str, subtitle: str, kept: Setting) -> str:
    """For each module kind a bar: the share of the layers that keep it, lower half and upper half told apart."""
    width, row_px, bar_px = LEAST_WIDTH_PX, ROW_PX + 4, 380
    lower = (len(kept) + 1) // 2
    shares = share(kept)
    body = []
    for row, module in enumerate(MODULES):
        whole, below, above = shares[module]
        y, counts = TOP_PX + row * row_px, (round(below * lower), round(above * (len(kept) - lower)))
        body.append(label(LEFT_PX - 8, y + 18, module, anchor="end"))
        x = float(LEFT_PX)
        for count, colour, where in zip(counts, (LOWER, UPPER), ("lower", "upper"), strict=True):
            length = bar_px * count / len(kept)
            tip = f"{module}: kept in {count} layers of the {where} half"
            body.append(box(x, y + 4, length, ROW_PX - 6, colour, tip))
            x += length
        body.append(label(x + 6, y + 18, f"{whole:.0%} of the layers ({sum(counts)})", FAINT))
    y = TOP_PX + len(MODULES) * row_px + 12
    for at, (colour, text) in enumerate(
        ((LOWER, f"layers 0 to {lower - 1}"), (UPPER, f"layers {lower} to {len(kept) - 1}"))
    ):
        body.append(box(LEFT_PX + at * 150, y, 14, 14, colour, text))
        body.append(label(LEFT_PX + 20 + at * 150, y + 12, text, FAINT))
    return document(width, y + 14 + MARGIN_PX, title, subtitle, body)


class _Grid:
    """Cells of modules (down) and layers (across)."""

    def __init__(self, layers: int):
        self.layers = layers
        self.numbered = layers <= NUMBERED_LAYERS
        self.column_px = WIDE_PX if self.numbered else NARROW_PX

    def places(self) -> list[tuple[int, int, str]]:
        """(layer, row, module) of every cell."""
        return [(layer, row, module) for layer in range(self.layers) for row, module in enumerate(MODULES)]

    def cell(self, layer: int, row: int, colour: str, tip: str, *, frame: bool = False) -> str:
        """One cell; `tip` is what a pointer over it shows."""
        x, y = LEFT_PX + layer * self.column_px, TOP_PX + row * ROW_PX
        inset, stroke = (2, INK) if frame else (1, "none")
        size = self.column_px - 2 * inset, ROW_PX - 2 * inset
        return box(x + inset, y + inset, *size, colour, tip, stroke=stroke)

    def number(self, layer: int, row: int, text: str, colour: str) -> str:
        """A text in the middle of a cell."""
        x, y = LEFT_PX + (layer + 0.5) * self.column_px, TOP_PX + row * ROW_PX + 17
        return label(x, y, text, colour, size=11, anchor="middle")

    def picture(self, title: str, subtitle: str, body: list[str], notes: list[str]) -> str:
        """The whole picture, with the names of rows and columns."""
        names = [label(LEFT_PX - 8, TOP_PX + row * ROW_PX + 17, m, anchor="end") for row, m in enumerate(MODULES)]
        y = TOP_PX + len(MODULES) * ROW_PX + 15
        step = 1 if self.numbered else 4
        for layer in range(0, self.layers, step):
            x = LEFT_PX + (layer + 0.5) * self.column_px
            names.append(label(x, y, str(layer), FAINT, size=11, anchor="middle"))
        names.append(label(LEFT_PX, y + 18, "layer, from the input on", FAINT, size=11))
        for note in notes:
            y += 16
            names.append(label(LEFT_PX, y + 22, note, FAINT, size=11))
        width = max(LEAST_WIDTH_PX, LEFT_PX + self.layers * self.column_px + MARGIN_PX)
        return document(width, y + 22 + MARGIN_PX, title, subtitle, [*body, *names])


def _colour(strength: float) -> str:
    """From NEGATIVE at -1 over MIDDLE at 0 to POSITIVE at 1."""
    end = POSITIVE if strength >= 0 else NEGATIVE
    mixed = (round(m + (e - m) * min(1.0, abs(strength))) for m, e in zip(MIDDLE, end, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def box(x: float, y: float, width: float, height: float, fill: str, tip: str, stroke: str = "none") -> str:
    """A rectangle, in pixels; `tip` is what a pointer over it shows."""
    shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"'
    return f'<rect {shape} stroke="{stroke}" stroke-width="2"><title>{escape(tip)}</title></rect>'


def label(x: float, y: float, text: str, fill: str = INK, *, size: int = 13, anchor: str = "start") -> str:
    """A line of text, its foot at `y`."""
    style = f'fill="{fill}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(text)}</text>'


def document(width: float, height: float, title: str, subtitle: str, body: Sequence[str]) -> str:
    """The whole picture as SVG."""
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="system-ui, sans-serif">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        label(MARGIN_PX, 26, title, size=16),
        label(MARGIN_PX, 46, subtitle, FAINT),
    ]
    return "\n".join([*head, *body, "</svg>", ""])
