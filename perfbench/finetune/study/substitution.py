"""`$name` in a study's values: found, and replaced by what is meant, which keeps its own line for messages."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from perfbench.errors import nearest
from perfbench.files.yaml_source import Place, Source
from perfbench.finetune.finetune_config import refuse

_REFERENCE = re.compile(r"\$([a-z][a-z0-9_]*)")


def part_of(source: Source, place: Place) -> Source:
    """What stands at `place`, by itself."""
    value = source.values
    for step in place:
        value = value[step]
    found = {known[len(place) :]: origin for known, origin in source.origins.items() if known[: len(place)] == place}
    return Source(value, {(): source.origin(place), **found})


@dataclass(frozen=True)
class Filler:
    """`$name` replaced by the value that stands at `names[name]` of `source`; `$step` stays where it is one of `steps`,
    those that come before."""

    source: Source
    names: Mapping[str, Place]
    steps: tuple[str, ...]
    later: tuple[str, ...] = ()

    def filled(self, place: Place, within: tuple[str, ...] = ()) -> Source:
        """What stands at `place`; `within`: the names whose values are being filled in."""
        part = part_of(self.source, place)
        if isinstance(part.values, dict):
            return _joined(part, {key: self.filled((*place, key), within) for key in part.values})
        if isinstance(part.values, list):
            found = _joined(part, {index: self.filled((*place, index), within) for index in range(len(part.values))})
            return Source(list(found.values.values()), found.origins)
        if not isinstance(part.values, str):
            return part
        whole = _REFERENCE.fullmatch(part.values)
        if whole and whole[1] not in self.steps:
            return self._value(whole[1], place, within)

        def text(found: re.Match[str]) -> str:
            if found[1] in self.steps:
                return found[0]
            value = self._value(found[1], place, within).values
            if isinstance(value, dict | list):
                refuse(self.source, f"${found[1]} is more than a word, so it must stand alone", *place)
            return str(value)

        return Source(_REFERENCE.sub(text, part.values), part.origins)

    def _value(self, name: str, place: Place, within: tuple[str, ...]) -> Source:
        if name in within:
            refuse(self.source, f"${name} is made of itself", *place)
        if name in self.later:
            refuse(self.source, f"names the step {name!r}, which does not come before it", *place)
        if name not in self.names:
            refuse(self.source, f"unknown name ${name}; {nearest(name, (*self.names, *self.steps))}", *place)
        return self.filled(self.names[name], (*within, name))


def _joined(part: Source, members: Mapping[Any, Source]) -> Source:
    origins: dict[Place, str] = {(): part.origin(())}
    for key, member in members.items():
        origins |= {(key, *place): origin for place, origin in member.origins.items()}
    return Source({key: member.values for key, member in members.items()}, origins)


def references(value: Any, steps: Container[str]) -> list[tuple[str, str]]:
    """(text, step) for each text in `value` that names one of `steps`: `$search/setting.json`."""
    if isinstance(value, str):
        return [(value, name) for name in _REFERENCE.findall(value) if name in steps]
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [found for member in members for found in references(member, steps)]


def put_folders(text: str, folders: Mapping[str, str]) -> str:
    """`$search/setting.json` with the folder of its step."""
    return _REFERENCE.sub(lambda found: folders.get(found[1], found[0]), text)


def with_folders(source: Source, folders: Mapping[str, str]) -> Source:
    """`source` with the folder of each step that it names."""

    def of(value: Any) -> Any:
        if isinstance(value, str):
            return put_folders(value, folders)
        if isinstance(value, dict):
            return {key: of(member) for key, member in value.items()}
        return [of(member) for member in value] if isinstance(value, list) else value

    return Source(of(source.values), dict(source.origins))
