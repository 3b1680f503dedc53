"""The inputs that only a full read can judge, checked before anything is written: prompts and adapter folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perfbench.backbone_config import shape_of
from perfbench.cases import Comparison
from perfbench.errors import ScenarioError


def check(comparisons: Sequence[Comparison]) -> None:
    """ScenarioError or AdapterError on the first prompts file or adapter folder that can't be served."""
    for comparison in comparisons:
        workload = comparison.workload
        if workload.prompts is not None:
            from perfbench.workload import read_prompts

            found = len(read_prompts(Path(workload.prompts)))
            if found < workload.requests:
                raise ScenarioError(
                    f"{workload.prompts}: {workload.requests} requests need as many prompts, found {found}"
                )
        for case in comparison.cases:
            if getattr(case.options, "adapters", None) is not None:
                from perfbench.arms import read_adapter

                for tenant in range(workload.resident):
                    read_adapter(case, shape_of(comparison.backbone), workload.resident, tenant)
