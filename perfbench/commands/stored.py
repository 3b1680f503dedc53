"""Runs of training, shown again from their folders, which need not have the adapters any more."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from perfbench.errors import PerfbenchError, RunDirectoryError
from perfbench.run_folder.run_directory import ACCURACY_MANIFEST, STUDY_MANIFEST, is_finetune

if TYPE_CHECKING:
    from perfbench.finetune.accuracy.accuracy_folder import AccuracyFolder
    from perfbench.finetune.accuracy.verdict import Verdict


def is_accuracy(path: Path) -> bool:
    """Whether the folder holds what `perfbench accuracy` wrote."""
    return (path / ACCURACY_MANIFEST).is_file()


def is_study(path: Path) -> bool:
    """Whether the folder holds what `perfbench study` wrote."""
    return (path / STUDY_MANIFEST).is_file()


def is_training(path: Path) -> bool:
    """Whether `show` prints it: what `perfbench finetune`, `perfbench accuracy` or `perfbench study` wrote."""
    return is_finetune(path) or is_accuracy(path) or is_study(path)


def show(path: Path, format: str) -> int:
    """Prints the table as it was printed at the end, an accuracy run judged again from its answers; the exit code is
    that of the command which wrote the folder. RunDirectoryError where what is in it is damaged or not finished,
    PerfbenchError on a `format` but table."""
    if is_study(path):
        return _show_study(path, format)
    what = "an accuracy run" if is_accuracy(path) else "a fine-tuning"
    if format != "table":
        raise PerfbenchError(f"--format: expected table, all there is of {what}, got {format}")
    if is_accuracy(path):
        from perfbench.finetune.accuracy import verdict_table

        folder, verdict = _judged(path)
        verdict_table.render(folder.manifest, verdict)
        return verdict.exit_code
    from perfbench.finetune import summary
    from perfbench.finetune.finetune_folder import FinetuneFolder

    summary.render(FinetuneFolder.open(path).manifest)
    return 0


def _show_study(path: Path, format: str) -> int:
    from perfbench.finetune.study import study_folder, study_table

    if format not in ("table", "markdown"):
        raise PerfbenchError(f"--format: expected table or markdown, all there is of a study, got {format}")
    manifest = study_folder.read(path)
    if format == "table":
        study_table.render(manifest)
    else:
        print("\n".join(study_table.markdown(manifest)))
    return study_folder.exit_code(manifest)


def page(path: Path, format: str, run: Path | None) -> bytes:
    """The page of an accuracy run, with the speeds of `run`. Raises as `show` does, on a `format` but html, and
    RunDirectoryError where `run` has none of its methods."""
    from perfbench.finetune.accuracy import verdict_page

    if format != "html":
        raise PerfbenchError(f"--format: expected html, the page of an accuracy run, got {format}")
    folder, verdict = _judged(path)
    methods = {entry["finetune"]["method"] for entry in folder.manifest["config"]["entries"]}
    return verdict_page.render(folder.manifest, verdict, verdict_page.read_run(run, methods) if run else None).encode()


def _judged(path: Path) -> tuple[AccuracyFolder, Verdict]:
    """The folder and the verdict on its answers, for a terminal or a page."""
    from perfbench.files.plain_text import printable_tree
    from perfbench.finetune.accuracy.accuracy_folder import AccuracyFolder

    folder = AccuracyFolder.open(path)
    folder.manifest = printable_tree(folder.manifest)
    try:
        return folder, folder.judge()
    except (KeyError, TypeError, ValueError) as error:
        raise RunDirectoryError(f"{path}: can't be judged ({error}); restore the folder") from None
