"""`perfbench backbone import`: a GGUF file of a Llama-family model as a folder of safetensors, tokenizer and config.

The quantised weights are widened by transformers, with the package gguf; what is written is a backbone like any other.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from perfbench.errors import BackboneError, nearest
from perfbench.files.run_lock import has_files
from perfbench.methods.dtypes import DTYPES

# `general.architecture` of files whose models all runtimes can serve: Llama 2 and 3, SmolLM2, TinyLlama.
ARCHITECTURES = ("llama",)
MAGIC = b"GGUF"


def import_file(file: Path, out: Path, dtype: str = "bf16") -> int:
    """Writes the model of `file` in `dtype` to `out`, a new or empty folder, as a whole or not at all; returns its
    number of parameters.

    BackboneError where the package gguf is missing, the file is damaged, of another architecture, or quantised in a
    way that transformers can't read, and where `out` has files in it.
    """
    _expect_gguf(file)
    if out.exists() and (not out.is_dir() or has_files(out)):
        raise BackboneError(f"{out}: expected a new or empty folder, this one has files in it; give another --out")
    fresh = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        fresh.mkdir(parents=True)
        model, tokenizer = _read(file)
        parameters: int = sum(tensor.numel() for tensor in model.parameters())
        model.to(getattr(torch, DTYPES[dtype].torch_name)).save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        del model
        gc.collect()
        if out.exists():
            out.rmdir()
        fresh.replace(out)
    except OSError as error:
        raise BackboneError(f"{out}: can't be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return parameters


def _expect_gguf(file: Path) -> None:
    """BackboneError unless the file can be read as a GGUF of a known architecture."""
    if importlib.util.find_spec("gguf") is None:
        raise BackboneError("gguf: not installed; pip install 'adapter-perfbench[gguf]'")
    from gguf import GGUFReader

    try:
        with file.open("rb") as opened:
            start = opened.read(len(MAGIC))
    except OSError as error:
        raise BackboneError(f"{file}: can't be read ({error.strerror}); give a GGUF file") from None
    if start != MAGIC:
        raise BackboneError(f"{file}: expected a GGUF file, which begins with {MAGIC!r}, got {start!r}")
    try:
        field = GGUFReader(file).get_field("general.architecture")
        architecture = None if field is None else field.contents()
    except Exception as error:  # the reader raises whatever numpy meets in a file that is cut or overwritten
        raise BackboneError(f"{file}: not a whole GGUF file ({_line(error)}); download it again") from None
    if architecture not in ARCHITECTURES:
        expected = f"expected a model of architecture {' or '.join(ARCHITECTURES)}"
        raise BackboneError(f"{file}: {expected}, got {architecture!r}; {nearest(str(architecture), ARCHITECTURES)}")


def _read(file: Path) -> tuple[Any, Any]:
    """(the model in fp32, its tokenizer), by transformers. BackboneError for what it can't read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
        model, info = loaded
    except Exception as error:  # of a quantisation that it does not know, of a tokenizer that is not there, ...
        raise BackboneError(f"{file}: transformers can't read it ({_line(error)})") from None
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BackboneError(f"{file}: expected all weights of the model, it lacks {missing[0]}{more}")
    for name, tensor in model.named_parameters():
        if not bool(tensor.isfinite().all()):
            raise BackboneError(f"{file}: {name}: expected finite weights, got NaN or infinity; download it again")
    # The weights are plain tensors by now, and what is written must not say otherwise.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
