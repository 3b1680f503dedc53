"""`perfbench list`: everything that a scenario can choose from, and what each figure means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perfbench.errors import PerfbenchError
from perfbench.figures.metrics import METRICS
from perfbench.files.yaml_source import read
from perfbench.methods.registry import METHODS
from perfbench.spec import shipped
from perfbench.spec.backbone_config import NAMED_CONFIGS, parameter_count
from perfbench.spec.scenario_schema import KERNELS, RUNTIMES


def render(word: str = "", console: Console | None = None) -> None:
    """Prints one table each of methods, backbones, runtimes, kernel sets, scenarios, metrics, methods that can be
    trained and tasks: of each the lines that contain `word`. PerfbenchError where none does."""
    console = console or Console()
    found = 0
    for title, rows in _tables():
        kept = [row for row in rows if word.lower() in f"{title} {' '.join(row)}".lower()]
        found += len(kept)
        if kept:
            _print(console, title, kept)
    if not found:
        raise PerfbenchError(f"list: nothing contains {word!r}; `perfbench list` shows all there is")


def _tables() -> Iterator[tuple[str, Iterable[tuple[str, str]]]]:
    """(title, rows of name and meaning) of each table."""
    from perfbench.finetune.tasks.registry import TASKS
    from perfbench.finetune.trained_table import trainable

    yield "methods", ((name, method.summary) for name, method in METHODS.items())
    shapes = (
        (name, f"{parameter_count(config) / 1e6:,.1f}M parameters, random weights")
        for name, config in NAMED_CONFIGS.items()
    )
    yield "backbones", (*shapes, ("FOLDER or HUB/ID", "any Llama-family checkpoint in safetensors"))
    yield "runtimes", RUNTIMES.items()
    yield "kernels", KERNELS.items()
    files = ((name, read(shipped.FOLDER / f"{name}.yaml")) for name in shipped.names())
    yield "scenarios", ((name, str(file.values.get("question", ""))) for name, file in files)
    yield "metrics", ((name, f"{metric.definition} [{metric.unit}]") for name, metric in METRICS.items())
    yield "methods that can be trained", trainable().items()
    yield "tasks", ((name, task.summary) for name, task in TASKS.items())


def _print(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, text in rows:
        table.add_row(Text(name), Text(text))
    console.print(table)
