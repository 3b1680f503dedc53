"""`perfbench accuracy` as a whole: what a sound run says, faults planted in the real path, resumption, bad input."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from perfbench.cli import main
from perfbench.finetune import recipe
from perfbench.finetune.accuracy import accuracy_config, accuracy_folder, accuracy_run, evaluate, serve
from perfbench.finetune.accuracy.accuracy_folder import AccuracyFolder
from perfbench.finetune.accuracy.serve import Tenant
from perfbench.finetune.accuracy.verdict import Verdict
from perfbench.methods.bank import Bank
from tests.perfbench.finetune.accuracy.conftest import QUIET
from tests.perfbench.finetune.made_up import byte_tokenizer

METHODS = ("lora", "fanlora", "ia3", "para")
PATHS = ("transformers-eager-fp32", "static-eager-fp32", "transformers-eager-bf16", "static-eager-bf16")

Finished = tuple[Path, Path, Verdict]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_all_methods_and_seeds_are_asked_everything_on_every_path(finished: Finished) -> None:
    _, out, verdict = finished
    items = AccuracyFolder.open(out).items()
    counted = Counter((item["path"], item["split"], item["method"], item["seed"]) for item in items)
    assert counted == {
        (path, split, method, seed): count
        for method in METHODS
        for seed in (0, 1)
        for path, split, count in [
            ("as-trained-fp32", "dev", 8),
            ("as-trained-fp32", "test", 6),
            *((path, "test", 6) for path in PATHS),
        ]
    } | {("as-trained-fp32", split, "zero-shot", 0): count for split, count in [("dev", 8), ("test", 6)]}
    assert {(row.path, row.method) for row in verdict.paths} == {(p, m) for p in PATHS for m in METHODS}


def test_what_is_served_is_what_was_trained(finished: Finished) -> None:
    verdict = finished[2]
    exact = [row for row in verdict.paths if row.path.endswith("fp32")]
    assert all(row.exact and row.changed == 0 and row.verdict == "pass" for row in exact), exact
    assert {row.answers for row in exact} == {12}
    assert all(row.identity["status"] == "ok" and row.identity["relative_difference"] < 1e-4 for row in exact)
    rounded = [row for row in verdict.paths if row.path.endswith("bf16")]
    assert all(not row.exact and row.identity["status"] == "ok" for row in rounded), rounded
    assert {row.verdict for row in verdict.methods if row.method != "lora"} == {"inconclusive"}, "two seeds say nothing"
    assert verdict.exit_code == 3


def test_tenants_of_all_methods_shared_one_batch(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    batches: list[tuple[int, ...]] = []
    take = Bank.rows

    def noted(self: Bank, slots: Any) -> torch.Tensor:
        batches.append(tuple(slots))
        return take(self, slots)

    monkeypatch.setattr(Bank, "rows", noted)
    assert served_again(finished, tmp_path, PATHS[:1]).exit_code == 3
    assert all(slot < 8 for slots in batches for slot in slots), "eight tenants of four methods lie in one bank"
    mixed = [slots for slots in batches if len({slot // 2 for slot in slots}) >= 3]
    assert len(mixed) > len(batches) / 2, "batches of five requests have tenants of several methods"


def test_what_lora_s_kin_have_learned_is_served_as_trained(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """In one bank pairs of uneven ranks, with a bias, and pairs that act from the last sign of a sum on."""
    methods = [
        {"lora": {"lora_bias": True}},
        {"adalora": {"initial_rank": 4, "rank": 2}},
        {"alora": {"invocation": byte_tokenizer().encode("+", add_special_tokens=False)}},
    ]
    path = write_config(tmp_path, methods=methods, seeds=[0], epochs=2)
    _, verdict = accuracy_run.execute(accuracy_config.load(path), tmp_path / "run", resume=False, console=QUIET)
    assert {(row.method, row.path) for row in verdict.paths} >= set(product(("lora", "adalora", "alora"), PATHS))
    assert all(row.verdict == "pass" and row.identity["status"] == "ok" for row in verdict.paths), verdict.paths
    bank = read_adapters(tmp_path / "run")["sums"]["adalora"]["0"]
    assert bank["bytes_per_tenant_16_bit"] < 2 * bank["trainable_parameters"], "E is folded, and pruned ranks are gone"


def read_adapters(run: Path) -> Any:
    return json.loads((run / accuracy_folder.MANIFEST).read_text())["adapters"]


def served_again(finished: Finished, tmp_path: Path, paths: tuple[str, ...]) -> Verdict:
    """The verdict once `paths` are served again, by what is patched by then; all else is as it was."""
    path, out, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    manifest = json.loads((copy / accuracy_folder.MANIFEST).read_text())
    for name in paths:
        del manifest["paths"]["sums"][name]
    (copy / accuracy_folder.MANIFEST).write_text(json.dumps(manifest))
    return accuracy_run.execute(accuracy_config.load(path), copy, resume=True, console=QUIET)[1]


def shift_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Bank.rows
    monkeypatch.setattr(Bank, "rows", lambda self, slots: rows(self, [(s + 1) % self.capacity for s in slots]))


def serve_the_other_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tenant's folder is read for another's of the same method: on a score it might never show."""
    read = evaluate.with_plan

    def wrong(tenant: Any, shape: Any) -> Any:
        found = read(tenant, shape)
        if (tenant.label, tenant.seed) != ("para", 0):
            return found
        return Tenant(tenant.label, tenant.method, 0, tenant.folder, read(OTHER_SEED(tenant), shape).plan)

    monkeypatch.setattr(evaluate, "with_plan", wrong)


def OTHER_SEED(tenant: Any) -> Any:
    folder = tenant.folder.parent.parent / "seed1" / tenant.folder.name
    return Tenant(tenant.label, tenant.method, 1, folder)


def drop_a_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = evaluate.serve

    def dropped(*args: Any) -> Any:
        arm, slots = serve(*args)
        arm.bank.evict(slots[2])
        return arm, slots

    monkeypatch.setattr(evaluate, "serve", dropped)


FAULTS = {"shifted": shift_slots, "other-seed": serve_the_other_seed, "dropped": drop_a_tenant}
SAID = {
    "shifted": r"lora seed 0 is served as lora seed 1",
    "other-seed": r"para seed 0 is served as para seed 1",
    "dropped": r"fanlora seed 0 is served as none",
}


@pytest.mark.parametrize(
    ("fault", "path"),
    [
        ("shifted", "static-eager-fp32"),
        ("shifted", "transformers-eager-bf16"),
        ("other-seed", "static-eager-bf16"),
        ("dropped", "transformers-eager-fp32"),
    ],
)
def test_a_planted_fault_is_seen(
    finished: Finished, fault: str, path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    FAULTS[fault](monkeypatch)
    verdict = served_again(finished, tmp_path, (path,))
    assert verdict.exit_code == 1
    wrong = [row for row in verdict.paths if row.verdict == "differs"]
    assert {row.path for row in wrong} == {path}, "the other paths were served soundly"
    assert SAID[fault] in [row.reason for row in wrong]


def test_a_wrong_prediction_in_fp32_is_seen_without_logits(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The probes are sound and the batches that follow them are not."""
    answer = serve.answer
    monkeypatch.setattr(serve, "answer", lambda *args: ["?", *answer(*args)[1:]])
    verdict = served_again(finished, tmp_path, ("static-eager-fp32",))
    assert verdict.exit_code == 1
    assert any("predictions are not those of the trained model" in row.reason for row in verdict.paths)


def test_an_interrupted_run_goes_on_where_it_stopped(
    write_config: Callable[..., Path], finished: Finished, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    path, out = finished[0], tmp_path / "run"
    shutil.copytree(finished[1], out)
    manifest = json.loads((out / accuracy_folder.MANIFEST).read_text())
    for name in PATHS[1:]:
        del manifest["paths"]["sums"][name]  # as if killed after the first: lines of the next are there
    manifest["verdict"] = manifest["finished_at"] = None
    (out / accuracy_folder.MANIFEST).write_text(json.dumps(manifest))
    with (out / accuracy_folder.ITEMS).open("a") as file:
        file.write('{"task": "su')
    serve, served, trained = evaluate.serve, [], []
    monkeypatch.setattr(evaluate, "serve", lambda path, *rest: served.append(path.id) or serve(path, *rest))
    monkeypatch.setattr(recipe.AdapterTrainer, "train", lambda *args, **kwargs: trained.append(1))
    assert main(["accuracy", str(path), "--out", str(out), "--resume"]) == 3
    assert (served, trained) == (list(PATHS[1:]), [])
    again = json.loads((out / accuracy_folder.MANIFEST).read_text())
    whole = json.loads((finished[1] / accuracy_folder.MANIFEST).read_text())
    assert again["verdict"] == whole["verdict"]
    assert again["paths"] == whole["paths"]
    printed = capsys.readouterr().out
    assert "INCONCLUSIVE. Nothing is shown to be worse" in printed


def test_ctrl_c_says_how_to_go_on(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(accuracy_run, "train", stop)
    out = tmp_path / "run"
    assert main(["accuracy", str(finished[0]), "--out", str(out)]) == 130
    assert f"interrupted; go on with: perfbench accuracy {finished[0]} --out {out} --resume" in capsys.readouterr().err


def copied(finished: Finished, tmp_path: Path) -> tuple[Path, Path]:
    out = tmp_path / "run"
    shutil.copytree(finished[1], out)
    return finished[0], out


def refused(arguments: list[str], capsys: Any) -> str:
    """What a command that is refused says: one line, exit code 2."""
    assert main(["accuracy", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("perfbench: "), error
    return error[-1]


def test_a_missing_adapter_is_one_line(finished: Finished, tmp_path: Path, capsys: Any) -> None:
    path, out = copied(finished, tmp_path)
    shutil.rmtree(out / "sums" / "para" / "seed1" / "adapter")
    assert "seed1/adapter" in refused([str(path), "--out", str(out), "--resume"], capsys)


def test_an_adapter_of_another_backbone_is_one_line(finished: Finished, tmp_path: Path, capsys: Any) -> None:
    path, out = copied(finished, tmp_path)
    from perfbench.methods import parameters
    from perfbench.methods.lora import LoraOptions
    from perfbench.methods.shape import BackboneShape
    from perfbench.spec.backbone_config import NAMED_CONFIGS

    other = BackboneShape.of_config(NAMED_CONFIGS["llama-tiny"])
    values = parameters.make("lora", other, LoraOptions(), seed=0)
    place = out / "sums" / "lora" / "seed0" / "adapter"
    parameters.implementation("lora").save(values, other, LoraOptions(), place, "another")
    manifest = json.loads((out / accuracy_folder.MANIFEST).read_text())
    manifest["paths"] = {}
    (out / accuracy_folder.MANIFEST).write_text(json.dumps(manifest))
    assert "another backbone" in refused([str(path), "--out", str(out), "--resume"], capsys)


def test_an_adapter_that_was_changed_after_it_was_judged_is_refused(
    finished: Finished, tmp_path: Path, capsys: Any
) -> None:
    path, out = copied(finished, tmp_path)
    seeds = out / "sums" / "lora"
    shutil.copytree(seeds / "seed1" / "adapter", seeds / "seed0" / "adapter", dirs_exist_ok=True)
    said = refused([str(path), "--out", str(out), "--resume"], capsys)
    assert "the adapter of seed 0 is not the one that was judged here" in said


def test_another_run_s_folder_is_refused(finished: Finished, tmp_path: Path, capsys: Any) -> None:
    path, out = finished[0], finished[1]
    said = refused([str(path), "--out", str(out)], capsys)
    assert "expected a new or empty folder" in said
    said = refused([str(path), "--out", str(out), "--resume", "--set", "margin=0.1"], capsys)
    assert "holds a run with margin 0.5, not 0.1" in said
    assert "no such folder" in refused([str(path), "--out", str(tmp_path / "no"), "--resume"], capsys)
    (tmp_path / "empty").mkdir()
    assert "not an accuracy run" in refused([str(path), "--out", str(tmp_path / "empty"), "--resume"], capsys)
    assert "--resume: say with --out" in refused([str(path), "--resume"], capsys)


def test_a_run_without_the_methods_is_refused_before_anything(finished: Finished, tmp_path: Path, capsys: Any) -> None:
    run = Path(__file__).resolve().parents[4] / "results" / "cpu-multitenant"
    said = refused(
        [str(finished[0]), "--out", str(tmp_path / "run"), "--run", str(run), "--set", "methods=[adalora]", "--set",
         "reference=adalora"],
        capsys,
    )  # fmt: skip
    assert "expected measured arms of adalora, got" in said
    assert not (tmp_path / "run").exists()


def test_a_method_that_the_backbone_refuses_is_told_before_any_is_trained(
    write_config: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    path = write_config(tmp_path, methods=["lora", {"fanlora": {"setting": [["q"] for _ in range(9)]}}])
    said = refused([str(path), "--out", str(tmp_path / "run")], capsys)
    assert "method.fanlora.setting: expected a setting of" in said
    assert not (tmp_path / "run").exists()


def test_what_is_never_served_is_judged_as_trained(write_config: Callable[..., Path], tmp_path: Path) -> None:
    path = write_config(
        tmp_path,
        methods=["lora", "bitfit", "prompt-tuning"],
        seeds=[0],
        epochs=1,
        serve={"runtimes": ["static"], "kernels": ["triton"]},
    )
    folder, verdict = accuracy_run.execute(accuracy_config.load(path), tmp_path / "run", resume=False, console=QUIET)
    assert verdict.paths == ()
    assert [one["id"] for one in folder.manifest["left_out"]] == ["static-triton-fp32", "static-triton-bf16"]
    assert all("CUDA" in one["reason"] for one in folder.manifest["left_out"])
    assert [row.method for row in verdict.methods] == ["lora", "bitfit", "prompt-tuning"]
    assert all(row.test.items == 6 for row in verdict.methods)
