"""One KV cache serves all arms over a backbone: they take turns in it, and nothing of one reaches another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from perfbench.measure.on_device import memory
from perfbench.proof.check import forced_logits
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.static.cache import CacheSize, KVCache
from perfbench.runtimes.static.weights import Weights
from perfbench.verify.on_device.runtimes import make_bank
from tests.perfbench.runtimes.tape import taped

METHODS = ("none", "lora", "fanlora", "ia3", "para")
CAPTURES = pytest.mark.parametrize("capture", [None, lambda step: step, taped], ids=["growing", "fixed", "taped"])
BEAMS = pytest.mark.parametrize("beams", [1, 3])


@pytest.fixture
def base() -> backbone.Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


def make_batch(beams: int = 1) -> Batch:
    """Four padded requests of 9 tokens at most, 7 new ones: tenants 2, 0, none, 3."""
    ids = torch.randint(3, 256, (4, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :8] = mask[3, :2] = 0
    return Batch(ids * mask, mask, (2, 0, -1, 3), beams, new_tokens=7)


def make_arms(base: backbone.Backbone, batch: Batch, capture: Any = None) -> list[StaticArm]:
    """One of each method, with room for the batch, as a comparison builds them before the first turn."""
    arms = [StaticArm(base, make_bank(base, method), "eager", capture) for method in METHODS]
    for arm in arms:
        arm.reserve(batch)
    return arms


def cache_of(arm: StaticArm) -> KVCache:
    assert arm.decoder is not None
    return arm.decoder.cache


def held_bytes(caches: list[KVCache]) -> int:
    """Bytes of all that the caches hold; what lies in one place counts once."""
    tensors = [t.untyped_storage() for cache in caches for t in cache.tensors()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in tensors}.values())


def fill_with_nan(cache: KVCache) -> None:
    with torch.inference_mode():
        for tensor in (*cache.prompt, *cache.generated):
            tensor.fill_(float("nan"))


def make_private(weights: Weights, size: CacheSize) -> KVCache:
    """The fault that this file is about: a cache for each who asks."""
    return KVCache(size, weights.shape, weights.dtype, weights.device)


@pytest.mark.parametrize("private", [False, True], ids=["shared", "private-planted"])
@BEAMS
def test_five_arms_hold_one_cache(
    base: backbone.Backbone, beams: int, private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if private:
        monkeypatch.setattr(Weights, "cache", make_private)
    batch = make_batch(beams)
    arms = make_arms(base, batch)
    for arm in arms:
        arm.generate(batch)
    alone = held_bytes([cache_of(arms[0])])
    assert alone > 0
    assert held_bytes([cache_of(arm) for arm in arms]) == (len(arms) * alone if private else alone)


@CAPTURES
@BEAMS
def test_arms_in_turn_say_what_each_says_alone(base: backbone.Backbone, beams: int, capture: Any) -> None:
    """Each arm's second turn is after all others have been in the cache, and finds its own step as it captured it."""
    batch = make_batch(beams)
    alone = []
    for method in METHODS:
        arm = StaticArm(base, make_bank(base, method), "eager", capture)
        alone.append(arm.generate(batch).tokens)
        arm.close()
    arms = make_arms(base, batch, capture)
    decoders = []
    for _ in range(2):
        for arm, expected in zip(arms, alone, strict=True):
            assert torch.equal(arm.generate(batch).tokens, expected)
        decoders.append([arm.decoder for arm in arms])
    assert decoders[0] == decoders[1], "a captured step goes on in the same cache"
    logits = [forced_logits(arm, batch, alone[0]) for arm in arms]
    for i, found in enumerate(logits):
        assert not any(torch.equal(found, other) for other in logits[:i]), "the arms should differ"


@CAPTURES
@BEAMS
def test_what_another_arm_leaves_reaches_nobody(base: backbone.Backbone, beams: int, capture: Any) -> None:
    """NaN in every place before each turn, as an arm that overflows may leave it, changes no token and no logit."""
    batch = make_batch(beams)
    arms = make_arms(base, batch, capture)
    before = [arm.generate(batch).tokens for arm in arms]
    logits = [forced_logits(arm, batch, tokens) for arm, tokens in zip(arms, before, strict=True)]
    for arm, tokens, expected in zip(arms, before, logits, strict=True):
        fill_with_nan(cache_of(arm))
        assert torch.equal(arm.generate(batch).tokens, tokens)
        fill_with_nan(cache_of(arm))
        assert torch.equal(forced_logits(arm, batch, tokens), expected)


@BEAMS
def test_a_step_of_fixed_size_without_clearing_is_seen(
    base: backbone.Backbone, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, own = make_batch(beams), KVCache.begin
    monkeypatch.setattr(KVCache, "begin", lambda self, clear: own(self, clear=False))
    arm = StaticArm(base, None, "eager", lambda step: step)
    arm.generate(batch)
    fill_with_nan(cache_of(arm))
    assert forced_logits(arm, batch, torch.full((4, 7), 5))[:, 1:].isnan().any()


def test_only_a_step_of_fixed_size_needs_clearing(base: backbone.Backbone) -> None:
    """By what lies after the last place that was written, the last token being chosen and never read."""
    batch = replace(make_batch(), follow_up=torch.full((4, 3), 5))
    for capture, cleared in ((None, False), (lambda step: step, True)):
        arm = StaticArm(base, None, "eager", capture)
        arm.generate(batch)
        fill_with_nan(cache_of(arm))
        arm.generate(batch)
        after = cache_of(arm).prompt[0][:, :, :, 9 + 6 :]
        assert after.isnan().all() == (not cleared)
        assert (after == 0).all() == cleared
        arm.close()


@CAPTURES
def test_a_second_turn_reads_the_first_and_nobody_else_s(base: backbone.Backbone, capture: Any) -> None:
    batch = replace(make_batch(), follow_up=torch.randint(3, 256, (4, 3), generator=torch.Generator().manual_seed(6)))
    one, other = make_arms(base, batch, capture)[:2]
    first = one.generate(batch).tokens
    expected = one.follow_up(first).tokens
    fill_with_nan(cache_of(one))
    other.follow_up(other.generate(batch).tokens)
    with pytest.raises(RuntimeError, match="another arm has used the cache since the first turn"):
        one.follow_up(first)
    assert torch.equal(one.follow_up(one.generate(batch).tokens).tokens, expected)


@CAPTURES
def test_the_cache_goes_with_the_last_who_holds_it(base: backbone.Backbone, capture: Any) -> None:
    batch = make_batch()
    arms = make_arms(base, batch, capture)[:2]
    for arm in arms:
        arm.generate(batch)
    weights, first = arms[0].weights, cache_of(arms[0])
    size, place = first.size, first.prompt[0].data_ptr()
    del first
    arms[0].close()
    assert weights.cache(size).prompt[0].data_ptr() == place, "the other arm still holds it"
    arms[1].generate(batch.alone(0))
    assert list(weights._caches) == [cache_of(arms[1]).size], "nothing is kept for a size that nobody uses"
    arms[1].close()
    assert not weights._caches


def test_memory_counts_the_cache_with_each_arm(base: backbone.Backbone) -> None:
    """What an arm needs is the same whether or not others share the cache."""
    batch = make_batch()

    def needs(arm: StaticArm) -> tuple[int, int, int]:
        cache = memory.peaks(arm, batch, memory.resident_bytes(arm), base.device, None)["kv_cache_bytes"]
        return memory.adapter_bytes(arm, base.bytes), cache, memory.resident_bytes(arm)

    alone = []
    for method in METHODS:
        arm = StaticArm(base, make_bank(base, method), "eager")
        alone.append(needs(arm))
        arm.close()
    arms = make_arms(base, batch)
    for arm in arms:
        arm.generate(batch)
    assert [needs(arm) for arm in arms] == alone
    assert all(cache == held_bytes([cache_of(arms[0])]) for _, cache, _ in alone)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["eager", "triton"])
@BEAMS
def test_captured_graphs_take_turns_in_one_cache(beams: int, kernels: str) -> None:
    """Each replay finds the cache where it was captured, whatever other arms, gone ones too, have done to it."""
    base, on_cpu = backbone.load("llama-tiny", "fp32", "cuda", seed=0), make_batch(beams)
    batch = replace(on_cpu, input_ids=on_cpu.input_ids.cuda(), attention_mask=on_cpu.attention_mask.cuda())
    alone = []
    for method in METHODS:
        arm = StaticArm(base, make_bank(base, method), kernels)
        alone.append(arm.generate(batch).tokens)
        arm.close()
    arms = [StaticArm(base, make_bank(base, method), kernels) for method in METHODS]
    for arm in arms:
        arm.reserve(batch)
    for _ in range(3):
        for arm, expected in zip(arms, alone, strict=True):
            if arm.decoder is not None:
                fill_with_nan(cache_of(arm))
            assert torch.equal(arm.generate(batch).tokens, expected)
    shared = cache_of(arms[0])
    assert held_bytes([cache_of(arm) for arm in arms]) == held_bytes([shared])
    arms[0].close()  # the first graph goes, and the others go on in the cache that it used first
    for arm, expected in zip(arms[1:], alone[1:], strict=True):
        assert torch.equal(arm.generate(batch).tokens, expected)
        assert cache_of(arm) is shared
