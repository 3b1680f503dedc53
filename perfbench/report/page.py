"""The HTML page: one file that loads nothing and runs its own scripts only, whatever stands in a name."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from perfbench import __version__

_HERE = files("perfbench.report")
SCRIPTS = ("vendor/d3-7.9.2.min.js", "vendor/plot-0.6.17.min.js", "charts.js")
# ISC asks that its notice goes with every copy, and each page is one.
LICENCES = ("vendor/d3-LICENSE", "vendor/plot-LICENSE")


def page(*, title: str, charts: Sequence[Sequence[Any]], colors: Mapping[str, int], **parts: Any) -> str:
    """The page as text. `charts`: lists of Chart, to which parts refer by their place; `colors`: arm -> place in the
    palette, 0 for the bare backbone; `parts`: what page.html.j2 shows, each empty where it is not given.

    Text is escaped by the template, data by `_embedded`; the page's policy lets only these very scripts run.
    """
    scripts = [_text(name) for name in SCRIPTS]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    empty = dict.fromkeys(("lead", "notices", "verdicts", "sections", "comparisons", "environments"), ())
    data = {"charts": [[chart.to_json() for chart in several] for several in charts], "colors": dict(colors)}
    return environment.from_string(_text("page.html.j2")).render(
        {**empty, "comparisons_title": "", "open_first": 0, "legend": "", **parts},
        title=title,
        version=__version__,
        style=Markup(_text("page.css")),
        scripts=[Markup(script) for script in scripts],
        licences=[_text(name) for name in LICENCES],
        script_hashes=[_policy_hash(script) for script in scripts],
        data=Markup(_embedded(data)),
    )


def _text(name: str) -> str:
    return _HERE.joinpath(name).read_text(encoding="utf-8")


def _policy_hash(script: str) -> str:
    """What a Content-Security-Policy calls this very script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _embedded(data: Any) -> str:
    """JSON that can't end the element it stands in: no <, > or & is left in it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
