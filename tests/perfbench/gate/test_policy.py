"""Policies are read strictly: what is wrong is named with its line, and nothing is quietly ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from perfbench.errors import PolicyError
from perfbench.figures.metrics import METRICS
from perfbench.gate import policy
from perfbench.gate.figures import compiled, exact


def load(tmp_path: Path, text: str) -> policy.Policy:
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    return policy.load(file)


def test_the_default_gates_every_exact_figure_by_equality_but_one() -> None:
    found = policy.load(None)
    noisy = {"instructions_per_decode_step": METRICS["instructions_per_decode_step"].tolerance}
    assert found.tolerances == dict.fromkeys((*exact(), *compiled()), 0.0) | noisy
    assert [(one.figure, one.cases, one.least_effect) for one in found.primary] == [("decode_tokens_per_s", "*", 0.03)]


def test_the_last_override_that_matches_wins(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        """
exact: {peak_allocated_bytes: {tolerance: 0.01}}
overrides:
  - {cases: '*', reason: first, exact: {peak_allocated_bytes: {tolerance: 0.02}}}
  - {cases: '*/lora-*', reason: second, exact: {peak_allocated_bytes: {tolerance: 0.03}}}
  - {cases: '*/peft-*', reason: third, skip: true}
""",
    )
    assert found.tolerance("peak_allocated_bytes", "x/lora-eager") == (0.03, "second")
    assert found.tolerance("peak_allocated_bytes", "x/ia3-eager") == (0.02, "first")
    assert found.tolerance("bytes_per_tenant", "x/ia3-eager") == (0.0, "")
    assert found.skipped("x/peft-eager") == "third"
    assert found.skipped("x/lora-eager") is None


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("exat: {}", 1, "unknown field 'exat'; did you mean 'exact'?"),
        ("exact:\n  aten_ops: {tolerance: 0}", 2, "unknown exact figure 'aten_ops'"),
        ("exact:\n  bytes_per_tenant: 0.1", 2, "expected a mapping, got 0.1"),
        ("exact:\n  bytes_per_tenant: {tolerance: -0.1}", 2, "expected a share >= 0 and < 1"),
        ("exact:\n  bytes_per_tenant: {tolerance: true}", 2, "expected a share"),
        ("timed:\n  least_effect: 3", 2, "expected a share > 0 and < 1, such as 0.03, got 3"),
        ("timed:\n  least_effect: 0", 2, "expected a share > 0"),
        ("timed:\n  min_processes: 5", 2, "expected an integer >= 6"),
        ("timed:\n  primary:\n  - {figure: peak_allocated_bytes}", 3, "expected a timed figure"),
        ("timed:\n  primary:\n  - {}", 3, "expected a timed figure"),
        (f"timed:\n  primary: [{', '.join(['{figure: itl_ms}'] * 3)}]", 2, "expected at most 2 figures"),
        ("overrides:\n- {cases: '*', skip: true}", 2, "overrides.0.reason: expected a text that is not empty, got"),
        ("overrides:\n- {cases: '*', reason: ' '}", 2, "expected a text that is not empty"),
        ("overrides:\n- {reason: x}", 2, "overrides.0.cases: expected a text"),
        ("overrides:\n- {cases: '*', reason: x, skip: 1}", 2, "expected true or false"),
        ("overrides: {}", 1, "expected a list"),
        ("[1]", 1, "the policy: expected a mapping"),
        ("a: !!python/object:os.system x", 1, "expected a plain value"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    with pytest.raises(PolicyError) as refused:
        load(tmp_path, text)
    assert str(refused.value).startswith(f"{tmp_path / 'policy.yaml'}:{line}: ")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_policy_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no such file"):
        policy.load(tmp_path / "none.yaml")
    with pytest.raises(PolicyError, match="expected a policy file, got a directory"):
        policy.load(tmp_path)
