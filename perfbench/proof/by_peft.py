"""An oracle from outside for adapters that come in folders: PEFT itself reads them, onto weights of its own.

The oracle of `perfbench.proof.oracle` is given the layer plan that our reader made of a folder. Were that wrong, every
runtime would agree on the wrong adapter; so PEFT's forward pass is held against it, on weights that were loaded for
this alone, since some adapters make PEFT write into them. Of the types that PEFT lacks it has `perfbench.peft`'s, with
which they are trained: what reads the folder, finds the prompt's end and applies the adapter is then not what serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from perfbench.peft import known_warnings  # with it PEFT knows what it lacks
from perfbench.proof import oracle
from perfbench.proof.best_choices import PlanOf, served
from perfbench.proof.check import NOISE_FACTORS, relative_difference
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.generation import Batch


def fault_of(
    fresh: Backbone, backbone: Backbone, batch: Batch, folders: Mapping[int, Path], plan_of: PlanOf
) -> str | None:
    """Why an adapter is not read as PEFT reads it, in a line; None where each is.

    fresh: the backbone loaded again; folders: request of `batch` -> the folder of its tenant's adapter. The tokens
    after each prompt are its own first ones: any will do.
    """
    for request, folder in folders.items():
        own = batch.input_ids[request][batch.attention_mask[request].bool()]
        asked = served(batch, request, own[: batch.new_tokens].repeat(batch.new_tokens)[: batch.new_tokens], plan_of)
        found = _logits(fresh, folder, asked)
        expected, rounded = (
            oracle.logits(backbone, [asked], dtype)[0] for dtype in (oracle.WIDER[backbone.dtype], backbone.dtype)
        )
        difference, noise = relative_difference(found, expected), relative_difference(rounded, expected)
        # Twice the factor, as for any single request.
        if not difference <= 2 * NOISE_FACTORS[backbone.dtype] * noise:
            return (
                f"{folder}: PEFT gives logits that differ by {difference:.1e} from what was served, where rounding "
                f"leaves {noise:.1e}"
            )
    return None


def _logits(fresh: Backbone, folder: Path, asked: oracle.Served) -> torch.Tensor:
    """[N, V]: PEFT's, in the dtype of the backbone. Afterwards `fresh` is as it was, unless the adapter changed it."""
    options: dict[str, Any] = {"autocast_adapter_dtype": False, "torch_device": str(fresh.device)}
    with known_warnings.unsaid():
        model: Any = PeftModel.from_pretrained(fresh.skeleton(), str(folder), **options)
    model = model.eval().to(fresh.dtype)
    with torch.inference_mode():
        # The prompt by itself: PARA makes its vectors of where that ends.
        read = model(input_ids=asked.prompt[None], use_cache=True)
        logits: torch.Tensor = read.logits[0, -1:]
        if len(asked.chosen) > 1:
            chosen = asked.chosen[None, :-1]
            rest = model(
                input_ids=chosen, past_key_values=read.past_key_values, use_cache=True, **_invoked(model, asked, chosen)
            )
            logits = torch.cat([logits, rest.logits[0]])
    return logits


def _invoked(model: Any, asked: oracle.Served, chosen: torch.Tensor) -> dict[str, Any]:
    """What PEFT's `generate` tells each of its steps of an activated LoRA: whether the prompt has invoked it. Its
    forward by itself would look for that in what it is given."""
    if not getattr(model.active_peft_config, "alora_invocation_tokens", None):
        return {}
    from peft.tuners.lora.variants import get_alora_offsets_for_generate

    offsets = get_alora_offsets_for_generate(model, input_ids=asked.prompt[None])["alora_offsets"]
    return {"alora_offsets": [None if offset is None else chosen.shape[1] for offset in offsets]}
