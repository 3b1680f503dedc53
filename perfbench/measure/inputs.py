"""The inputs that only a full read can judge, checked before anything is written: prompts and adapter folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perfbench.errors import ScenarioError
from perfbench.spec.backbone_config import is_named, shape_of
from perfbench.spec.cases import Comparison, source_of


def check(comparisons: Sequence[Comparison]) -> list[str]:
    """ScenarioError or AdapterError on the first prompts file or adapter folder that can't be served; else notes on
    what can be served and may still not be meant."""
    notes: dict[str, None] = {}
    for comparison in comparisons:
        workload = comparison.workload
        if workload.prompts is not None:
            from perfbench.measure.on_device.prompts import read_prompts

            found = len(read_prompts(Path(workload.prompts)))
            if found < workload.requests:
                raise ScenarioError(
                    f"{workload.prompts}: {workload.requests} requests need as many prompts, found {found}"
                )
        for case in map(source_of, comparison.cases):
            if getattr(case.options, "adapters", None) is not None:
                from perfbench.measure.on_device.adapter_folders import adapter_folders, all_folders
                from perfbench.measure.on_device.arms import read_adapter
                from perfbench.methods.checkpoints.adapter_folder import note_on_backbone

                for tenant in range(workload.resident):
                    read_adapter(case, shape_of(comparison.backbone), workload.resident, tenant)
                served = adapter_folders(case.options.adapters, case.method, workload.resident)
                there = len(all_folders(case.options.adapters, case.method))
                if there > len(served):
                    names = ", ".join(map(str, served[:4])) + (", ..." if len(served) > 4 else "")
                    notes |= {
                        f"{case.arm}: of {there} adapters those of {len(served)} tenants are served: {names}": None
                    }
                # A named shape has random weights: no adapter was trained on those.
                note = None if is_named(comparison.backbone) else note_on_backbone(served[0], comparison.backbone)
                notes |= {note: None} if note else {}
    return list(notes)
