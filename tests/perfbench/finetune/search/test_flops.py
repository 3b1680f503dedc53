"""The bound of the speed-up, against torch's own count of what both evaluations compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from perfbench.finetune.search import flops, gates
from perfbench.finetune.search.evaluate import Batch, ablations, naive_ablations
from perfbench.methods.shape import BackboneShape
from perfbench.spec.backbone_config import NAMED_CONFIGS
from tests.perfbench.finetune.search.conftest import TINY, load_bare

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attention_flops(query, key, value, *rest, out_shape=None, **options) -> int:
    """Two products for each pair of a token and one that it sees; torch has no count for attention on a CPU."""
    rows, heads, tokens, head_dim = query
    return 2 * 2 * rows * heads * head_dim * tokens * (tokens + 1) // 2


def addmm_flops(y, a, b, **options) -> int:
    """torch counts a product that is added to a tensor, but not one that is added in place."""
    return 2 * a[0] * a[1] * b[1]


def counted(work) -> float:
    """FLOPs of all products as torch counts them."""
    own = {ATTENTION: attention_flops, torch.ops.aten.addmm_: addmm_flops}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        work()
    assert set(own) <= set(counter.get_flop_counts()["Global"])
    return counter.get_total_flops()


TOKENS, ANSWERS = 8, 3


def test_both_evaluations_compute_what_is_counted_for_them(made):
    gated, rank = gates.load(load_bare(made()[0], torch.float32), made()[1])
    ids = torch.arange(2 * TOKENS).view(2, TOKENS) % TINY["vocab_size"]
    labels = ids.clone()
    labels[:, : TOKENS - ANSWERS] = -100
    batch = Batch(ids, labels)
    work = flops.work(gated.shape, rank, TOKENS, ANSWERS)
    assert counted(lambda: naive_ablations(gated, batch)) == pytest.approx(2 * work.naive, rel=1e-9)
    assert counted(lambda: ablations(gated, batch, 10**9)) == pytest.approx(2 * work.shared, rel=1e-9)


def test_the_bound_of_the_paper_sized_shape():
    """768 x 12: about 1.6 with a head of 32k words on every token, near 2 without it."""
    shape = replace(BackboneShape.of_config(NAMED_CONFIGS["llama-110m"]), vocab=32000)
    assert flops.work(shape, 12, 128, 128).bound == pytest.approx(1.63, abs=0.005)
    assert flops.work(shape, 12, 128, 0).bound == pytest.approx(1.98, abs=0.005)


def test_sharing_never_costs():
    for name, config in NAMED_CONFIGS.items():
        work = flops.work(BackboneShape.of_config(config), 12, 64, 16)
        assert 1 < work.bound < 3, name
