"""What a served method can be told: each field of its frozen dataclass is an option of a scenario. Free of torch.

A field says all there is to say of the option, and `perfbench.spec.option_schema` makes the JSON Schema of it: the
annotation gives the types (int, float, bool, str, None, a Literal, tuples of these), the default is the default, and
the field's metadata are JSON Schema's own words, such as {"minimum": 1, "description": "..."}.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from perfbench.methods.shape import MODULES

Rules = dict[str, Any]

MODULE: Rules = {"type": "string", "enum": list(MODULES), "title": "module"}
MODULES_OF_A_LAYER: Rules = {"items": MODULE, "minItems": 1, "uniqueItems": True}
RANK: Rules = {"minimum": 1, "maximum": 1024, "description": "the rank of the adapter"}
SIZE: Rules = {"minimum": 1, "maximum": 1 << 16}
ALPHA: Rules = {
    "exclusiveMinimum": 0,
    "description": "what the adapter adds is multiplied by alpha / rank; null or absent: alpha = rank",
}
# One list of modules for each layer, as a search for FanLoRA's setting writes it.
LAYERS: Rules = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "array", "items": MODULE, "uniqueItems": True},
    "description": "the modules that are kept, a list for each layer of the backbone; a layer's list may be empty",
}


@dataclass(frozen=True)
class NoOptions:
    """A method without options."""


@dataclass(frozen=True)
class MethodOptions:
    """What every method with adapters can be told. A method's own options are fields of a subclass, `Options` of its
    file, each with a default; __post_init__ may raise ValueError where they exclude each other."""

    adapters: str | tuple[str, ...] | None = field(
        default=None,
        kw_only=True,
        metadata={
            "type": ["string", "array", "null"],
            "minLength": 1,
            "minItems": 1,
            "items": {"type": "string", "minLength": 1},
            "description": "trained adapters, one for each resident tenant: a folder that PEFT, a Trainer, "
            "`perfbench finetune` or `accuracy` wrote, or a list of such folders; null or absent: random ones",
        },
    )
