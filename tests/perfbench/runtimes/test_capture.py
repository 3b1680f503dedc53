"""The decode step of one size for all steps, as a GPU captures and replays it; here its replay is played by a tape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from perfbench.methods.registry import METHODS
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.static.capture import Step
from perfbench.runtimes.static.decoder import Decoder
from perfbench.spec import backbone_config
from perfbench.verify.on_device.runtimes import make_bank
from tests.perfbench.runtimes.tape import taped

SERVED = [name for name, method in METHODS.items() if method.served_by == "plan"]
RESIDENT = 4


def run_again(step: Step) -> Step:
    return step


@pytest.fixture(scope="module")
def base() -> backbone.Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


def make_batch(beams: int, *, ragged: bool) -> Batch:
    ids = torch.randint(3, 256, (4, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    if ragged:
        mask[1, :8] = mask[3, :2] = 0
    return Batch(ids * mask, mask, (2, 0, -1, 3), beams, new_tokens=7)


@pytest.fixture(params=[False, True], ids=["ranks-alone", "ranks-out-of-the-product"])
def tail(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is what a GPU does."""
    for module in ("decoder", "adapters"):
        monkeypatch.setattr(f"perfbench.runtimes.static.{module}.takes_tail", lambda x: request.param)


@pytest.mark.usefixtures("tail")
@pytest.mark.parametrize(("capture", "ragged"), [(run_again, False), (taped, True)], ids=["even", "ragged-taped"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", SERVED)
def test_a_replayed_step_chooses_what_a_growing_one_does(
    base: backbone.Backbone, method: str, beams: int, capture: Callable[[Step], Step], ragged: bool
) -> None:
    """Over batches of other prompts and other tenants, one after the other on one captured step."""
    bank, batch = make_bank(base, method), make_batch(beams, ragged=ragged)
    growing, captured = StaticArm(base, bank, "eager"), StaticArm(base, bank, "eager", capture)
    others = [
        batch,
        replace(batch, input_ids=batch.input_ids.flip(0) * batch.attention_mask, slots=(3, 1, -1, 0)),
        batch,
    ]
    decoder = None
    for other in others:
        expected = growing.generate(other)
        found = captured.generate(other, with_logits=True)
        assert torch.equal(found.tokens, expected.tokens)
        expected = growing.generate(other, forced=expected.tokens, with_logits=True)
        found = captured.generate(other, forced=expected.tokens, with_logits=True)
        assert found.logits is not None
        assert expected.logits is not None
        error = (found.logits - expected.logits).norm(dim=-1) / expected.logits.norm(dim=-1)
        assert float(error.max()) < 1e-5
        assert decoder in (None, captured.decoder), "the step was captured again"
        decoder = captured.decoder


@pytest.mark.parametrize("fault", ["length", "tenants"])
def test_what_the_host_bakes_in_is_seen(base: backbone.Backbone, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, batch = make_bank(base, "lora"), make_batch(1, ragged=False)
    growing, captured = StaticArm(base, bank, "eager"), StaticArm(base, bank, "eager", taped)
    captured.generate(batch)
    other = replace(batch, slots=(1, 3, 0, -1))
    expected = growing.generate(other).tokens
    assert torch.equal(captured.generate(other).tokens, expected)
    if fault == "length":
        monkeypatch.setattr(Decoder, "_fixed_view", Decoder._growing_view)
        captured.decoder = None
    else:
        assert captured.decoder is not None
        monkeypatch.setattr(captured.decoder.adapters, "take", lambda slots: None)
        other = batch
        expected = growing.generate(other).tokens
    assert not torch.equal(captured.generate(other).tokens, expected)


def test_an_interrupted_call_leaves_nothing_behind(base: backbone.Backbone) -> None:
    """A batch that stops half way (out of memory, Ctrl-C) does not shift the places of the next."""
    bank, batch = make_bank(base, "para"), make_batch(1, ragged=True)
    captured = StaticArm(base, bank, "eager", taped)
    expected = captured.generate(batch).tokens
    assert captured.decoder is not None
    with torch.inference_mode():
        captured.decoder.start(batch)
        captured.decoder.prefill()
        captured.decoder.step(torch.full((4,), 7))
    assert torch.equal(captured.generate(batch).tokens, expected)


@pytest.mark.interpreter
@pytest.mark.usefixtures("tail")
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("method", ["lora", "para"])
def test_triton_s_kernels_take_the_step_of_fixed_size(method: str, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not there for this platform")
    config = backbone_config.NAMED_CONFIGS["llama-tiny"] | {"num_hidden_layers": 1}
    monkeypatch.setitem(backbone_config.NAMED_CONFIGS, "of-a-test", config)
    base = backbone.load("of-a-test", "fp32", "cpu", seed=0)
    ids = torch.randint(3, 256, (2, 2), generator=torch.Generator().manual_seed(4))
    mask = torch.tensor([[1, 1], [0, 1]])
    batch, bank = Batch(ids * mask, mask, (2, -1), beams, new_tokens=3), make_bank(base, method)
    growing, captured = StaticArm(base, bank, "eager"), StaticArm(base, bank, "triton", run_again)
    for slots in ((2, -1), (0, 0)):
        other = replace(batch, slots=slots)
        assert torch.equal(captured.generate(other).tokens, growing.generate(other).tokens)
