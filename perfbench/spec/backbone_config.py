"""What a backbone's name means: named shape, local folder or hub id -> Hugging Face config. Free of torch.

A named shape is used with random weights: latency and memory do not depend on what the weights say. Only its
config is needed to check a scenario, count parameters and size adapters; nothing here allocates weights.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perfbench.errors import BackboneError, PerfbenchError, nearest
from perfbench.files.paths import expanded
from perfbench.files.plain_text import shown
from perfbench.methods.shape import LLAMA_FAMILY, MODULES, BackboneShape

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# Where transformers puts the safetensors weights of a model folder: one file, or shards with an index.
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"

# PEFT's file: where it lies beside a model, transformers puts the adapter on top of the weights, merged or not.
ADAPTER_CONFIG = "adapter_config.json"
BESIDE_AN_ADAPTER = (
    f"expected a model without an adapter, got one with {ADAPTER_CONFIG} beside it, which would be applied to the "
    f"weights without a word; move the adapter's files away, and give them to a method as its adapters"
)

# The field of config.json behind each field of BackboneShape, for messages.
CONFIG_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
}


def _llama(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    *,
    vocab: int,
    context: int,
    kv_heads: int | None = None,
) -> dict[str, Any]:
    """The config of a Llama of these sizes: no biases, untied embeddings, RoPE base 10000, SiLU."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


# Name -> the Hugging Face config of the published model (or, for the small ones, of a Llama of that size).
NAMED_CONFIGS: dict[str, dict[str, Any]] = {
    "llama2-7b": _llama(32, 4096, 11008, 32, vocab=32000, context=4096),
    "llama2-13b": _llama(40, 5120, 13824, 40, vocab=32000, context=4096),
    "gemma-2b": {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "num_hidden_layers": 18,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    "qwen1.5-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",  # its q, k and v have biases; the model type says so, no field does
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,  # no head_dim: Qwen2's config has no such field, it is 4096 / 32
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    },
    "llama-110m": _llama(12, 768, 2048, 12, vocab=16000, context=2048),
    "llama-256x8": _llama(8, 256, 688, 8, vocab=4096, context=2048),
    "llama-tiny": _llama(3, 64, 172, 4, vocab=256, context=512, kv_heads=2),
}


def is_named(backbone: str) -> bool:
    """Whether `backbone` is a named shape, which is used with random weights."""
    return backbone in NAMED_CONFIGS


def find_config(backbone: str) -> dict[str, Any]:
    """The Hugging Face config of `backbone`: a named shape, else a local folder, else a hub id `owner/model`.

    A hub id is looked up in the local cache and, unless HF_HUB_OFFLINE is set, on the hub. BackboneError says
    what is wrong and what to do: no such name or folder, no network, a gated model, a model outside the Llama
    family, one that wants its own code run, one whose weights are only a pickle.
    """
    if backbone in NAMED_CONFIGS:
        return copy.deepcopy(NAMED_CONFIGS[backbone])
    try:
        folder = expanded(backbone)
    except PerfbenchError as error:
        raise BackboneError(f"backbone {error}") from None
    if folder.is_dir():
        config = _read_json(folder / "config.json", "give the folder that holds config.json")
        if (folder / ADAPTER_CONFIG).exists():
            raise BackboneError(f"{folder}: {BESIDE_AN_ADAPTER}")
        _check_weights(folder)
        return _checked(config, str(folder / "config.json"))
    if folder.exists():
        raise BackboneError(
            f"backbone {backbone}: expected a folder, got a file; give the folder that holds config.json"
        )
    if HUB_ID.fullmatch(backbone):
        path = _download_config(backbone)
        return _checked(_read_json(path, "download it again"), f"backbone {backbone}: config.json")
    if "/" in backbone or backbone.startswith((".", "~")):
        raise BackboneError(
            f"backbone {backbone}: no such folder; give one that holds config.json, or a hub id owner/model"
        )
    raise BackboneError(
        f"backbone {backbone!r}: no such named shape and no such folder; {nearest(backbone, NAMED_CONFIGS)} "
        "(a hub id has the form owner/model)"
    )


def shape_of(backbone: str) -> BackboneShape:
    """The sizes of `backbone`. Raises BackboneError as `find_config` does."""
    return BackboneShape.of_config(find_config(backbone))


def parameter_count(config: Mapping[str, Any], ranks: int = 1) -> int:
    """The exact parameter count of this config's backbone, tied embeddings once, or of what each of several ranks has
    of it; allocates nothing."""
    shape, family = BackboneShape.of_config(config).of_rank(ranks), config["model_type"]
    features = {module: shape.features(module) for module in MODULES}
    linears = sum(d_in * d_out for d_in, d_out in features.values())
    biases = sum(features[module][1] for module in _biased_modules(config))
    tied = config.get("tie_word_embeddings", family == "gemma")  # transformers' default
    embeddings = shape.vocab * shape.hidden * (1 if tied else 2)
    norms_of_layer = 2 * shape.hidden + (2 * shape.head_dim if norms_heads(config) else 0)
    return embeddings + shape.layers * (linears + biases + norms_of_layer) + shape.hidden


def norms_heads(config: Mapping[str, Any]) -> bool:
    """Whether queries and keys are normalised, head by head, before their rotation."""
    return bool(config["model_type"] == "qwen3")


def windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Of each layer how many tokens, itself the last, a token attends to; None: all before it. As transformers reads
    the fields, whose defaults it has where they are missing."""
    layers, family = config["num_hidden_layers"], config["model_type"]
    if family == "mistral":
        return (config.get("sliding_window", 4096),) * layers
    if family not in ("qwen2", "qwen3") or not config.get("use_sliding_window"):
        return (None,) * layers
    window, first = config.get("sliding_window", 4096), config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or ["sliding_attention" if i >= first else "" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _biased_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The linear modules that have a bias in this config's model: by its type, or by its fields."""
    family = config["model_type"]
    if family == "qwen2":
        return ("q", "k", "v")
    attention = MODULES[:4] if family in ("llama", "qwen3", "gemma") and config.get("attention_bias") else ()
    mlp = MODULES[4:] if family == "llama" and config.get("mlp_bias") else ()
    return attention + mlp


def _checked(config: dict[str, Any], where: str) -> dict[str, Any]:
    """`config`, once it is known to describe a plain Llama-family model of sane sizes; else BackboneError."""
    family = config.get("model_type")
    if family not in LLAMA_FAMILY:
        raise BackboneError(
            f"{where}: model_type: expected one of {', '.join(LLAMA_FAMILY)}, got {family!r}; choose one"
        )
    if config.get("auto_map"):
        raise BackboneError(
            f"{where}: auto_map: asks to run code that comes with the model, which perfbench never does; "
            "choose a model without it"
        )
    if config.get("quantization_config"):
        raise BackboneError(
            f"{where}: quantization_config: expected plain weights, got quantised; choose the plain model"
        )
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(name), dict | None):
            raise BackboneError(
                f"{where}: {name}: expected an object or null, got {shown(config[name])}; mend the file"
            )
    try:
        shape = BackboneShape.of_config(config)
    except KeyError as missing:
        raise BackboneError(f"{where}: {missing.args[0]}: missing; complete the file") from None
    except (TypeError, ZeroDivisionError):
        raise BackboneError(
            f"{where}: hidden_size, num_attention_heads: expected integers >= 1; mend the file"
        ) from None
    for name, value in vars(shape).items():
        if type(value) is not int or value < 1:
            raise BackboneError(
                f"{where}: {CONFIG_FIELDS[name]}: expected an integer >= 1, got {value!r}; mend the file"
            )
    try:
        seen = windows(config)
    except TypeError:
        seen = ()
    if len(seen) != shape.layers or any(
        window is not None and (type(window) is not int or window < 1) for window in seen
    ):
        raise BackboneError(
            f"{where}: sliding_window, max_window_layers, layer_types: expected an integer >= 1 or null, an integer, "
            f"and a kind for each of the {shape.layers} layers; mend the file"
        )
    if shape.heads % shape.kv_heads:
        raise BackboneError(
            f"{where}: num_key_value_heads: expected a divisor of num_attention_heads {shape.heads}, "
            f"got {shape.kv_heads}; mend the file"
        )
    return config


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in `path`; else BackboneError, which ends in `remedy` where the file is missing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BackboneError(f"{path}: no such file; {remedy}") from None
    except OSError as error:
        raise BackboneError(f"{path}: can't be read: {error.strerror}; mend its permissions") from None
    except UnicodeDecodeError:
        raise BackboneError(f"{path}: expected JSON in UTF-8, got other bytes; download it again") from None
    except RecursionError:
        raise BackboneError(f"{path}: expected a config, got JSON nested too deeply; download it again") from None
    except json.JSONDecodeError as error:
        raise BackboneError(
            f"{path}:{error.lineno}: expected JSON, got something else ({error.msg}); download it again"
        ) from None
    except ValueError:  # a number of more digits than Python converts
        raise BackboneError(f"{path}: expected JSON, got a number that can't be read; download it again") from None
    if not isinstance(value, dict):
        raise BackboneError(f"{path}: expected a JSON object, got {type(value).__name__}; download it again")
    return value


def _check_weights(folder: Path) -> None:
    """BackboneError unless `folder` holds safetensors weights, every shard included."""
    if (folder / WEIGHTS).is_file():
        return
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        weight_map = _read_json(index, "download it again").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BackboneError(f"{index}: weight_map: expected an object, tensor to file; download it again")
        missing = sorted({str(shard) for shard in weight_map.values() if not (folder / str(shard)).is_file()})
        if missing:
            raise BackboneError(f"{folder / missing[0]}: no such file, but {index.name} names it; download it")
        return
    pickles = sorted(path for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}"))
    if pickles:
        raise BackboneError(
            f"{pickles[0]}: a pickle, refused because loading one can run any code; convert it to {WEIGHTS} "
            "(save_pretrained writes that) and try again"
        )
    raise BackboneError(f"{folder}: has config.json but no weights; put {WEIGHTS} beside it")


def _download_config(hub_id: str) -> Path:
    """The cached path of `hub_id`'s config.json, fetched from the hub where need be; else BackboneError."""
    from huggingface_hub import constants, errors, hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, "config.json"))
    except errors.GatedRepoError:
        raise BackboneError(
            f"backbone {hub_id}: gated; accept its licence at https://huggingface.co/{hub_id}, then "
            "`hf auth login`; or give the folder of a copy"
        ) from None
    except errors.RepositoryNotFoundError:
        raise BackboneError(
            f"backbone {hub_id}: no such folder here and no such model on the hub; mend the name, or "
            "`hf auth login` if it is private"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        offline = constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else "the hub can't be reached"
        raise BackboneError(
            f"backbone {hub_id}: no such folder here, not in the hub's cache, and {why}; "
            f"{'unset it' if offline else 'connect'}, or download the model elsewhere and give its folder"
        ) from None
    except errors.EntryNotFoundError:
        raise BackboneError(
            f"backbone {hub_id}: no config.json on the hub; choose a model of the Llama family"
        ) from None
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise BackboneError(
            f"backbone {hub_id}: could not be fetched: {reason}; try again, or give the folder of a copy"
        ) from None
