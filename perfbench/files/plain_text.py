"""Text of files that others wrote, made safe to print: in one line, without what a terminal obeys. Free of torch."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

# What a table says where there is no figure.
NOTHING = "-"

MIB = 2**20

# Control and format characters, halves of surrogate pairs, characters for private use, and those that are none.
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn"}


def one_line(text: str) -> str:
    """`text` without what could break out of a line or a terminal: control and format characters, lone surrogates.

    `##[` and a leading `::`, which GitHub's runner takes for commands, are broken up.
    """
    clean = " ".join(printable(text).split()).replace("##[", "# #[")
    return f": :{clean[2:]}" if clean.startswith("::") else clean


def printable(text: str) -> str:
    """`text` in one line, with a replacement character for each that a terminal does not show as one."""
    if text.isascii() and text.isprintable():  # as nearly everything is
        return text
    if any(char != " " and char.isspace() for char in text):
        text = " ".join(text.split())
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(char) in _UNSAFE else char for char in text)


def printable_lines(text: str) -> str:
    """Every line of `text` as `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def printable_tree(value: Any) -> Any:
    """Plain JSON data, every line of every string in it `printable`, those of keys too: for what is shown, never for
    what is kept. Line breaks stay: a cell of CSV and a string of JSON may have them."""
    if isinstance(value, str):
        return printable_lines(value)
    if isinstance(value, dict):
        return {printable_lines(str(key)): printable_tree(member) for key, member in value.items()}
    return [printable_tree(member) for member in value] if isinstance(value, list | tuple) else value


def shown(value: Any) -> str:
    """`value` as a message quotes it: short, one line, spelled as in the file."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def format_bytes(value: float | None) -> str:
    """A size as people read it: `12.5 MiB`, `610.0 KiB`; NOTHING where there is none."""
    if not value:
        return NOTHING
    return f"{value / 1024:,.1f} KiB" if value < MIB else f"{value / MIB:,.1f} MiB"
