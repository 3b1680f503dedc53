"""Traffic scenarios: what is accepted, what is refused and in which words."""

# Messages are tested whole, one to a line.
# ruff: noqa: E501

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from perfbench.errors import ScenarioError
from perfbench.spec import scenario
from perfbench.spec.traffic import Lengths, TrafficScenario, load, points_of
from perfbench.spec.traffic_schema import schema

SHIPPED = Path(__file__).parents[3] / "scenarios" / "traffic.yaml"
VALID: dict[str, Any] = {
    "backbone": "llama-tiny",
    "dtype": "fp32",
    "methods": ["lora", "para"],
    "traffic": {"prompt_tokens": 8, "new_tokens": 4, "tenants": 5, "rate": 10, "requests": 20},
    "targets": {"ttft_ms": 100, "itl_ms": 10},
}


def loaded(*sets: str, **changes: Any) -> TrafficScenario:
    values = {**VALID, **changes}
    return load(values, sets, lambda asked: ("cpu" if asked == "auto" else asked, "why"))


def refusal(*sets: str, **changes: Any) -> str:
    with pytest.raises(ScenarioError) as caught:
        loaded(*sets, **changes)
    return str(caught.value)


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(schema())


def test_what_is_not_said_has_a_default() -> None:
    found = loaded()
    assert found.traffic.prompt_tokens == Lengths(8, 0.0, 8)
    assert (found.traffic.arrivals, found.traffic.zipf_exponent, found.traffic.without_adapter) == ("poisson", None, 0)
    assert (found.server.rows, found.server.resident, found.server.chunk_tokens) == (8, 16, None)
    assert (found.targets.share, found.repetitions) == (0.99, 2)
    assert [case.arm for case in found.comparison.cases] == ["none", "lora", "para"]
    assert {case.runtime for case in found.comparison.cases} == {"continuous"}
    assert found.server.capacity(found.traffic) == 11


def test_a_range_of_lengths_a_search_and_a_set() -> None:
    drawn = {"median": 8, "sigma": 0.5, "most": 32}
    own = {"prompt_tokens": drawn, "new_tokens": 4, "tenants": "search", "rate_per_tenant": 1}
    found = loaded("server.rows=3", traffic=own)
    assert found.traffic.tenants is None
    assert found.traffic.prompt_tokens == Lengths(8, 0.5, 32)
    assert (found.server.rows, found.server.capacity(found.traffic)) == (3, 35)


def test_the_points_are_tenants_times_rates_or_their_own_rate() -> None:
    own = {**VALID["traffic"], "tenants": [2, 4], "rate": [1, 3]}
    assert points_of(loaded(traffic=own).traffic) == [(2, 1.0, 0), (2, 3.0, 0), (4, 1.0, 0), (4, 3.0, 0)]
    own = {**VALID["traffic"], "tenants": [2, 4], "rate_per_tenant": 0.5}
    del own["rate"]
    assert points_of(loaded(traffic=own).traffic) == [(2, 1.0, 0), (4, 2.0, 0)]
    own = {**own, "arrivals": "closed", "in_flight": [3, 5]}
    del own["rate_per_tenant"]
    assert points_of(loaded(traffic=own).traffic) == [(2, 0.0, 3), (2, 0.0, 5), (4, 0.0, 3), (4, 0.0, 5)]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_shipped_one_is_for_both_kinds_of_device(kind: str) -> None:
    found = load(SHIPPED, [], lambda _: (kind, ""))
    assert found.traffic.tenants is None
    assert found.comparison.device == kind
    assert any(note.startswith("overrides.cpu") for note in found.common.notes) == (kind == "cpu")


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (("traffic.rate_per_tenant=1",), "expected either rate_per_tenant or rate, got both"),
        (("traffic.tenants=serch",), "unknown word 'serch'; did you mean 'search'?"),
        (("traffic.zipf_exponent=1",), "traffic.zipf_exponent=1: expected only with tenant_mix zipf; remove it, or choose zipf"),
        (("traffic.burstiness=2",), "traffic.burstiness=2: expected only with arrivals gamma; remove it, or choose gamma"),
        (("traffic.arrivals=poison",), "unknown arrivals 'poison'; did you mean 'poisson'?"),
        (("traffic.requests=3",), "expected an integer >= 20, got 3"),
        (("traffic.requests=100001",), "expected at most 100,000, got 100,001"),
        (("traffic.prompt_tokens={median: 9, sigma: 1, most: 8}",), "expected at least the median 9, got 8"),
        (("traffic.prompt_tokens=2000",), "expected at most 512 tokens, the context of llama-tiny"),
        (("traffic.prompt_tokens={median: 9, sigma: 400, most: 18}",), "expected a number from 0 to 4, got 400"),
        (("traffic.tenant_mix=zipf", "traffic.zipf_exponent=200"), "expected a number from 0 to 8, got 200"),
        (("traffic.arrivals=gamma", "traffic.burstiness=1.0e-320"), "expected a number from 0.01 to 100"),
        (("targets.share=1.5",), "targets.share=1.5: expected"),
        (("targets.ttft=5",), "unknown key 'ttft'; did you mean 'ttft_ms'?"),
        (("kernels=triton",), "its kernels run on a CUDA device"),
        (("methods=[peft]",), "peft is served on runtime transformers only; add that runtime, or leave peft out"),
        (("methods=[lora-merged]",), "lora-merged is served on runtime transformers, static only; add one of these"),
        (("traffic.requests",), "expected key=value"),
    ],
)  # fmt: skip
def test_what_can_t_be_is_refused_in_one_line(sets: tuple[str, ...], words: str) -> None:
    message = refusal(*sets)
    assert words in message
    assert "\n" not in message


def test_a_search_needs_a_rate_for_each_tenant() -> None:
    own = {**VALID["traffic"], "tenants": "search"}
    assert "say rate_per_tenant" in refusal(traffic=own)


def test_a_search_needs_adapters_without_end(tmp_path: Path) -> None:
    own = {"prompt_tokens": 8, "new_tokens": 4, "tenants": "search", "rate_per_tenant": 1}
    message = refusal(traffic=own, methods=[{"lora": {"adapters": str(tmp_path)}}])
    assert "adapters from folders are as many as there are; say numbers in place of search" in message


def test_either_kind_of_scenario_is_told_where_it_belongs() -> None:
    with pytest.raises(ScenarioError, match=r"a scenario of traffic, .* measure it with perfbench traffic"):
        scenario.load(SHIPPED)
    with pytest.raises(ScenarioError, match=r"a scenario of fixed batches, .* measure it with perfbench run"):
        load(SHIPPED.with_name("smoke.yaml"), [], lambda _: ("cpu", ""))
