"""GGUF files as backbones: the same weights and tokens come out, and what can't be read is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from perfbench.cli import main
from perfbench.errors import BackboneError
from perfbench.finetune import gguf_import
from perfbench.runtimes import backbone
from tests.perfbench.finetune.models import other_llama

gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
    return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[
        name.removesuffix(".weight")
    ] + ".weight"


def write_gguf(file: Path, model: Any, architecture: str = "llama", leave_out: str = "", kind: str = "F32") -> Path:
    """The model with a tokenizer of single letters, as llama.cpp's converter writes it: q and k with their rows paired
    otherwise."""
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    letters = [chr(ord("A") + n) if n < 26 else chr(ord("a") + n - 26) for n in range(52)]
    tokens = ["<s>", "</s>", *letters, *(str(n) for n in range(9)), "AB"]
    assert len(tokens) == config.vocab_size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * 62])
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        if leave_out and leave_out in name:
            continue
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            rows = tensor.shape[0]
            tensor = tensor.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(rows, -1)
        values = tensor.numpy()
        if kind != "F32" and values.ndim == 2:
            quantised = getattr(gguf.GGMLQuantizationType, kind)
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(gguf_name(name), numpy.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def model() -> Any:
    return other_llama(intermediate_size=64)


@pytest.mark.parametrize(("kind", "within"), [("F32", 1e-6), ("Q8_0", 2e-2)])
def test_the_same_model_comes_out(model: Any, kind: str, within: float, tmp_path: Path, capsys: Any) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model, kind=kind)
    assert main(["backbone", "import", str(file), "--out", str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    count = sum(p.numel() for p in model.parameters())
    assert f"{count:,} parameters in fp32" in capsys.readouterr().out
    loaded = backbone.load(str(tmp_path / "out"), "fp32", "cpu", seed=0)
    ids = torch.arange(3, 12).unsqueeze(0)
    with torch.inference_mode():
        expected, found = model(ids).logits, loaded.model(ids).logits
    assert float((found - expected).norm() / expected.norm()) < within
    assert loaded.tokenizer()("ABz8", add_special_tokens=False)["input_ids"] == [63, 53, 62]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"], "nothing is left beside it"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


def spoil(file: Path) -> None:
    file.write_bytes(b"{}" * 20)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "not a whole GGUF file"),
        (cut_short, "not a whole GGUF file"),
        (spoil, "expected a GGUF file, which begins with b'GGUF', got b'{}{}'"),
        (Path.unlink, "can't be read (No such file or directory)"),
    ],
)
def test_a_damaged_file_is_refused(
    model: Any, damage: Callable[[Path], Any], message: str, tmp_path: Path, capsys: Any
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model)
    damage(file)
    assert main(["backbone", "import", str(file), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_architecture_and_a_missing_weight_are_refused(model: Any, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "other.gguf", model, architecture="mamba")
    with pytest.raises(BackboneError, match="expected a model of architecture llama, got 'mamba'"):
        gguf_import.import_file(other, tmp_path / "out")
    part = write_gguf(tmp_path / "part.gguf", model, leave_out="layers.1.mlp.up_proj")
    with pytest.raises(BackboneError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        gguf_import.import_file(part, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    whole = write_gguf(tmp_path / "tiny.gguf", model)
    with pytest.raises(BackboneError, match="expected a new or empty folder"):
        gguf_import.import_file(whole, tmp_path / "full")


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_import.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackboneError, match=r"pip install 'adapter-perfbench\[gguf\]'"):
        gguf_import.import_file(tmp_path / "tiny.gguf", tmp_path / "out")
