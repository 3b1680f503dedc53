"""What the peak consists of: the KV cache and the adapters, byte for byte, on both runtimes and with PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perfbench.measure.on_device import arms, memory
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import MODULES
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.peft_arms import PeftMixedArm
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.transformers_plan import PlanArm
from perfbench.spec.cases import Case

TENANTS, PROMPT, NEW = 2, 5, 4


@pytest.fixture(scope="module")
def tiny() -> backbone.Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


def parts(tiny, scratch, runtime: str, method: str, beams: int) -> tuple[dict[str, Any], arms.BuiltArm]:
    ids = torch.arange(3, 3 + TENANTS * PROMPT).view(TENANTS, PROMPT)
    slots = (-1, -1) if method == "none" else (0, 1)
    batch = Batch(ids, torch.ones_like(ids), slots, beams, NEW)
    case = Case("c", method, method, METHODS[method].options(), runtime, "eager")
    built = arms.build(case, tiny, batch, TENANTS, 0, scratch)
    found = memory.peaks(built.arm, built.batch, memory.resident_bytes(built.arm), tiny.device, None)
    return found | {"adapter_bytes": memory.adapter_bytes(built.arm, tiny.bytes)}, built


@pytest.mark.parametrize("method", ["lora", "peft"])
def test_one_call_gives_every_figure(tiny, tmp_path, monkeypatch, method):
    kind = PlanArm if method == "lora" else PeftMixedArm
    calls = []
    generate = kind.generate
    monkeypatch.setattr(kind, "generate", lambda *own, **others: calls.append(1) or generate(*own, **others))
    found, built = parts(tiny, tmp_path, "transformers", method, 1)
    assert len(calls) == 1
    assert found["peak_allocated_bytes"] > memory.resident_bytes(built.arm) + found["kv_cache_bytes"]


def token_bytes(tiny: backbone.Backbone) -> int:
    """Keys and values of one token in fp32."""
    shape = tiny.shape
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * 4


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", ["none", "lora", "peft"])
def test_huggingface_caches_every_row_but_the_last_token(tiny, tmp_path, method, beams):
    found, _ = parts(tiny, tmp_path, "transformers", method, beams)
    assert found["kv_cache_bytes"] == TENANTS * beams * (PROMPT + NEW - 1) * token_bytes(tiny)


def test_static_keeps_a_prompt_once_for_all_its_beams(tiny, tmp_path):
    ancestors = {beams: TENANTS * beams * (NEW - 1) * 8 for beams in (1, 3)}
    one, _ = parts(tiny, tmp_path, "static", "none", 1)
    assert one["kv_cache_bytes"] == TENANTS * (PROMPT + NEW - 1) * token_bytes(tiny) + ancestors[1]
    three, _ = parts(tiny, tmp_path, "static", "none", 3)
    assert three["kv_cache_bytes"] == TENANTS * (PROMPT + 3 * (NEW - 1)) * token_bytes(tiny) + ancestors[3]


@pytest.mark.parametrize(
    ("runtime", "method"),
    [("transformers", "lora"), ("static", "ia3"), ("transformers", "peft"), ("static", "lora-merged")],
)
def test_adapters_are_those_of_all_residents(tiny, tmp_path, runtime, method):
    found, built = parts(tiny, tmp_path, runtime, method, 1)
    spare = (
        0 if method in ("peft", "lora-merged") else 1
    )  # the bank keeps one more slot, for requests without an adapter
    assert found["adapter_bytes"] == (TENANTS + spare) * built.adapters["bytes_per_tenant"] > 0


def test_what_all_tenants_share_is_held_once(tiny, tmp_path):
    """VeRA's two matrices, a copy of each for every size that a module takes of it."""
    found, built = parts(tiny, tmp_path, "static", "vera", 1)
    own = (TENANTS + 1) * built.adapters["bytes_per_tenant"]
    sizes = {side: {tiny.shape.features(module)[side] for module in MODULES} for side in (0, 1)}
    assert found["adapter_bytes"] == own + sum(map(sum, sizes.values())) * METHODS["vera"].options().rank * 4


def test_merged_weights_lie_beside_the_backbone_s_own(tiny, tmp_path):
    _, bare = parts(tiny, tmp_path, "static", "none", 1)
    _, merged = parts(tiny, tmp_path, "static", "lora-merged", 1)
    linears = sum(p.nbytes for name, p in tiny.model.named_parameters() if "proj" in name)
    more = memory.resident_bytes(merged.arm) - memory.resident_bytes(bare.arm)
    assert more == linears + TENANTS * merged.adapters["bytes_per_tenant"]


@pytest.mark.parametrize("runtime", ["transformers", "static"])
def test_the_bare_backbone_has_no_adapters(tiny, tmp_path, runtime):
    assert parts(tiny, tmp_path, runtime, "none", 1)[0]["adapter_bytes"] == 0


def test_beams_that_share_the_prompt_take_little_more_memory() -> None:
    """Beam 3 against greedy above the weights, with the papers' lengths; 3 times on runtime transformers, which copies
    the prompt for every beam: the same figure sees it."""
    base = backbone.load("llama-256x8", "fp32", "cpu", seed=0)
    ids = torch.randint(3, base.shape.vocab, (1, 274), generator=torch.Generator().manual_seed(7))

    def peak(arm: PlanArm | StaticArm, beams: int) -> int:
        return memory.peaks(arm, Batch(ids, torch.ones_like(ids), (-1,), beams, 32), 0, base.device, None)[
            "peak_allocated_bytes"
        ]

    ratios = []
    for kind in (StaticArm, PlanArm):
        one, three = (peak(kind(base, None, "eager"), beams) for beams in (1, 3))
        ratios.append(three / one)
    assert ratios[0] <= 1.35
    assert ratios[1] > 2
