"""One whole job in this process: what the child says of arms in which a fault was planted."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from perfbench.measure.on_device import worker
from perfbench.measure.run import manifest_of
from perfbench.proof import same_adapters
from perfbench.report.words import title
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.transformers_plan import PlanArm
from perfbench.spec import cases, scenario

SCENARIO = """\
backbone: llama-tiny
dtype: fp32
device: cpu
runtime: [transformers, static]
methods: {methods}
workload: {{prompt_tokens: 6, new_tokens: 4, beams: {beams}, requests: 3, tenants: 3}}
warmup: 1
repetitions: {rounds}
"""
ROUNDS = 5


def said(folder: Path, methods: str = "[lora, peft, peft-single]", beams: int = 1, **job: Any) -> list[dict[str, Any]]:
    """The events of one job with those arms; `job`: what else the parent would say of it."""
    file = folder / "x.yaml"
    file.write_text(SCENARIO.format(methods=methods, beams=beams, rounds=ROUNDS))
    comparisons = cases.expand(scenario.resolve(scenario.load(file), "cpu"))
    ids = [case.id for comparison in comparisons for case in comparison.cases]
    whole: dict[str, Any] = {
        "comparisons": [cases.to_json(comparison) for comparison in comparisons],
        "plugins": [], "prepared": dict.fromkeys(ids, "ok"), "proved": [], "counted": ids,
        "done": {case: [] for case in ids}, "warmup": 1, "rounds": list(range(ROUNDS)), "last_round": ROUNDS - 1,
        "seed": 0, "threads": 1,
    }  # fmt: skip
    events: list[dict[str, Any]] = []
    worker._run(whole | job, lambda event, **fields: events.append({"event": event, **fields}))
    return events


def proofs(events: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """`runtime/arm` -> what was proved of it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event["event"] == "proved":
            _, runtime, _, arm = event["case"].split("/")
            found.setdefault(f"{runtime}/{arm.removesuffix('-eager')}", []).append(event)
    return found


def reasons(events: list[dict[str, Any]]) -> dict[str, str]:
    """`runtime/arm` -> why it failed, of those that did."""
    return {arm: one["reason"] for arm, those in proofs(events).items() for one in those if one["reason"]}


@pytest.mark.parametrize("beams", [1, 3])
def test_what_peft_serves_is_compared_with_the_same_adapters_in_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beams: int
) -> None:
    compared: list[tuple[int, ...]] = []

    def listening(batch: Any, slots: tuple[int, ...], *others: Any, of: Any) -> list[int]:
        compared.append(slots)
        parted: list[int] = of(batch, slots, *others)
        return parted

    monkeypatch.setattr(same_adapters, "parted", partial(listening, of=same_adapters.parted))
    events = said(tmp_path, beams=beams)
    assert reasons(events) == {}
    found = proofs(events)
    for arm in ("transformers/peft", "transformers/peft-single"):
        same = [case.split("/")[1] for case in found[arm][0]["same_tokens_as"]]
        assert same == ["transformers", "static"]
    assert "same_tokens_as" not in found["transformers/lora"][0]
    assert len(compared) == 2 * 2 * ROUNDS


def test_a_job_of_8_bit_weights_says_so_in_its_figures(tmp_path: Path) -> None:
    """Both runtimes are checked, PEFT's arms too, and what a step must read is counted in 8 bits; run.json has it."""
    file = tmp_path / "x.yaml"
    file.write_text(SCENARIO.format(methods="[lora, peft]", beams=1, rounds=1))
    exact, held = {}, {}
    for name in ("none", "int8"):
        resolved = scenario.resolve(scenario.load(file, [f"quantisation={name}"]), "cpu")
        comparisons = cases.expand(resolved)
        events = said(tmp_path, f"[lora, peft]\nquantisation: {name}", rounds=[0], prepared={}, counted=[])
        checked = {event["case"]: event["status"] for event in events if event["event"] == "case"}
        assert checked == {case.id: "ok" for comparison in comparisons for case in comparison.cases}
        assert reasons(events) == {}
        exact[name] = [one["exact"]["bytes_per_decode_step"] for one in events if one["event"] == "counted"]
        held[name] = next(one["bytes"] for one in events if one["event"] == "backbone")
        manifest = manifest_of(resolved, comparisons)
        assert {one["quantisation"] for one in manifest["comparisons"]} == {name}
        assert manifest["scenario"]["quantisation"] == [name]
        assert title(manifest["comparisons"][0], []).startswith(
            "llama-tiny fp32 cpu" if name == "none" else "llama-tiny fp32 int8 cpu"
        )
    linears, outputs = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 172) + 256 * 64, 3 * (3 * 64 + 64 + 2 * 172) + 256
    assert {a - b for a, b in zip(exact["none"], exact["int8"], strict=True)} == {3 * linears - 4 * outputs}
    assert held["int8"] < held["none"] / 2


@pytest.mark.parametrize(("arm", "name"), [(PlanArm, "transformers/lora"), (StaticArm, "static/lora")])
def test_one_wrong_round_that_is_not_made_again_is_seen_beside_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: Any, name: str
) -> None:
    """Of one round of a method the last request gets another last token, in the timed window only."""
    drawn = proofs(said(tmp_path))[name][0]["rounds"]
    wrong = next(number for number in range(ROUNDS) if number not in drawn)
    plant(monkeypatch, arm, wrong)
    found = reasons(said(tmp_path))
    assert set(found) == {name, "transformers/peft"}  # request 2 is none of the tenant that peft-single serves
    for reason, other in ((found[name], "peft-eager"), (found["transformers/peft"], "lora-eager")):
        assert reason.startswith(f"round {wrong + 1}: request(s) 2: other tokens than ")
        assert reason.endswith(f"/{other} with the same adapters")
    assert reasons(said(tmp_path, methods="[lora]")) == {}, "only the comparison with PEFT can see it"


def plant(monkeypatch: pytest.MonkeyPatch, arm: Any, wrong: int) -> None:
    """In the timed call of the round `wrong` of the arms that hold adapters."""
    sound, calls = arm.generate, dict[int, int]()

    def generate(self: Any, batch: Any, **observers: Any) -> Any:
        made = sound(self, batch, **observers)
        if self.bank is None:
            return made
        if observers.get("clock") is not None:
            calls[id(self)] = calls.get(id(self), -2) + 1  # after one call to warm up
            if calls[id(self)] == wrong:
                tokens: torch.Tensor = made.tokens.clone()
                tokens[-1, -1] = (tokens[-1, -1] + 1) % 256
                return replace(made, tokens=tokens)
        return made

    monkeypatch.setattr(arm, "generate", generate)


def test_where_an_earlier_child_timed_the_one_a_round_is_made_of_both(tmp_path: Path) -> None:
    """As where a child dies between two proofs."""
    ids = [event["case"] for event in said(tmp_path, "[lora, peft]") if event["event"] == "proved"]
    done = {case: list(range(ROUNDS)) for case in ids}
    proved = [case for case in ids if "/peft-" not in case]
    events = said(tmp_path, "[lora, peft]", done=done, proved=proved)
    assert list(proofs(events)) == ["transformers/peft"]
    assert len(proofs(events)["transformers/peft"][0]["same_tokens_as"]) == 2
    assert not [event for event in events if event["event"] == "sample"]


def test_other_options_are_other_adapters(tmp_path: Path) -> None:
    events = said(tmp_path, "[lora, {peft: {rank: 2}}]")
    assert reasons(events) == {}
    assert "same_tokens_as" not in proofs(events)["transformers/peft"][0]
