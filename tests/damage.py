"""Files damaged by a seed, the same by the same: values replaced, keys dropped and renamed, text cut and torn."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

# What takes the place of a value, as JSON and YAML spell it.
EITHER = (
    "null", "true", "-1", "0", "1", "0.5", "1e308", "5e-324", "-0.0", "1e999", "-1e999", "1" + "0" * 30,
    "1" + "0" * 400, "1" + "0" * 5000, '""', '" "', '"x"', '"ok"', '"crashed"', '"none"', '"2024-01-01"', '"a\\nb"',
    '"\\u0000"', '"\\ud800"', '"\\u001b[31mX\\u001b]0;y\\u0007"', '"\\u202e"', '"\\u2028"', '"</script><img src=x>"',
    '"::error::x%0A::y"', '"##[error]x"', '"| a | [b](javascript:c)"', '"[bold]x[/]"', '"~nosuchuser/x"',
    '"/dev/zero"', '"../../etc/passwd"', '"' + "y" * 5000 + '"', "[]", "{}", "[[]]", "[1, 1]", "[null]", '[""]',
    '{"": 1}', '{"a": [{}]}', "[" * 100 + "]" * 100,
)  # fmt: skip
JSON = (*EITHER, "NaN", "Infinity", "-Infinity", '{"a": 1, "a": 2}', "[" * 100_000, '{"a":' * 50_000)
YAML = (
    *EITHER, ".nan", "-.inf", "NaN", "1_000", "190:20:30", "2001-12-14", "0x10", "&a x", "*a", "<<", "!!binary aGk=",
    "!!python/object/apply:os.system ['id']", "!!set {a, b}", "!!int x", "!x y", "|", "[", "}", "@x", "`x`", "%",
    "{lora: {rank: 0}}", "{lora: {rank: 99999999999}}", "{nope: {}}", "{lora: {adapters: /etc}}", "cuda", "triton",
    "{fanlora: {setting: [[q], [q]]}}", "{cases: '*', lora: null}", "owner/model", "[1, 999999999]",
)  # fmt: skip
_KEYS = ("x", "", "</script>", "a\nb", "\x1b[31m", "status", "id", "name", "<<", "0", "true", "x" * 3000, "日本")
_TORN = (b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\x1b[31m", b"\n\n", b"\r", b"\t", b"- ", b": ", b"{", b"]", b'"',
         b"*a ", b"\xe2\x80\xa8", b"---\n", b"%YAML 9.9\n", b"#", str(2**64).encode())  # fmt: skip


def damaged(value: Any, raw: Sequence[str], random: Random) -> bytes:
    """`value` as JSON, which is YAML too, with one to three places of it replaced by one of `raw`, dropped, renamed,
    wrapped or exchanged; of five, one is torn as bytes instead."""
    if random.random() < 0.2:
        return torn(json.dumps(value, indent=1).encode(), random)
    value = copy.deepcopy(value)
    holes: dict[str, str] = {}
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            break
        around, key = random.choice(places)
        what = random.random()
        if what < 0.6:
            hole = f"@hole {len(holes)}@"
            around[key], holes[hole] = hole, random.choice(raw)
        elif what < 0.75:
            del around[key]
        elif what < 0.8:
            around[key] = [around[key]]
        elif what < 0.85:
            around[key] = {"a": around[key]}
        elif what < 0.9:
            other, place = random.choice(places)
            around[key] = copy.deepcopy(other[place])
        elif isinstance(around, dict):
            around[random.choice(_KEYS)] = around.pop(key) if what < 0.95 else "x"
    text = json.dumps(value, indent=1)
    for hole, put in holes.items():
        text = text.replace(f'"{hole}"', put)
    return text.encode()


def damaged_lines(lines: Sequence[bytes], random: Random) -> bytes:
    """Lines of JSON, one of which is damaged, given twice, dropped, or all of them torn."""
    lines, at, what = list(lines), random.randrange(len(lines)), random.random()
    if what < 0.7:
        lines[at] = damaged(json.loads(lines[at]), JSON, random).replace(b"\n", b" ")
    elif what < 0.8:
        lines.insert(random.randrange(len(lines)), lines[at])
    elif what < 0.85:
        del lines[at]
    else:
        return torn(b"\n".join(lines) + b"\n", random)
    return b"\n".join(lines) + b"\n"


def damaged_safetensors(content: bytes, random: Random) -> bytes:
    """A safetensors file whose header, or the length that it gives of it, is damaged; or torn as bytes."""
    if random.random() < 0.2:
        return torn(content, random)
    length = int.from_bytes(content[:8], "little")
    header = damaged(json.loads(content[8 : 8 + length]), JSON, random)
    said = random.choice((0, 1, 99_000_000, 2**63, 2**64 - 1)) if random.random() < 0.1 else len(header)
    return struct.pack("<Q", said) + header + content[8 + length :]


def torn(content: bytes, random: Random) -> bytes:
    """Bytes cut, taken out, put in, or not there."""
    what, at = random.random(), random.randrange(len(content))
    if what < 0.25:
        return content[:at]
    if what < 0.3:
        return random.choice((b"", b"\x00" * 5000, b"[" * 100_000, random.randbytes(2000)))
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 3, 10))):
        at = random.randrange(len(changed) or 1)
        if what < 0.6:
            changed[at:at] = random.choice(_TORN)
        elif what < 0.8:
            del changed[at : at + random.choice((1, 2, 30))]
        else:
            changed[at : at + 1] = random.randbytes(1)
    return bytes(changed)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(what is around a value, its key or index there) of everything inside `value`."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        yield value, key
        yield from _places(member)
