"""How an arm is built: its random adapters are made once each, where the backbone is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from perfbench.measure.on_device import arms
from perfbench.methods import parameters
from perfbench.methods.bank import Bank
from perfbench.methods.mixed import MixedOptions
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import MODULES
from perfbench.proof import check
from perfbench.proof.best_choices import forced_logits
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.static.arm import StaticArm
from perfbench.spec.cases import Case

RESIDENT, SEED = 3, 5


@pytest.fixture(scope="module")
def base() -> backbone.Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


def build(base: backbone.Backbone, method: str, scratch: Path, **wanted: bool) -> arms.BuiltArm:
    ids = torch.arange(3, 11, device=base.device).view(2, 4)
    case = Case("c", method, method, METHODS[method].options(), "static", "eager")
    return arms.build(case, base, Batch(ids, torch.ones_like(ids), (0, 1), 1, 3), RESIDENT, SEED, scratch, **wanted)


@pytest.mark.parametrize("method", ["lora", "ia3", "para"])
def test_each_tenant_is_made_once_on_the_backbone_s_device(
    base: backbone.Backbone, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, Any]] = []
    own = parameters.make

    def noted(*args: Any, seed: int, device: Any, **others: Any) -> parameters.Parameters:
        made.append((seed, device))
        return own(*args, seed=seed, device=device, **others)

    monkeypatch.setattr(parameters, "make", noted)
    build(base, method, tmp_path)
    assert made == [(SEED * 1_000_003 + tenant, base.device) for tenant in range(RESIDENT)]


@pytest.mark.parametrize("method", ["lora", "para"])
def test_every_slot_holds_its_tenant_after_the_timed_admissions(
    base: backbone.Backbone, method: str, tmp_path: Path
) -> None:
    """Slot 0 is evicted and admitted again from the folder: it must be the same adapter."""
    built = build(base, method, tmp_path)
    assert isinstance(built.arm, StaticArm)
    assert built.plan_of is not None
    bank = built.arm.bank
    assert bank is not None
    assert built.sizes is not None
    alone = Bank(built.sizes[0], RESIDENT, base.dtype, base.device, base.linear)
    for tenant in range(RESIDENT):
        assert alone.admit(built.plan_of(tenant)) == tenant
    assert torch.equal(bank.shrinks, alone.shrinks)
    assert torch.equal(bank.rest, alone.rest)
    assert not torch.equal(bank.rest[0], bank.rest[1])


@pytest.mark.parametrize("method", ["para", "peft"])
def test_without_its_figures_the_arm_is_the_same_and_nothing_is_admitted_twice(
    base: backbone.Backbone, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(base, method, tmp_path / "whole")
    monkeypatch.setattr(arms, "_timed", None)
    lean = build(base, method, tmp_path / "lean", figures=False)
    assert lean.adapters == {}
    ids = torch.arange(3, 11).view(2, 4)
    logits = [
        forced_logits(built.arm, Batch(ids, torch.ones_like(ids), (0, 1), 1, 3), ids[:, :3]) for built in (whole, lean)
    ]
    assert torch.equal(*logits)


def save_lora(base: backbone.Backbone, folder: Path, rank: int, modules: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A LoRA checkpoint of made-up numbers as PEFT has it; its tensors."""
    method, options = parameters.implementation("lora"), METHODS["lora"].options(rank=rank, modules=modules)
    values = parameters.make("lora", base.shape, options, seed=1)
    method.save(values, base.shape, options, folder, base.name)
    return values


@pytest.mark.parametrize(("method", "runtime"), [("lora", "static"), ("peft", "transformers")])
def test_the_figures_of_a_tenant_are_its_own_where_tenants_differ(
    base: backbone.Backbone, method: str, runtime: str, tmp_path: Path
) -> None:
    """Of four folders the parameters were the first one's on one runtime and the union's on the other, and each was
    charged the bytes of the union."""
    sizes = [(1, ("q",)), (16, ("q", "k", "v", "up")), (2, ("gate", "down"))]
    counts = []
    for number, (rank, modules) in enumerate(sizes):
        values = save_lora(base, tmp_path / "tenants" / f"t{number}", rank, modules)
        counts.append(sum(tensor.numel() for tensor in values.values()))
    options = METHODS[method].options(adapters=str(tmp_path / "tenants"))
    ids = torch.arange(3, 11, device=base.device).view(2, 4)
    case = Case("c", method, method, options, runtime, "eager")
    built = arms.build(case, base, Batch(ids, torch.ones_like(ids), (0, 1), 1, 3), 3, SEED, tmp_path / "scratch")
    figures = built.adapters
    assert figures["parameters_per_tenant"] == pytest.approx(sum(counts) / 3)
    assert figures["bytes_per_tenant"] == pytest.approx(4 * sum(counts) / 3)
    spread = {"least": min(counts), "median": sorted(counts)[1], "most": max(counts)}
    assert figures["of_tenants"] == {"parameters": spread, "bytes": {key: 4 * n for key, n in spread.items()}}
    if method == "lora":
        assert isinstance(built.arm, StaticArm)
        assert built.arm.bank is not None
        assert figures["resident_bytes_per_tenant"] == built.arm.bank.bytes_per_slot > 4 * max(counts)
    else:
        assert figures["resident_bytes_per_tenant"] > figures["bytes_per_tenant"]


def test_tenants_of_a_mixed_arm_have_the_methods_in_turn(base: backbone.Backbone, tmp_path: Path) -> None:
    """Each the very adapter that it would have in an arm of its own method; what it takes is its own, and not the
    room that the bank has for the largest."""
    case = Case("c", "mixed", "mixed", MixedOptions(of=("para", "lora")), "static", "eager")
    ids = torch.arange(3, 15).view(3, 4)
    batch = Batch(ids, torch.ones_like(ids), (0, 1, 2), 1, 3)
    built = arms.build(case, base, batch, RESIDENT, SEED, tmp_path)
    assert built.plan_of is not None
    assert built.sizes is not None
    plan_of = {method: build(base, method, tmp_path / method).plan_of for method in ("para", "lora")}
    for tenant, method in enumerate(("para", "lora", "para")):
        alone = plan_of[method]
        assert alone is not None
        own, expected = (
            [t for layer in plan for t in layer.tensors()] for plan in (built.plan_of(tenant), alone(tenant))
        )
        assert all(map(torch.equal, own, expected))
        assert [t.shape for layer in built.sizes[tenant] for t in layer.tensors()] == [t.shape for t in expected]
    counts = [parameters.parameter_count(m, base.shape, METHODS[m].options()) for m in ("para", "lora", "para")]
    assert built.adapters["parameters_per_tenant"] == pytest.approx(sum(counts) / 3)
    assert built.adapters["of_tenants"]["parameters"] == {
        "least": min(counts), "median": counts[0], "most": max(counts)
    }  # fmt: skip
    found = check.check(built.arm, batch, RESIDENT, base, SEED, built.plan_of)
    assert (found.status, found.reason) == ("ok", None)
    swapped = check.check(built.arm, batch, RESIDENT, base, SEED, lambda slot: built.plan_of((slot + 1) % RESIDENT))
    assert swapped.status == "check_failed", "another tenant's adapter of another method"


def test_where_tenants_are_alike_there_is_one_figure(base: backbone.Backbone, tmp_path: Path) -> None:
    figures = build(base, "lora", tmp_path).adapters
    assert figures["of_tenants"] is None
    assert figures["bytes_per_tenant"] == figures["resident_bytes_per_tenant"] == 4 * figures["parameters_per_tenant"]


# In a fresh process, since one that has freed much takes nothing new from the system. Argument: a folder with one
# adapter in a sub-folder. Prints the two figures of an adapter, and what forty more of it took of the process each.
FORTY_MORE = """
import gc, json, sys
from pathlib import Path
import psutil, torch
from perfbench.measure.on_device import arms
from perfbench.methods.registry import METHODS
from perfbench.runtimes import backbone, peft_arms
from perfbench.runtimes.generation import Batch
from perfbench.spec.cases import Case

tenants, base = Path(sys.argv[1]), backbone.load("llama-tiny", "fp32", "cpu", seed=0)
ids = torch.arange(3, 11).view(2, 4)
options = METHODS["peft-single"].options(adapters=str(tenants))
case = Case("c", "peft-single", "peft-single", options, "transformers", "eager")
built = arms.build(case, base, Batch(ids, torch.ones_like(ids), (0, 0), 1, 3), 1, 5, tenants / "scratch")
(folder,) = [path for path in tenants.iterdir() if (path / "adapter_config.json").exists()]
gc.collect()
before = psutil.Process().memory_info().rss
for number in range(40):
    peft_arms.admit(built.arm.model, folder, f"more{number}", base.dtype, base.device)
gc.collect()
each = (psutil.Process().memory_info().rss - before) / 40
print(json.dumps([built.adapters["bytes_per_tenant"], built.adapters["resident_bytes_per_tenant"], each]))
"""


def test_one_more_of_peft_s_takes_what_the_process_takes(base: backbone.Backbone, tmp_path: Path) -> None:
    """Its modules were not counted, 505 of 1,115 KiB each; held against forty more in a row."""
    save_lora(base, tmp_path / "t0", 4, MODULES)
    done = subprocess.run([sys.executable, "-c", FORTY_MORE, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    own, found, each = json.loads(done.stdout.splitlines()[-1])
    assert 2 * own < found
    assert each / 2 < found < each * 2


@pytest.mark.gpu
def test_a_gpu_s_backbone_gets_adapters_made_there(tmp_path: Path) -> None:
    on_gpu = backbone.load("llama-tiny", "bf16", "cuda", seed=0)
    built = build(on_gpu, "lora", tmp_path)
    assert built.plan_of is not None
    assert {t.device.type for layer in built.plan_of(0) for t in layer.tensors()} == {"cuda"}
