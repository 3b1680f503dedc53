"""How the profiler looks into each runtime: ranges put around what it calls, from outside, and taken off again.

Nothing of a runtime is edited: functions that it looks up by name are replaced while the context is open. All that the
profiler knows of runtime static's inside stands in `_static` and `resident`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import ModuleList
from transformers.cache_utils import Cache

from perfbench.kernels import decode_attention, low_rank, qkv_epilogue, residual_rmsnorm, swiglu_epilogue
from perfbench.methods.shape import MODULE_PATHS
from perfbench.profiling.on_device.ranges import BIND, KV_CACHE, MODEL, VECTORS, Ranges, replace
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.generation import Arm
from perfbench.runtimes.packed_linear import address
from perfbench.runtimes.static import forward as static_forward
from perfbench.runtimes.static.adapters import Adapters
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.static.forward import Forward
from perfbench.runtimes.transformers_plan import AdaptedLinear, PlanArm

# Where a module lives in a decoder layer of Hugging Face's model -> its kind; PEFT puts its own inside the linears.
LAYER_KINDS = {path: kind for kind, path in MODULE_PATHS.items()} | {
    "self_attn": "self attention",
    "mlp": "mlp",
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
}
MODEL_KINDS = {"embed_tokens": "embed", "norm": "norm", "rotary_emb": "rotation"}

# The forms of the operations that the static decoder looks up when it is made -> the kind of each.
STATIC_FORMS: tuple[tuple[dict[str, Any], str], ...] = (
    (low_rank.SHRINKS, "shrink"),
    (low_rank.EXPANDS, "expand"),
    (qkv_epilogue.FORMS, "qkv epilogue"),
    (decode_attention.FORMS, "attention"),
    (residual_rmsnorm.FORMS, "residual norm"),
    (swiglu_epilogue.FORMS, "swiglu epilogue"),
)


@contextmanager
def on(ranges: Ranges, arm: Arm, kernels: str) -> Iterator[None]:
    """While open, calls of `arm` make ranges. One arm at a time: some of them hang on names that arms share."""
    with ExitStack() as stack:
        if isinstance(arm, StaticArm):
            _static(stack, ranges, arm, kernels)
        else:
            _transformers(stack, ranges, arm)
        yield


def _transformers(stack: ExitStack, ranges: Ranges, arm: Arm) -> None:
    """Ranges around the modules of a Hugging Face model, PEFT's too, and around what perfbench adds to them."""

    def around(owner: Any, attribute: str, name: str) -> None:
        replace(stack, owner, attribute, lambda function: ranges.around(name, function))

    # PEFT's model.model is Hugging Face's whole model; the one with the layers is further in.
    base = next(module for module in arm.model.modules() if isinstance(getattr(module, "layers", None), ModuleList))
    around(base, "forward", MODEL)
    for path, kind in MODEL_KINDS.items():
        around(base.get_submodule(path), "forward", kind)
    around(arm.model.get_output_embeddings(), "forward", "head")
    for number, layer in enumerate(base.layers):
        # PARA's hook runs before the layer's forward: the range has to begin before the hook.
        context = ranges.fast(f"layer {number}")
        opens = layer.register_forward_pre_hook(lambda *_, at=context: at.__enter__(), prepend=True)
        closes = layer.register_forward_hook(lambda *_, at=context: at.__exit__(None, None, None), always_call=True)
        stack.callback(opens.remove)
        stack.callback(closes.remove)
        for path, kind in LAYER_KINDS.items():
            module = layer.get_submodule(path)
            name = f"layer {number} / {kind}"
            around(module, "forward", name)
            if isinstance(module, AdaptedLinear):
                for attribute in ("_low_rank", "_row_scale"):
                    around(module, attribute, f"{name} / {ranges.method}{attribute.replace('_', ' ')}")
            for attribute in ("lora_A", "lora_B"):
                for part in getattr(module, attribute, {}).values():
                    around(part, "forward", f"{name} / {ranges.method} {attribute}")
    if isinstance(arm, PlanArm):
        around(arm, "_bind", BIND)
        for vectors in arm._vectors.values():
            around(vectors, "_generate", VECTORS)
    for method in ("update", "reorder_cache", "batch_repeat_interleave"):
        around(Cache, method, KV_CACHE)


def _static(stack: ExitStack, ranges: Ranges, arm: StaticArm, kernels: str) -> None:
    """Ranges around what runtime static calls by name.

    It relies on: arm.decoder, made anew where it is None, with the forms that the tables above have then;
    arm.capture, which makes a step a thing to replay; the forward pass's `_product(x, layer, kind, ...)` and
    `_generate_scales`; `product` and `scaled_dot_product_attention`, names of its module; `Adapters.take`.
    A replayed step calls nothing that a range could be around, so that it is not captured here: the same kernels run,
    launched one by one.
    """
    arm.decoder = None
    stack.callback(setattr, arm, "decoder", None)
    if arm.capture is not None:
        replace(stack, arm, "capture", lambda capture: _not_captured)
    layer_in_flight: list[int | None] = [None]
    contexts: dict[str, Any] = {}

    def in_layer(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            name = f"layer {last_layer[0]} / {kind}"
            context = contexts.get(name) or contexts.setdefault(name, ranges.fast(name))
            with context:
                return function(*args, **kwargs)

        return inside

    last_layer = [0]

    def known_product(function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(forward: Forward, x: torch.Tensor, layer: int, kind: str, **options: Any) -> Any:
            layer_in_flight[0] = last_layer[0] = layer
            try:
                return in_layer(kind, function)(forward, x, layer, kind, **options)
            finally:
                layer_in_flight[0] = None

        return inside

    def product_of_no_layer(function: Callable[..., Any]) -> Callable[..., Any]:
        head = ranges.around("head", function)
        return lambda *args: (head if layer_in_flight[0] is None else function)(*args)

    replace(stack, Forward, "_product", known_product)
    replace(stack, static_forward, "product", product_of_no_layer)
    replace(stack, static_forward, "scaled_dot_product_attention", lambda function: in_layer("attention", function))
    replace(stack, Forward, "_generate_scales", lambda function: ranges.around(VECTORS, function))
    replace(stack, Adapters, "take", lambda function: ranges.around(BIND, function))
    for forms, kind in STATIC_FORMS:
        stack.callback(forms.__setitem__, kernels, forms[kernels])
        forms[kernels] = in_layer(kind, forms[kernels])


def _not_captured(step: Callable[[], None]) -> Callable[[], None]:
    return step


def replays(arm: Arm) -> bool:
    """Whether the arm's decode steps, when nobody looks, are replays of a captured one."""
    return isinstance(arm, StaticArm) and arm.capture is not None


def resident(arm: Arm, backbone: Backbone) -> dict[str, int]:
    """Category -> bytes that the backbone and `arm` hold before a call."""
    weights = _places([*backbone.model.parameters(), *backbone.model.buffers()])
    # PEFT's adapters are what its model has beside the backbone's weights.
    adapters = _places([*arm.model.parameters(), *arm.model.buffers()])
    kv: dict[int, int] = {}
    if isinstance(arm, (PlanArm, StaticArm)) and arm.bank is not None:
        adapters |= _places(arm.bank.tensors())
    if isinstance(arm, StaticArm) and arm.decoder is not None:
        kv = _places(arm.decoder.cache.tensors())
        adapters |= _places(arm.decoder.adapters.tensors() if arm.decoder.adapters else [])
    adapters = {place: size for place, size in adapters.items() if place not in weights}
    other = {place: size for place, size in _places(arm.tensors()).items() if place not in weights | kv | adapters}
    found = {"weights": weights, "kv": kv, "adapters": adapters, "other": other}
    return {category: sum(places.values()) for category, places in found.items()}


def _places(tensors: Sequence[torch.Tensor]) -> dict[int, int]:
    """Address -> bytes of what lies there."""
    return {address(tensor): tensor.nbytes for tensor in tensors}
