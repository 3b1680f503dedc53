"""`perfbench list`: everything that a scenario can choose from, and what each figure means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perfbench.figures.metrics import METRICS
from perfbench.files.yaml_source import read
from perfbench.methods.registry import METHODS
from perfbench.spec import shipped
from perfbench.spec.backbone_config import NAMED_CONFIGS, parameter_count
from perfbench.spec.scenario_schema import KERNELS, RUNTIMES


def render(
    console: Console | None = None,
    tasks: Mapping[str, str] | None = None,
    trained: Mapping[str, str] | None = None,
) -> None:
    """Prints one table each of methods, backbones, runtimes, kernel sets, scenarios, metrics, `trained` methods and
    `tasks` (name -> summary), which its caller has from a room above this one."""
    console = console or Console()
    _print(console, "methods", ((name, method.summary) for name, method in METHODS.items()))
    shapes = (
        (name, f"{parameter_count(config) / 1e6:,.1f}M parameters, random weights")
        for name, config in NAMED_CONFIGS.items()
    )
    _print(console, "backbones", (*shapes, ("FOLDER or HUB/ID", "any Llama-family checkpoint in safetensors")))
    _print(console, "runtimes", RUNTIMES.items())
    _print(console, "kernels", KERNELS.items())
    files = ((name, read(shipped.FOLDER / f"{name}.yaml")) for name in shipped.names())
    _print(console, "scenarios", ((name, str(file.values.get("question", ""))) for name, file in files))
    metrics = ((name, f"{metric.definition} [{metric.unit}]") for name, metric in METRICS.items())
    _print(console, "metrics", metrics)
    if trained:
        _print(console, "methods that can be trained", trained.items())
    if tasks:
        _print(console, "tasks", tasks.items())


def _print(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, text in rows:
        table.add_row(Text(name), Text(text))
    console.print(table)
