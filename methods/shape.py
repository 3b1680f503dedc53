"""The sizes of a Llama-family backbone that an adapter depends on. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

# The seven linear modules of a Llama-family layer, in the order in which they run.
MODULES = ("q", "k", "v", "o", "gate", "up", "down")

# One tuple of module names for each layer.
Setting = tuple[tuple[str, ...], ...]

# Where a module lives inside a decoder layer of Hugging Face's Llama, Mistral, Qwen2, Qwen3 and Gemma.
MODULE_PATHS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

# The modules that read the same input, in the order in which their outputs lie side by side in one fused product.
SHARED_INPUT = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}

# Of several ranks with a part of each module these have a part of its inputs, of which each makes a part of a sum; of
# the others each has a part of the outputs.
ROW_PARALLEL = ("o", "down")

# `model_type` of the configurations whose decoder layers have exactly those modules.
LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3", "gemma")


@dataclass(frozen=True)
class BackboneShape:
    """Sizes of one backbone; all of them counts (of layers, features, heads, tokens)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int

    def features(self, module: str) -> tuple[int, int]:
        """(D_in, D_out) of `module`; under grouped-query attention k and v have the KV size."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (self.hidden, q),
            "k": (self.hidden, kv),
            "v": (self.hidden, kv),
            "o": (q, self.hidden),
            "gate": (self.hidden, self.intermediate),
            "up": (self.hidden, self.intermediate),
            "down": (self.intermediate, self.hidden),
        }[module]

    def of_rank(self, ranks: int) -> BackboneShape:
        """What each of so many ranks has: whole heads, and as much of the MLP. ValueError where they do not divide."""
        parts = {}
        for name in ("kv_heads", "heads", "intermediate"):
            if (size := getattr(self, name)) % ranks:
                raise ValueError(f"{ranks} ranks: expected a divisor of its {size} {name}")
            parts[name] = size // ranks
        return replace(self, **parts)

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> BackboneShape:
        """The shape that a Hugging Face `config.json` describes. KeyError names a field that is missing."""
        heads = config["num_attention_heads"]
        # Qwen3's default; the others' is what the hidden size leaves for each head.
        head_dim = 128 if config.get("model_type") == "qwen3" else config["hidden_size"] // heads
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or head_dim,
            vocab=config["vocab_size"],
            context=config["max_position_embeddings"],
        )
