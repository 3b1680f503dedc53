"""`perfbench convert`: one adapter as LoRA of a rank, for servers that take nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import transformers

from perfbench.errors import AdapterError, RunDirectoryError
from perfbench.files.run_lock import has_files
from perfbench.measure.on_device import conversion
from perfbench.methods import lora, parameters
from perfbench.methods.checkpoints import adapter_folder
from perfbench.methods.lora import LoraOptions
from perfbench.methods.registry import METHODS, reader_of
from perfbench.runtimes import backbone as backbones


def convert(adapter: Path, backbone: str | None, rank: int, out: Path, say: Callable[[str], None]) -> None:
    """Writes the PEFT checkpoint OUT and says the share of the adapter's change that is lost, the mean over modules.

    backbone: whose weights they are, None for the one that the configuration of the adapter names. AdapterError for an
    adapter that no weights stand for, or that is not the backbone's; RunDirectoryError for a folder with files in it.
    """
    described = adapter_folder.describe(adapter)
    name = reader_of(described)
    if name is None or not METHODS[name].in_weights:
        kind = f"type {described.get('peft_type')}" if name is None else f"method {name}"
        raise AdapterError(f"{adapter}: expected an adapter that changes weights, the same for all tokens, got {kind}")
    if out.exists() and (not out.is_dir() or has_files(out)):
        raise RunDirectoryError(f"{out}: expected a new or empty folder; give another --out")
    wanted = backbone or described.get("base_model_name_or_path")
    if not wanted:
        raise AdapterError(f"{adapter}: its configuration names no backbone; say it with --backbone")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    say(f"loading {wanted}")
    loaded = backbones.load(str(wanted), "fp32", "cpu", 0)
    source = parameters.implementation(name).load(adapter, loaded.shape, METHODS[name].options())
    say(f"converting {name} to LoRA of rank {rank}")
    values = conversion.as_lora(source, loaded, rank)
    errors = conversion.lost(source, lora.plan(values, loaded.shape, LoraOptions()), loaded)
    lora.save(values, loaded.shape, LoraOptions(), out, str(wanted))
    say(f"{out}: lost {fmean(errors.values()):.1%} of what the adapter changes, at most {max(errors.values()):.1%}")
