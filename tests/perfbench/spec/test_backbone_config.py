"""Names, folders and hub ids become configs; what can't be used is refused with the remedy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from perfbench.errors import BackboneError
from perfbench.methods.shape import BackboneShape
from perfbench.spec.backbone_config import NAMED_CONFIGS, find_config, is_named, parameter_count, shape_of


def meta_model(config):
    """The real Hugging Face model of this config, on the meta device: shapes without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))


@pytest.fixture
def model_folder(tmp_path):
    """A folder that looks like a checkpoint of llama-tiny; the weights' content is never read here."""
    (tmp_path / "config.json").write_text(json.dumps(NAMED_CONFIGS["llama-tiny"]))
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


def edited(folder, **fields):
    config = {**json.loads((folder / "config.json").read_text()), **fields}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def refusal(backbone) -> str:
    with pytest.raises(BackboneError) as caught:
        find_config(str(backbone))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", NAMED_CONFIGS)
def test_the_count_is_the_real_models(name):
    model = meta_model(NAMED_CONFIGS[name])
    assert parameter_count(NAMED_CONFIGS[name]) == model.num_parameters()


@pytest.mark.parametrize("name", NAMED_CONFIGS)
def test_transformers_reads_every_field_of_a_named_shape(name):
    """A field that transformers renamed would be kept aside, and the model would have its default instead."""
    config = NAMED_CONFIGS[name]
    model = meta_model(config)
    assert type(model).__name__ == config["architectures"][0]
    known = type(model.config)().to_dict()
    assert [key for key in config if key not in known] == []
    assert model.config.rope_parameters == config["rope_parameters"]
    layer = model.model.layers[0]
    shape = BackboneShape.of_config(config)
    assert layer.self_attn.k_proj.weight.shape == (shape.kv_heads * shape.head_dim, shape.hidden)
    biased = config["model_type"] == "qwen2"
    assert (layer.self_attn.q_proj.bias is not None) == biased
    assert (
        type(layer.mlp.act_fn).__name__
        == {"silu": "SiLUActivation", "gelu_pytorch_tanh": "GELUTanh"}[config["hidden_act"]]
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama-tiny", {"attention_bias": True}),
        ("llama-tiny", {"mlp_bias": True}),
        ("llama-tiny", {"tie_word_embeddings": True}),
        ("llama-tiny", {"head_dim": 32}),
        ("llama-tiny", {"model_type": "mistral"}),
        ("llama-tiny", {"model_type": "qwen2"}),
        ("llama-tiny", {"model_type": "qwen3", "head_dim": 32}),
        ("llama-tiny", {"model_type": "qwen3", "attention_bias": True, "tie_word_embeddings": True}),
        ("llama-tiny", {"model_type": "gemma", "attention_bias": True}),
    ],
)
def test_the_count_follows_biases_ties_and_families(name, changes):
    config = {**NAMED_CONFIGS[name], **changes}
    assert parameter_count(config) == meta_model(config).num_parameters()


def test_the_published_counts():
    assert parameter_count(NAMED_CONFIGS["llama2-7b"]) == 6_738_415_616
    assert parameter_count(NAMED_CONFIGS["llama-110m"]) == 109_529_856


def test_a_real_checkpoint(stories260k):
    from safetensors import safe_open

    with safe_open(stories260k / "model.safetensors", "pt") as weights:
        stored = sum(weights.get_tensor(key).numel() for key in weights.keys())  # noqa: SIM118
    assert parameter_count(find_config(str(stories260k))) == stored
    assert not is_named(str(stories260k))
    assert shape_of(str(stories260k)).kv_heads == 4


def test_a_named_config_is_a_copy():
    find_config("llama-tiny")["rope_parameters"]["rope_theta"] = 0
    assert find_config("llama-tiny")["rope_parameters"]["rope_theta"] == 10000.0


def test_a_folder_is_read(model_folder):
    assert shape_of(str(model_folder)) == shape_of("llama-tiny")


def test_a_folder_of_shards_is_read(model_folder):
    (model_folder / "model.safetensors").rename(model_folder / "a.safetensors")
    index = model_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert refusal(model_folder).startswith(f"{model_folder / 'b.safetensors'}: no such file")
    (model_folder / "b.safetensors").write_bytes(b"")
    assert shape_of(str(model_folder)) == shape_of("llama-tiny")
    index.write_text("{}")
    assert "weight_map: expected an object" in refusal(model_folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "gpt2"}, "model_type: expected one of llama, mistral, qwen2, qwen3, gemma, got 'gpt2'"),
        ({"model_type": None}, "model_type: expected one of llama, mistral, qwen2, qwen3, gemma, got None"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map: asks to run code"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected plain weights"),
        ({"num_hidden_layers": None}, "num_hidden_layers: missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected an integer >= 1, got 0"),
        ({"vocab_size": "many"}, "vocab_size: expected an integer >= 1, got 'many'"),
        ({"vocab_size": True}, "vocab_size: expected an integer >= 1, got True"),
        ({"head_dim": None, "num_attention_heads": 0}, "expected integers >= 1"),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads: expected a divisor of num_attention_heads 4, got 3",
        ),
        ({"model_type": "mistral", "sliding_window": "x"}, "sliding_window, max_window_layers, layer_types: expected"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window, max_window_layers, layer_types: expected"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["x"]}, "a kind for each of the 3 layers"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "x"}, "max_window_layers"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": 7}, "layer_types: expected"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused(model_folder, changes, expected):
    message = refusal(edited(model_folder, **changes))
    assert message.startswith(f"{model_folder / 'config.json'}: ")
    assert expected in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{\n"model_type": \n', ":3: expected JSON"),
        (b"[]", ": expected a JSON object, got list"),
        (b"", ":1: expected JSON"),
        (b"\xff\xfe", ": expected JSON in UTF-8"),
    ],
)
def test_malformed_json_is_refused(model_folder, content, expected):
    (model_folder / "config.json").write_bytes(content)
    assert refusal(model_folder).startswith(f"{model_folder / 'config.json'}{expected}")


def test_a_folder_without_config_is_refused(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path / 'config.json'}: no such file; give the folder that holds config.json"


def test_a_pickle_is_refused(model_folder):
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    message = refusal(model_folder)
    assert message.startswith(f"{model_folder / 'pytorch_model.bin'}: a pickle, refused")


def test_a_folder_without_weights_is_refused(model_folder):
    (model_folder / "model.safetensors").unlink()
    assert "no weights" in refusal(model_folder)


def test_a_file_and_a_missing_folder_are_refused(model_folder):
    assert "expected a folder, got a file" in refusal(model_folder / "config.json")
    assert "no such folder" in refusal(model_folder / "nowhere")
    assert "no such folder" in refusal("./nowhere")


def test_an_unknown_name_gets_the_nearest():
    assert "did you mean 'llama2-7b'?" in refusal("lama2-7b")
    assert "known: gemma-2b, " in refusal("zzz")


def test_offline_says_so():
    message = refusal("perfbench-tests/no-such-model")
    assert "HF_HUB_OFFLINE is set; unset it" in message
    assert "give its folder" in message


def test_without_a_network_says_so(monkeypatch):
    """In a process of its own: huggingface_hub reads its variables once. Port 9 of the loopback refuses; the
    hub's client tries again five times, here without its 23 seconds of waiting."""
    code = (
        "import time; time.sleep = lambda seconds: None\n"
        "from perfbench.spec.backbone_config import find_config; find_config('perfbench-tests/no-such-model')"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "BackboneError: backbone perfbench-tests/no-such-model: " in done.stderr
    assert "the hub can't be reached; connect" in done.stderr


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            "GatedRepoError",
            "gated; accept its licence at https://huggingface.co/owner/model, then `hf auth login`",
        ),
        ("RepositoryNotFoundError", "no such model on the hub; mend the name"),
        ("RemoteEntryNotFoundError", "no config.json on the hub"),
        ("HfHubHTTPError", "could not be fetched: first line second line"),
        ("HTTPError", "could not be fetched: first line second line"),
    ],
)
def test_what_the_hub_answers_becomes_one_line(monkeypatch, error, expected):
    """The hub's answers are raised by a stand-in for the download: tests don't open the network."""
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, error)
    raised = kind.__new__(kind)
    raised.args = ("first line\nsecond line",)

    def download(*_):
        raise raised

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert expected in refusal("owner/model")


def test_a_cached_hub_model_is_found(monkeypatch, model_folder):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: str(model_folder / "config.json"))
    assert shape_of("owner/model") == shape_of("llama-tiny")
