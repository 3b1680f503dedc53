"""YAML read strictly and laid over other YAML, every value knowing where it was written. Free of torch.

Only what JSON can hold is accepted: mappings with string keys, lists, strings, finite numbers, booleans and
null. Duplicate keys, aliases (with which a few lines can expand to gigabytes) and custom tags are refused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError, SafeConstructor

from perfbench.errors import ScenarioError, nearest
from perfbench.files.plain_text import shown

# Keys and list indices from the root to a value.
Place = tuple[str | int, ...]

# A scenario is a page of text; a larger file is another file given by mistake.
MAX_BYTES = 1_000_000
MAX_DEPTH = 32
_LARGEST_INTEGER = 2**63 - 1

# The types that JSON has too; `node.tag` of everything else, such as a date or a Python object, is another.
_TAGS = {
    yaml.ScalarNode: {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")},
    yaml.SequenceNode: {"tag:yaml.org,2002:seq"},
    yaml.MappingNode: {"tag:yaml.org,2002:map"},
}


@dataclass(frozen=True)
class Source:
    """Plain values, and for every place in them where it was written: `scenarios/x.yaml:12` or `--set a=b`.

    A place inside a mapping has the line of its key, a place inside a list the line of the item.
    """

    values: Any
    origins: dict[Place, str]

    def origin(self, place: Place) -> str:
        """Where `place` was written; for a place that was not, where the nearest place around it was."""
        while place and place not in self.origins:
            place = place[:-1]
        return self.origins[place]


def dotted(place: Place) -> str:
    """`place` as messages and `--set` spell it: `workload.tenants`, `methods.0.lora.rank`."""
    return ".".join(str(step) for step in place)


def read(path: str | Path) -> Source:
    """The values of the YAML file at `path`. ScenarioError says what is wrong, and on which line."""
    path = Path(path)
    text = _read_text(path)
    return _parse(text, lambda line: f"{path}:{line}", str(path))


def of_values(values: Any, origin: str) -> Source:
    """A copy of values that a program has made, all of them written at `origin`; tuples become lists.

    ScenarioError, with its place, on what a file could not hold: a key that is no string, a number that is not finite,
    an object.
    """
    return Source(_plain(values, (), origin), {(): origin})


def _plain(value: Any, place: Place, origin: str) -> Any:
    where = f"{origin}: {dotted(place)}" if place else origin
    if len(place) > MAX_DEPTH:
        raise ScenarioError(f"{where}: expected at most {MAX_DEPTH} levels of nesting, got more")
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise ScenarioError(f"{where}: expected strings as keys, got {shown(odd[0])}")
        return {key: _plain(item, (*place, key), origin) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, (*place, index), origin) for index, item in enumerate(value)]
    finite = not isinstance(value, float) or math.isfinite(value)
    if not (value is None or type(value) in (str, bool, int, float)) or not finite:
        kind = type(value).__name__
        raise ScenarioError(f"{where}: expected a string, a finite number, a boolean or None, got {kind} {value!r:.80}")
    return value


def parse(text: str, origin: str) -> Source:
    """The values of a piece of YAML without a file, all written at `origin`. ScenarioError as `read`."""
    return _parse(text, lambda line: origin, origin)


def lay_over(target: Source, place: Place, over: Source, inside: Place) -> Iterator[str]:
    """Merges the mapping at `inside` of `over` into the one at `place` of `target`; yields what changes.

    Mappings merge deeply, lists and scalars replace.
    """
    for key, new in _at_place(over.values, inside).items():
        old = _at_place(target.values, place).get(key)
        if isinstance(new, dict) and isinstance(old, dict):
            yield from lay_over(target, (*place, key), over, (*inside, key))
        else:
            change = _put(target, (*place, key), over, (*inside, key))
            if change:
                yield change


def assign(target: Source, keys: Sequence[str], value: Source) -> str:
    """Puts `value` where `keys` lead in `target`, making mappings on the way; returns a note of what changed.

    ScenarioError where they lead into a scalar, or past the end of a list.
    """
    origin, container = value.origin(()), target.values
    place: Place = ()
    for depth, key in enumerate(keys):
        here = dotted(place)
        if isinstance(container, list):
            if not key.isdecimal() or int(key) >= len(container):
                what = f"{here} is a list of {len(container)}"
                raise ScenarioError(
                    f"{origin}: {what}: expected {here}.0 to {here}.{len(container) - 1}, got {here}.{key}"
                )
            place = (*place, int(key))
        elif isinstance(container, dict):
            place = (*place, key)
        else:
            raise ScenarioError(f"{origin}: {here} is {shown(container)}, which has no {key!r}; set {here} whole")
        if depth < len(keys) - 1:
            if isinstance(container, dict) and key not in container:
                container[key] = {}
                target.origins[place] = origin
            container = container[place[-1]]
    return f"{origin}: {_put(target, place, value, ()) or 'changes nothing'}"


def _at_place(values: Any, place: Place) -> Any:
    for step in place:
        values = values[step]
    return values


def _put(target: Source, place: Place, over: Source, inside: Place) -> str:
    """Replaces what is at `place` of `target`, origins too; returns the change in words, "" if none."""
    container, value = _at_place(target.values, place[:-1]), _at_place(over.values, inside)
    absent = isinstance(container, dict) and place[-1] not in container
    old = None if absent else container[place[-1]]
    container[place[-1]] = copy.deepcopy(value)
    for known in [known for known in target.origins if known[: len(place)] == place]:
        del target.origins[known]
    for known, origin in over.origins.items():
        if known[: len(inside)] == inside:
            target.origins[(*place, *known[len(inside) :])] = origin
    before, after = (item if isinstance(item, str) else shown(item) for item in (old, value))
    if absent:
        return f"{dotted(place)} -> {after}"
    return "" if old == value else f"{dotted(place)} {before} -> {after}"


def _read_text(path: Path) -> str:
    """The text of the file at `path`, else ScenarioError."""
    if path.is_dir():
        raise ScenarioError(f"{path}: expected a scenario file, got a directory; name a .yaml file in it")
    try:
        if not path.exists():
            siblings = [str(sibling) for sibling in path.parent.glob("*.yaml")]
            hint = nearest(str(path), siblings) if siblings else "give the path of a .yaml file"
            raise ScenarioError(f"{path}: no such file; {hint}")
        if not path.is_file():
            raise ScenarioError(f"{path}: expected a scenario file, got a device or pipe; name a .yaml file")
        if path.stat().st_size > MAX_BYTES:
            raise ScenarioError(f"{path}: expected a scenario file, got one of more than {MAX_BYTES} bytes")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"expected UTF-8 text, got another byte at offset {error.start}"
        line = error.object[: error.start].count(b"\n") + 1
        raise ScenarioError(f"{path}:{line}: {what}; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ScenarioError(f"{path}: can't be read: {reason}") from None


def _parse(text: str, origin_of_line: Callable[[int], str], where: str) -> Source:
    """The values of `text`; `origin_of_line` names the origin of a line (from 1), `where` the whole."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise ScenarioError(f"{where}: is empty; expected YAML")
        source = Source({}, {(): origin_of_line(node.start_mark.line + 1)})
        values = loader.build(node, (), origin_of_line, source.origins)
        return Source(values, source.origins)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = origin_of_line(mark.line + 1) if mark else where
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise ScenarioError(f"{place}: malformed YAML: {what}") from None
    except yaml.reader.ReaderError as error:  # a character that YAML forbids: the error's text has several lines
        place = origin_of_line(text.count("\n", 0, error.position) + 1)
        raise ScenarioError(f"{place}: malformed YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ScenarioError(f"{where}: malformed YAML: nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


class _Loader(yaml.SafeLoader):
    """SafeLoader's nodes, made plain values here: its own constructor keeps the last of two equal keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As the parent class, without aliases."""
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()
            raise ConstructorError(
                problem=f"alias *{event.anchor} is not supported; write the value out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def build(
        self, node: yaml.Node, place: Place, origin_of_line: Callable[[int], str], origins: dict[Place, str]
    ) -> Any:
        """The plain value of `node`, which is at `place`; fills `origins` for the places inside it."""
        if len(place) > MAX_DEPTH:
            raise _at(node, f"expected at most {MAX_DEPTH} levels of nesting, got more")
        if node.tag not in _TAGS[type(node)]:
            raise _at(node, f"expected a plain value, got one of type {node.tag}; put it between quotes")
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                origins[(*place, index)] = origin_of_line(item.start_mark.line + 1)
                items.append(self.build(item, (*place, index), origin_of_line, origins))
            return items
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = self._key(key_node)
                if key in mapping:
                    first = origins[(*place, key)]
                    raise _at(key_node, f"duplicate key {key!r}, first at {first}; keep one of them")
                origins[(*place, key)] = origin_of_line(key_node.start_mark.line + 1)
                mapping[key] = self.build(value_node, (*place, key), origin_of_line, origins)
            return mapping
        return self._scalar(node)

    def _key(self, node: yaml.Node) -> str:
        if node.tag != "tag:yaml.org,2002:str" or not isinstance(node, yaml.ScalarNode):
            shown = repr(node.value) if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            raise _at(node, f"expected a string as key, got {shown}; put it between quotes")
        return _text(node)

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            value = SafeConstructor.construct_object(self, node)
        except (ValueError, KeyError):  # such as `!!int x`, or more digits than Python converts
            raise _at(node, f"{node.value[:40]!r} can't be read as {node.tag.rpartition(':')[2]}") from None
        if isinstance(value, str):
            return _text(node)
        if type(value) is int and abs(value) > _LARGEST_INTEGER:
            raise _at(node, f"expected a number of at most 64 bits, got one of {len(node.value)} characters")
        if isinstance(value, float) and not math.isfinite(value):
            raise _at(node, f"expected a finite number, got {node.value}")
        return value


def _text(node: yaml.Node) -> str:
    text = str(node.value)
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise _at(node, "half of a surrogate pair, which is no character; write the character itself")
    return text


def _at(node: yaml.Node, problem: str) -> ConstructorError:
    """An error at the line of `node`."""
    return ConstructorError(problem=problem, problem_mark=node.start_mark)
