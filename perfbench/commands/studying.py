"""The command that chains others."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from perfbench import exit_codes
from perfbench.commands.arguments import add_out, add_plugin, add_set, interrupted, out_of
from perfbench.files.paths import stamped


def add(commands: Any) -> None:
    """Adds it to the command line."""
    study = commands.add_parser("study", help="search, tune and judge, chained by a file", description=_study.__doc__)
    study.add_argument("config", type=Path, help="a YAML file, or a name that `perfbench list` has: studies/k_max")
    study.add_argument("--size", default="", metavar="NAME", help="one of the file's sizes (default: its first)")
    study.add_argument("--dry-run", action="store_true", help="read every step of every row, and do nothing")
    add_set(study)
    add_plugin(study)
    add_out(study, "runs/study-<name>-<time>")
    study.set_defaults(command=_study)


def _study(arguments: argparse.Namespace) -> int:
    """Does every step of a study, each once for all the rows that need it, and ends in one table and one picture, the
    paper's numbers beside. On a folder that has some of it already, it does only the steps whose configuration, data,
    backbone or earlier steps are others. Exit codes: 0, 1 where something is not served as it was trained, 2 bad
    input."""
    from perfbench import api
    from perfbench.errors import RunDirectoryError
    from perfbench.files import run_lock
    from perfbench.finetune.study import study_config, study_folder, study_run, study_table

    study = study_config.load(api.located(arguments.config), arguments.set, arguments.size)
    if arguments.dry_run:
        for row in study.rows:
            print(f"{row.label}: {', '.join(f'{step.name} ({step.command})' for step in row.steps.values())}")
        return exit_codes.OK
    out = out_of(arguments, stamped(f"study-{study.name}"), "study")
    if arguments.resume and not (out / study_folder.MANIFEST).is_file():
        raise RunDirectoryError(
            f"{out}: no study to go on with, it has no {study_folder.MANIFEST}; run without --resume"
        )
    try:
        with run_lock.held(out, resume=arguments.resume):
            manifest = study_run.execute(study, out)
    except KeyboardInterrupt:
        size = ["--size", arguments.size] if arguments.size else []
        return interrupted(["study", arguments.config, *size], arguments, out)
    study_table.render(manifest)
    print(f"results: {out}; {out / study_table.PICTURE}", file=sys.stderr)
    return study_folder.exit_code(manifest)
