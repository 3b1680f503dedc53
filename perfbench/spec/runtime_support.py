"""What each runtime can serve, known from names and configs alone. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from perfbench.machine import compiler
from perfbench.methods.registry import METHODS
from perfbench.spec.backbone_config import norms_heads, windows

# `hidden_act` of the configs that runtime static can run.
STATIC_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")


def serves(runtime: str, method: str) -> bool:
    """Whether `runtime` can serve `method`. PEFT brings its own modules, which only Hugging Face's model takes; weights
    into which one tenant is merged serve no mixed traffic."""
    merged = METHODS[method].served_by == "merged"
    return runtime == "transformers" or METHODS[method].in_bank or (merged and runtime == "static")


def kernels_problem(kernels: str, device_kind: str, runtimes: Sequence[str]) -> str | None:
    """Why `kernels` can't run on this kind of device or on one of the runtimes, with the way out; None where they
    can. For `compiled` it looks for a compiler on this machine."""
    if kernels == "triton" and device_kind != "cuda":
        return f"triton: its kernels run on a CUDA device, this run is on {device_kind}; choose kernels eager"
    if kernels == "compiled":
        other = next((runtime for runtime in runtimes if runtime != "static"), None)
        if other is not None:
            what = f"compiled: it compiles runtime static's decode step, not that of {other}"
            return f"{what}; choose runtime static, or kernels eager"
        reason = compiler.problem()
        return None if reason is None else f"compiled: {reason}"
    return None


def quantisation_problem(
    quantisation: str, device_kind: str, kernels: Sequence[str], methods: Sequence[str]
) -> tuple[str, str] | None:
    """(field, why) weights of this `quantisation` can't be served, with the way out; None where they can."""
    if quantisation == "none":
        return None
    if device_kind != "cpu":
        return "quantisation", f"{quantisation}: its products run on a CPU, this run is on {device_kind}; choose none"
    if other := [name for name in kernels if name != "eager"]:
        return "kernels", f"{other[0]}: it reads no weights of quantisation {quantisation}; choose kernels eager"
    if merged := [name for name in methods if METHODS[name].served_by == "merged"]:
        what = f"{merged[0]}: weights of quantisation {quantisation} would have to be rounded again with what is merged"
        return "methods", f"{what}; leave it out, or choose quantisation none"
    return None


def tensor_parallel_problem(
    runtimes: Sequence[str], kernels: Sequence[str], quantisations: Sequence[str], methods: Sequence[str]
) -> tuple[str, str] | None:
    """(field, why) several ranks can't serve these, with the way out; None where they can."""
    if other := [runtime for runtime in runtimes if runtime != "static"]:
        missing = "; accelerate's device map, for runtime transformers, is not there yet"
        what = f"{other[0]}: only runtime static is spread over several ranks{missing * (other[0] == 'transformers')}"
        return "runtime", f"{what}; choose runtime static, or tensor_parallel_size 1"
    if other := [name for name in kernels if name != "eager"]:
        what = f"{other[0]}: its fused kernels have no place for the sum over ranks"
        return "kernels", f"{what}; choose kernels eager, or tensor_parallel_size 1"
    if other := [name for name in quantisations if name != "none"]:
        what = f"{other[0]}: weights of 8 bits with their scales are not dealt out to ranks"
        return "quantisation", f"{what}; choose quantisation none, or tensor_parallel_size 1"
    if merged := [name for name in methods if METHODS[name].served_by == "merged"]:
        what = f"{merged[0]}: it merges into whole weights, which several ranks do not have"
        return "methods", f"{what}; leave it out, or choose tensor_parallel_size 1"
    return None


def unsupported(runtime: str, config: Mapping[str, Any]) -> str | None:
    """What in a Llama-family `config` keeps `runtime` from running it, with the way out; None where it can."""
    if runtime == "transformers":
        return None
    way_out = "choose runtime transformers"
    rope = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        return f"rope_type {rope}: RoPE that changes with the length is not in runtime static; {way_out}"
    window = min((window for window in windows(config) if window is not None), default=None)
    if window is not None and window < config["max_position_embeddings"]:
        return f"sliding_window {window}: sliding-window attention is not in runtime static; {way_out}"
    if norms_heads(config):
        return f"model_type {config['model_type']}: norms of queries and keys are not in runtime static; {way_out}"
    activation = config.get("hidden_act", "silu")
    if activation not in STATIC_ACTIVATIONS:
        return f"hidden_act {activation}: runtime static has {', '.join(STATIC_ACTIVATIONS)}; {way_out}"
    return None
