"""The scenarios that come with perfbench, found by their names: `multitenant`, `finetune/boolq_para`. Free of torch."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from perfbench.errors import ScenarioError

FOLDER = Path(__file__).parents[1] / "scenarios"


def names() -> list[str]:
    """Every shipped scenario by its name, those of the main job first: the path of its file without the `.yaml`."""
    found = (path.relative_to(FOLDER).with_suffix("") for path in FOLDER.rglob("*.yaml"))
    return [name.as_posix() for name in sorted(found, key=lambda path: (len(path.parts), path))]


def find(given: str | Path) -> tuple[Path, str | None]:
    """(the file that is meant, a note for the user where it is another than the one written down).

    A file that exists is itself. Else `given` may be the name of a shipped scenario, also with `scenarios/` before it
    and `.yaml` behind it, which is its path in a checkout. What is neither comes back as it is, for its reader to
    refuse; ScenarioError where a shipped name is close to it.
    """
    path = Path(given)
    name = path.as_posix().removeprefix("scenarios/").removesuffix(".yaml")
    known = names()
    if name in known:
        if path.is_file():
            return path, None
        note = f"{given}: no such file here; taken is the scenario {name} that comes with perfbench"
        return FOLDER / f"{name}.yaml", None if str(given) == name else note
    close = get_close_matches(name, known, n=1)
    # Where a file beside it is meant, its reader names that.
    if (
        close
        and not path.exists()
        and not get_close_matches(path.name, [one.name for one in path.parent.glob("*.yaml")])
    ):
        raise ScenarioError(f"{given}: no such file, and no scenario of that name; did you mean {close[0]!r}?")
    return path, None
