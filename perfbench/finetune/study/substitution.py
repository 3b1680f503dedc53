"""`$name` in a study's values: found, and replaced by what is meant, which keeps its own line for messages."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from perfbench.errors import nearest
from perfbench.files.yaml_source import Place, Source
from perfbench.finetune.finetune_config import refuse

_REFERENCE = re.compile(r"\$([a-z][a-z0-9_]*)")
# `$step`, and what is in its folder.
_IN_FOLDER = re.compile(r"\$[a-z][a-z0-9_]*(/(?!\.\.?(/|$))[^/$]+)*")
MOST_VALUES = 100_000


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
    count: list[int] = field(default_factory=lambda: [0])

    def filled(self, place: Place, within: tuple[str, ...] = ()) -> Source:
        """What stands at `place`; `within`: the names whose values are being filled in. FinetuneError where that can't
        be done."""
        self.count[0] += 1
        if self.count[0] > MOST_VALUES:  # a few lines of names that name each other would fill the memory
            refuse(self.source, f"expected at most {MOST_VALUES:,} values in a row of a study, got more", *place)
        value: Any = self.source.values
        for step in place:
            value = value[step]
        if isinstance(value, dict):
            return self._joined(place, {key: self.filled((*place, key), within) for key in value})
        if isinstance(value, list):
            found = self._joined(place, {index: self.filled((*place, index), within) for index in range(len(value))})
            return Source(list(found.values.values()), found.origins)
        whole = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if whole and whole[1] not in self.steps:
            return self._value(whole[1], place, within)
        if isinstance(value, str):
            value = _REFERENCE.sub(lambda found: self._word(found, place, within), value)
        return Source(value, {(): self.source.origin(place)})

    def _joined(self, place: Place, members: Mapping[Any, Source]) -> Source:
        origins: dict[Place, str] = {(): self.source.origin(place)}
        for key, member in members.items():
            origins |= {(key, *inside): origin for inside, origin in member.origins.items()}
        return Source({key: member.values for key, member in members.items()}, origins)

    def _word(self, found: re.Match[str], place: Place, within: tuple[str, ...]) -> str:
        if found[1] in self.steps:
            return found[0]
        value = self._value(found[1], place, within).values
        if isinstance(value, dict | list):
            refuse(self.source, f"${found[1]} is more than a word, so it must stand alone", *place)
        return str(value)

    def _value(self, name: str, place: Place, within: tuple[str, ...]) -> Source:
        if name in within:
            refuse(self.source, f"${name} is made of itself", *place)
        if name in self.later:
            refuse(self.source, f"names the step {name!r}, which does not come before it", *place)
        if name not in self.names:
            refuse(self.source, f"unknown name ${name}; {nearest(name, (*self.names, *self.steps))}", *place)
        return self.filled(self.names[name], (*within, name))


def references(value: Any, steps: Container[str], place: Place = ()) -> list[tuple[Place, str, str]]:
    """(place, text, step) of each text in `value` that names one of `steps`: `$search/setting.json`."""
    if isinstance(value, str):
        return [(place, value, name) for name in _REFERENCE.findall(value) if name in steps]
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, member in members for found in references(member, steps, (*place, key))]


def is_in_folder(text: str) -> bool:
    """Whether a text that names a step is a place inside its folder, and nothing else."""
    return _IN_FOLDER.fullmatch(text) is not None


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
