"""The backbone: real weights, or a named shape with random ones, and skeletons that share its weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from perfbench.errors import BackboneError
from perfbench.methods import dtypes
from perfbench.methods.shape import MODULE_PATHS, BackboneShape
from perfbench.runtimes import int8_linear
from perfbench.runtimes.packed_linear import address, held_bytes, unpack
from perfbench.spec.backbone_config import BESIDE_AN_ADAPTER, find_config, is_named

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype.torch_name) for name, dtype in dtypes.DTYPES.items()}


@dataclass
class Backbone:
    """One set of weights on one device. `fused`: what runtime static made of them, once it has. `reduce`: where they
    are one rank's part, what makes of a tensor, in place, the sum over all ranks. `rank`: where several serve it, this
    process's `static.rank.Rank`."""

    name: str
    shape: BackboneShape
    model: Any
    dtype: torch.dtype
    device: torch.device
    fused: Any = None
    reduce: Callable[[torch.Tensor], None] | None = None
    rank: Any = None

    @property
    def bytes(self) -> int:
        """Bytes of the weights; tied weights count once."""
        return tensor_bytes(self.model)

    @property
    def parameters(self) -> int:
        """Number of weights; tied weights count once."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def input_rms(self) -> tuple[float, ...]:
        """Root mean square of each layer's input, of the last of a few random tokens; rounded to a power of two, so
        that it is the same in every dtype and on every machine. Random adapters are made to suit it."""
        ids = torch.randint(3, self.shape.vocab, (4, 16), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            out = self.model.model(ids.to(self.device), output_hidden_states=True, use_cache=False)
        found = [states[:, -1].float().square().mean().sqrt().item() for states in out.hidden_states[:-1]]
        return tuple(2.0 ** round(math.log2(rms)) for rms in found)

    def linear(self, layer: int, module: str) -> Any:
        """The linear of a module (a key of MODULE_PATHS): its `weight` [D_out, D_in], packed or not, and `bias`."""
        return self.model.model.layers[layer].get_submodule(MODULE_PATHS[module])

    def skeleton(self) -> Any:
        """A model of its own modules over the same weights, so that an arm can replace modules without a trace.

        Weights that runtime static has packed are there in the usual order too, from now on as long as the skeleton
        is; in that order alone where no arm of that runtime is left.
        """
        if self.fused is not None and not self.fused.used and (unpack(self.model) or int8_linear.part(self.model)):
            self.fused = None
        shared = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        return copy.deepcopy(self.model, memo=dict(shared))

    def tokenizer(self) -> Any:
        """The tokenizer that belongs to the weights. BackboneError where there is none."""
        return tokenizer_of(self.name)


def tokenizer_of(name: str) -> Any:
    """The tokenizer of the backbone `name`. BackboneError where there is none."""
    if is_named(name):
        raise BackboneError(
            f"{name}: a named shape has random weights and no tokenizer; for real prompts give a hub id or "
            f"a local folder as backbone"
        )
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise BackboneError(f"{name}: no tokenizer ({_first_line(error)})") from None


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers; what lies in one place counts once."""
    return sum({address(t): held_bytes(t) for t in (*model.parameters(), *model.buffers())}.values())


def load(name: str, dtype: str, device: str, seed: int, quantisation: str = "none") -> Backbone:
    """The backbone `name` in `dtype` on `device`, its linears as `quantisation` (a key of QUANTISATIONS) has them.
    BackboneError says what is missing and what to do.

    A named shape is made on the device in its own dtype: at no time is there an fp32 or a host copy.
    """
    config = find_config(name)
    shape = BackboneShape.of_config(config)
    torch_dtype = DTYPES[dtype]
    model = _random(config, torch_dtype, device, seed) if is_named(name) else _real(name, torch_dtype, device)
    model.eval().requires_grad_(False)
    if quantisation == "int8":
        int8_linear.quantise(model)
    # End-of-sequence is off, so that every request makes exactly N tokens; no sampling setting is kept.
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, bos_token_id=None)
    return Backbone(name, shape, model, torch_dtype, torch.device(device))


def _random(config: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Any:
    fields = {key: value for key, value in config.items() if key != "model_type"}
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **fields), dtype=dtype, attn_implementation="sdpa"
        )


def _real(name: str, dtype: torch.dtype, device: str) -> Any:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            device_map=device,
            use_safetensors=True,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, where they can be named
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BackboneError(
            f"{name}: the weights can't be loaded ({_first_line(error)}); "
            f"check the folder, or accept the licence and log in, or download it beforehand"
        ) from None

    model, info = loaded
    if getattr(model, "_hf_peft_config_loaded", False):
        raise BackboneError(f"{name}: {BESIDE_AN_ADAPTER}")
    _expect_whole(name, info)
    _expect_finite(name, model)
    return model


def _expect_whole(name: str, info: dict[str, Any]) -> None:
    """BackboneError where transformers would fill in random values, or leave something out. Tied weights are one."""
    sizes = {key: f"{key} {list(found)}, not {list(wanted)}" for key, found, wanted in info["mismatched_keys"]}
    faults = {
        "has other sizes than config.json says for": [sizes[key] for key in sorted(sizes)],
        "lacks": _in_order(set(info["missing_keys"]) - sizes.keys()),
        "has no use for": _in_order(info["unexpected_keys"]),
    }
    for fault, keys in faults.items():
        if keys:
            raise BackboneError(
                f"{name}: expected the tensors of the model that config.json describes, but the file {fault} "
                f"{_some(keys)}; download the model again, or mend num_hidden_layers and its like in config.json"
            )


def _expect_finite(name: str, model: torch.nn.Module) -> None:
    """BackboneError where a weight is not a finite number, in the file or in the dtype that was asked for."""
    spoilt = [key for key, tensor in model.named_parameters() if not _is_finite(tensor)]
    if spoilt:
        dtype = next(key for key, value in DTYPES.items() if value == next(model.parameters()).dtype)
        raise BackboneError(
            f"{name}: expected finite weights, got NaN or infinity, once they are {dtype}, in "
            f"{_some(_in_order(spoilt))}; download the model again, or choose a dtype that holds its values"
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    # The extremes of a tensor with a NaN are NaN; unlike a mask they take no memory.
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())


def _in_order(names: Iterable[str]) -> list[str]:
    """Names with the layers in the order of their numbers."""
    return sorted(names, key=lambda name: [part.zfill(9) if part.isdigit() else part for part in name.split(".")])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more ({len(names)} in all)" if len(names) > 3 else "")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
