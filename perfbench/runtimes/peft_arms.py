"""Adapters served by Hugging Face PEFT: its mixed batch (`adapter_names`), and its ordinary forward with one tenant.

Both load checkpoint folders that our own reader has accepted, into a skeleton of their own over the shared
weights: some that PEFT knows how to load would change those.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType

from perfbench.errors import AdapterError
from perfbench.methods.checkpoints import adapter_folder, peft_fields
from perfbench.peft import known_warnings
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.generation import Batch, Generation, generate


def _load(backbone: Backbone, folders: Sequence[Path]) -> PeftModel:
    """A PEFT model with one adapter `tenant<i>` for each folder, in the backbone's dtype."""
    # autocast_adapter_dtype would keep the adapters in fp32 and cast around each product: slower than the rest.
    options: dict[str, Any] = {"autocast_adapter_dtype": False, "torch_device": str(backbone.device)}
    with known_warnings.unsaid():
        model = PeftModel.from_pretrained(backbone.skeleton(), str(folders[0]), adapter_name="tenant0", **options)
        for index, folder in enumerate(folders[1:], start=1):
            model.load_adapter(str(folder), adapter_name=f"tenant{index}", **options)
    for name, parameter in model.named_parameters():
        if ".tenant" in name:
            parameter.data = parameter.data.to(backbone.dtype)
    return model.eval().requires_grad_(False)


def expect_mixable(folder: Path) -> None:
    """AdapterError where PEFT can serve the adapter in `folder`, but not beside others in one batch."""
    wanted = adapter_folder.describe(folder).get("target_parameters")
    if wanted:
        raise AdapterError(
            f"{folder / adapter_folder.CONFIG}: target_parameters: expected null, since PEFT's mixed batch has no "
            f"adapters on parameters, got {peft_fields.shown(wanted)}; serve it with lora or peft-single"
        )


class PeftMixedArm:
    """PEFT's mixed batch: each request names its adapter; a slot is the index of its folder, -1 the bare backbone."""

    def __init__(self, backbone: Backbone, folders: Sequence[Path]):
        self.model: Any = _load(backbone, folders)

    def generate(self, batch: Batch, **observers: Any) -> Generation:
        """One `generate()` call with `adapter_names`."""
        names = ["__base__" if slot == -1 else f"tenant{slot}" for slot in batch.slots]
        if (
            self.model.peft_config["tenant0"].peft_type != PeftType.LORA
        ):  # of LoRA alone PEFT repeats them for the beams
            names = [name for name in names for _ in range(batch.beams)]
        return generate(self.model, batch, adapter_names=names, **observers)

    def tensors(self) -> list[torch.Tensor]:
        """None: the adapters are modules of the model."""
        return []

    def close(self) -> None:
        """Drops the model."""
        self.model = None


class PeftSingleArm:
    """PEFT's ordinary forward: one active adapter for the whole batch, unmerged. Closest to what the papers ran."""

    def __init__(self, backbone: Backbone, folders: Sequence[Path]):
        self.model: Any = _load(backbone, folders)

    def generate(self, batch: Batch, **observers: Any) -> Generation:
        """One `generate()` call. ValueError where the requests are not all of one tenant."""
        if len(set(batch.slots)) != 1:
            raise ValueError(f"peft-single serves one tenant at a time, got slots {sorted(set(batch.slots))}")
        slot = batch.slots[0]
        if slot == -1:
            with self.model.disable_adapter():
                return generate(self.model, batch, **observers)
        if self.model.active_adapter != f"tenant{slot}":
            self.model.set_adapter(f"tenant{slot}", inference_mode=True)
        return generate(self.model, batch, **observers)

    def tensors(self) -> list[torch.Tensor]:
        """None: the adapters are modules of the model."""
        return []

    def close(self) -> None:
        """Drops the model."""
        self.model = None


def admit(model: PeftModel, folder: Path, name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Loads one more adapter, as a server would for a tenant that comes in cold."""
    with known_warnings.unsaid():
        model.load_adapter(str(folder), adapter_name=name, autocast_adapter_dtype=False, torch_device=str(device))
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            parameter.data = parameter.data.to(dtype)
