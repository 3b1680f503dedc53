"""Packed weights: the product that they give, against fp64; that they are held once; what a fault would look like."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch

from perfbench.errors import AdapterError
from perfbench.kernels.placement import standing_in
from perfbench.runtimes import backbone, packed_linear
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.packed_linear import PackedLinear, onednn_has, overwrite, pack, packed_form
from perfbench.runtimes.shared_weights import unchanged
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.static.product import product
from perfbench.runtimes.static.weights import fuse

DTYPES = [
    dtype for dtype in (torch.float32, torch.bfloat16) if onednn_has(torch.empty(0, dtype=dtype))
]  # of this processor
pytestmark = pytest.mark.skipif(not DTYPES, reason="needs oneDNN")


def random(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, found: torch.Tensor) -> float:
    """The difference from fp64, as a part of what the sums of absolute values allow one rounding to be."""
    wide = x.double(), weight.double(), 0.0 if bias is None else bias.double()
    expected = wide[0] @ wide[1].T + wide[2]
    size = wide[0].abs() @ wide[1].abs().T + abs(wide[2])
    # The result is rounded once; sums are in fp32, of as many terms as x is wide.
    allowed = torch.finfo(found.dtype).eps * expected.abs() + torch.finfo(torch.float32).eps * x.shape[1] * size
    return float(((found.double() - expected).abs() / allowed).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (51, 7), (1, 33), (192, 65)])
def test_a_product_is_right_by_every_way(size: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    """Also at sizes that oneDNN pads, which runtime static leaves as they are."""
    weight = random(*size, dtype=dtype)
    b = random(size[0], seed=1, dtype=dtype) if bias else None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    for rows in range(1, 34):
        x = random(rows, size[1], seed=rows, dtype=dtype)
        for way in (packed, weight):
            found = product(x, way, b)
            assert found.dtype == dtype
            assert found.is_contiguous()
            assert error(x, weight, b, found) <= 1
        short = x.clone()
        short[:, -1] = 0
        assert error(x, weight, b, product(short, packed, b)) > 1, "one lost term is not seen"


def test_what_would_take_more_bytes_stays_as_it_is() -> None:
    assert packed_form(torch.zeros(33, 64)) is None
    assert packed_form(torch.zeros(64, 64, dtype=torch.float16)) is None
    assert packed_form(torch.zeros(64, 64)) is not None
    with standing_in():
        assert packed_form(torch.zeros(64, 64)) is None, "a GPU's weights stay"


def small(dtype: str = "fp32") -> Backbone:
    return backbone.load("llama-tiny", dtype, "cpu", seed=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_originals_go(dtype: str) -> None:
    if backbone.DTYPES[dtype] not in DTYPES:
        pytest.skip("not on this processor")
    base = small(dtype)
    attention = base.model.model.layers[0].self_attn
    original = attention.q_proj.weight
    before, gone, held, count = original.clone(), weakref.ref(original), base.bytes, base.parameters
    del original
    weights = fuse(base)
    assert weights.layers[0].projections["qkv"].packed
    assert weights.head.is_mkldnn
    assert gone() is None
    assert isinstance(attention.q_proj, PackedLinear)
    assert torch.equal(attention.q_proj.weight, before)
    assert (base.bytes, base.parameters) == (held, count)


def test_other_runtimes_read_one_copy_in_the_usual_order() -> None:
    base = small()
    ids = torch.arange(3, 12).unsqueeze(0)
    with torch.inference_mode():
        expected = base.model(ids).logits
    arm = StaticArm(base, None, "eager")
    first, second = base.skeleton(), base.skeleton()
    for path, module in first.named_modules():
        assert not isinstance(module, PackedLinear), path
    mine, other = (model.model.layers[1].self_attn.v_proj for model in (first, second))
    assert mine.weight is other.weight
    assert isinstance(base.model.model.layers[1].self_attn.v_proj, PackedLinear)
    apart = copy.deepcopy(base.model).model.layers[1].self_attn.v_proj
    assert apart.weight.data_ptr() != mine.weight.data_ptr()
    with torch.inference_mode():
        assert torch.equal(first(ids).logits, expected)
    assert backbone.tensor_bytes(first) == base.bytes
    arm.close()
    base.skeleton()
    assert base.fused is None, "no arm of runtime static is left"
    assert base.model.model.layers[1].self_attn.v_proj.weight is mine.weight


def test_what_is_written_is_read() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 128)).requires_grad_(False)
    packed = pack(model, ["0", "1"])
    assert packed is not None
    assert pack(model, ["0", "1"]) is packed
    written = [random(64, 64, seed=1), random(128, 64, seed=2)]
    with torch.inference_mode():
        overwrite(list(model), written)
        x = random(3, 64, seed=3)
        assert error(x, torch.cat(written), None, product(x, packed)) <= 1
    assert torch.equal(model[1].weight, written[1])


@pytest.mark.parametrize("static", [False, True], ids=["alone", "beside-static"])
def test_a_write_into_what_others_share_is_seen(static: bool) -> None:
    """As PEFT's PiSSA does it, into a skeleton's weight; with an arm of runtime static, or when the last one has gone
    and the weights are put back in the meantime."""
    base = small()
    arm = StaticArm(base, None, "eager")
    if not static:
        arm.close()
    with unchanged(base, "nobody"):
        base.skeleton()

    def write() -> None:
        with unchanged(base, "somebody"):
            model = base.skeleton()
            model.model.layers[0].self_attn.k_proj.weight[3, 5] += 1

    with pytest.raises(AdapterError, match=r"it changed model\.layers\.0\.self_attn\.k_proj\.weight; remove"):
        write()


@pytest.mark.parametrize("fault", ["first", "order"])
def test_rows_in_a_wrong_place_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """K in the place of Q: the modules no longer say what they said."""
    base = small()
    attention = base.model.model.layers[0].self_attn
    before = attention.k_proj.weight.clone()
    made = packed_linear.packed_form
    if fault == "order":
        monkeypatch.setattr(packed_linear, "packed_form", lambda weight: made(weight.flip(0)))
    else:
        monkeypatch.setattr(PackedLinear, "weight", property(lambda self: self.packed.to_dense()[: self.out_features]))
    fuse(base)
    assert not torch.equal(attention.k_proj.weight, before)
