"""What is plain JSON is read; whatever else a parser might take is refused in one line."""

from __future__ import annotations

import pytest

from perfbench.files import strict_json


def test_plain_json_is_read() -> None:
    text = '{"a": [1, -2.5, true, null, "\\ud83d\\ude00 \\u00e9"], "b": {"c": 9223372036854775807}}'
    value = {"a": [1, -2.5, True, None, "\N{GRINNING FACE} é"], "b": {"c": 2**63 - 1}}
    assert strict_json.parse(text) == value
    assert strict_json.parse(text.encode()) == value
    assert strict_json.parse(b"\xef\xbb\xbf{}") == {}
    nested = "[" * strict_json.MAX_DEPTH + "]" * strict_json.MAX_DEPTH
    assert strict_json.parse(nested) == strict_json.parse(f" {nested}\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("NaN", "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ("1e999", "expected finite numbers, got 1e999"),
        ("0." + "0" * 5000, "expected finite numbers, got 0.0000"),
        ("9223372036854775808", "at most 64 bits, got one of 19 digits"),
        ("-1" + "0" * 5000, "at most 64 bits, got one of 5001 digits"),
        ('{"a": 1, "a": 2}', "expected every key once, got 'a' twice"),
        ('"\\ud800"', "half of a surrogate pair"),
        ('{"\\uDFFF": 1}', "half of a surrogate pair"),
        ("[" * 65 + "]" * 65, "at most 64 levels"),
        ("[" * 100_000, "at most 64 levels"),
        ('{"a":' * 100_000, "at most 64 levels"),
        (b"\xff\xfe", "utf-8"),
        (b'"\xed\xa0\x80"', "utf-8"),
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
        ("{'a': 1}", "Expecting property name"),
    ],
)
def test_anything_else_is_refused_in_one_short_line(text: str | bytes, words: str) -> None:
    with pytest.raises(ValueError, match=r".+") as refused:
        strict_json.parse(text)
    said = str(refused.value)
    assert words in said
    assert len(said) < 200
    assert "\n" not in said
