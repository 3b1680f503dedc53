"""Which fields of a PEFT configuration perfbench serves, and what every other one has to say for the rest to be true.

PEFT's own defaults are written down here, since this room does not import PEFT; a test holds them against PEFT's
classes and fails on a field that PEFT has and these tables lack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfbench.errors import AdapterError, nearest

# Of every type: they say where the adapter is from, or how it is to be trained.
_OF_EVERY_TYPE = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type"}
)


@dataclass(frozen=True)
class Fields:
    """The fields of one `peft_type`. served: what its reader reads and checks; without_effect: what changes no
    forward pass as long as the others hold; fixed: what is served at PEFT's default only, with that default."""

    served: frozenset[str]
    without_effect: frozenset[str]
    fixed: Mapping[str, Any]

    @property
    def known(self) -> frozenset[str]:
        """Every field of the type."""
        return self.served | self.without_effect | self.fixed.keys() | _OF_EVERY_TYPE


LORA = Fields(
    served=frozenset(
        {
            "r",
            "lora_alpha",
            "use_rslora",
            "use_dora",
            "lora_bias",
            "alora_invocation_tokens",
            "rank_pattern",
            "alpha_pattern",
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "target_parameters",
            "init_lora_weights",
            "lora_dropout",
        }
    ),
    # Each belongs to a setting below or to an initialisation, and is idle without it.
    without_effect=frozenset(
        {
            "megatron_core",
            "qalora_group_size",
            "eva_config",
            "loftq_config",
            "corda_config",
            "lora_ga_config",
            "ensure_weight_tying",
            "runtime_config",
        }
    ),
    fixed={
        "arrow_config": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "kasa_config": None,
        "layer_replication": None,
        "megatron_config": None,
        "modules_to_save": None,
        "monteclora_config": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_qalora": False,
        "velora_config": None,
    },
)
# Its reader takes the rank and the scale from init_r, lora_alpha and rank_pattern alone, as PEFT's model does.
ADALORA = Fields(
    served=frozenset(
        {
            "init_r",
            "lora_alpha",
            "rank_pattern",
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
        }
    ),
    without_effect=LORA.without_effect
    | {"r", "use_rslora", "alpha_pattern", "init_lora_weights", "lora_dropout"}
    | {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"},
    fixed={
        **LORA.fixed,
        "alora_invocation_tokens": None,
        "lora_bias": False,
        "target_parameters": None,
        "use_dora": False,
    },
)
IA3 = Fields(
    served=frozenset({"target_modules", "exclude_modules", "feedforward_modules"}),
    without_effect=frozenset({"init_ia3_weights"}),
    fixed={"fan_in_fan_out": False, "modules_to_save": None},
)
ROAD = Fields(
    served=frozenset({"variant", "group_size", "target_modules"}),
    without_effect=frozenset({"init_weights"}),
    fixed={"modules_to_save": None},
)
MISS = Fields(
    served=frozenset(
        {
            "r",
            "mini_r",
            "init_weights",
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
        }
    ),
    without_effect=frozenset({"miss_dropout"}),
    fixed={"bias": "none", "modules_to_save": None},
)
VERA = Fields(
    served=frozenset(
        {
            "r",
            "projection_prng_key",
            "save_projection",
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
        }
    ),
    without_effect=frozenset({"vera_dropout", "d_initial", "init_weights"}),
    fixed={"bias": "none", "fan_in_fan_out": False, "modules_to_save": None},
)
PROJECTED_IA3 = Fields(frozenset({"dim", "target_modules", "exclude_modules"}), frozenset(), {})
PARA = Fields(frozenset({"rank", "pool", "target_modules", "exclude_modules"}), frozenset(), {})

# Initialisations that leave the backbone's weights as they are. PEFT's others (pissa, olora, corda, loftq, lora_ga)
# take from the weights what they put into the adapter, and the adapter is right only on what they leave.
HARMLESS_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica")


def check(config: Mapping[str, Any], path: Path, fields: Fields) -> None:
    """AdapterError on the first field that asks for more than the fields that are served can give.

    A field that is in no table is one of a later PEFT or a mistake: served while it is off (null, false or empty), as
    all that PEFT has added so far is by default.
    """
    for field, value in config.items():
        if field in fields.fixed:
            _expect_default(path, field, value, fields.fixed[field])
        elif field not in fields.known and not _is_off(value):
            name = field if field.isidentifier() and len(field) <= 80 else shown(field)
            raise AdapterError(
                f"{path}: {name}: expected a field that perfbench serves or one that is off, got {shown(value)}; "
                f"{nearest(field, fields.known)}"
            )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterError(f"{path}: task_type: expected 'CAUSAL_LM' or null, got {shown(config['task_type'])}")


def _expect_default(path: Path, field: str, value: Any, default: Any) -> None:
    if (type(value) is type(default) and value == default) or (not default and _is_off(value)):
        return
    raise AdapterError(
        f"{path}: {field}: expected {default!r}, got {shown(value)}; what it asks for is not served, "
        f"and without it the adapter would be another one"
        + ("; of biases LoRA's lora_bias alone is served, not those of the backbone" if field == "bias" else "")
    )


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ([], {})


def check_initialisation(config: Mapping[str, Any], path: Path) -> None:
    """AdapterError where a LoRA was initialised from the backbone's weights, and changed them."""
    value = config.get("init_lora_weights", True)
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str) and (
        value in HARMLESS_INITIALISATIONS or value.lower() in ("gaussian", "mica")  # PEFT reads these two in any case
    ):
        return
    raise AdapterError(
        f"{path}: init_lora_weights: expected true, false or one of {', '.join(HARMLESS_INITIALISATIONS)}, which leave "
        f"the backbone's weights as they are, got {shown(value)}; save the adapter again with PEFT's "
        f"path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
    )


def number(config: Mapping[str, Any], path: Path, field: str, default: float) -> float:
    """The finite number in `field`, or PEFT's default where the field is absent. AdapterError on anything else."""
    return expect_number(config.get(field, default), path, field)


def expect_number(value: Any, path: Path, field: str) -> float:
    """`value`, a finite number. AdapterError, which names the field, on anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise AdapterError(f"{path}: {field}: expected a finite number, got {shown(value)}")
    return value


def expect_count(value: Any, path: Path, field: str) -> int:
    """`value`, an integer from 1 on. AdapterError, which names the field, on anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterError(f"{path}: {field}: expected an integer >= 1, got {shown(value)}")
    return value


def flag(config: Mapping[str, Any], path: Path, field: str) -> bool:
    """The boolean in `field`, false where it is absent. AdapterError on anything else."""
    value = config.get(field, False)
    if not isinstance(value, bool):
        raise AdapterError(f"{path}: {field}: expected true or false, got {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value of a file for a message: on one line, and not longer than one can read."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False
