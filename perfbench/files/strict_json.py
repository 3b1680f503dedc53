"""JSON read strictly: the one reader of files that may be damaged, foreign or hostile. Free of torch.

Python's own parser takes NaN and infinities, keeps the last of two equal keys, recurses as deep as a file is nested
and makes numbers of any length; each of these has ended somewhere far from the file in a traceback.
"""

from __future__ import annotations

import json
import math
from typing import Any

# Our deepest file, a profile, has 8 levels.
MAX_DEPTH = 64
# What SQLite and other readers of our files hold.
_LARGEST_INTEGER = 2**63 - 1
_LONGEST_NUMBER = 400


def parse(content: bytes | str) -> Any:
    """The value that `content` holds, in UTF-8. Raises ValueError, in one line, on anything but plain JSON: NaN and
    infinities, integers of more than 64 bits, equal keys, lone surrogates, more than MAX_DEPTH levels."""
    text = content if isinstance(content, str) else content.decode("utf-8-sig")
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(f"expected at most {MAX_DEPTH} levels of nesting, got more") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _refuse_deep(value)
    if "\\ud" in text or "\\uD" in text:
        _refuse_surrogates(value)
    return value


def _refuse_deep(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        members = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [member for inside in members for member in inside]
        if not level:
            return
    raise ValueError(f"expected at most {MAX_DEPTH} levels of nesting, got more")


def _refuse_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a string has half of a surrogate pair, which is no character") from None


def _integer(text: str) -> int:
    value = int(text) if len(text) < 20 else None
    if value is None or abs(value) > _LARGEST_INTEGER:
        raise ValueError(f"expected integers of at most 64 bits, got one of {len(text.lstrip('-'))} digits")
    return value


def _number(text: str) -> float:
    value = float(text) if len(text) < _LONGEST_NUMBER else math.inf
    if not math.isfinite(value):
        raise ValueError(f"expected finite numbers, got {text[:20]}{'...' if len(text) > 20 else ''}")
    return value


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"expected every key once, got {twice[:60]!r} twice")
    return found


_DECODER = json.JSONDecoder(
    parse_int=_integer, parse_float=_number, parse_constant=_constant, object_pairs_hook=_mapping
)
