"""Two stored runs, compared: are they of one machine, which cases do both have, and what moved. Free of torch."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from perfbench.errors import ComparisonError
from perfbench.figures.metrics import METRICS
from perfbench.gate.figures import case_figures, medians, sample_figures, shown, slowdown, tail_figures, timed
from perfbench.gate.gate_report import Finding, Measured, Report, judge
from perfbench.gate.judgement import judge_bound, judge_exact, judge_presence, relative_change, timed_finding
from perfbench.gate.machines import machine_differences, mapping_of, nearly, word, workspace_differences
from perfbench.gate.policy import Policy, Primary
from perfbench.gate.rank_bounds import Bound, rank_sum_bound
from perfbench.run_folder.run_directory import MANIFEST, RunDirectory
from perfbench.run_folder.run_schema import Manifest

# Case -> one {figure: median, or tail, over repetitions} for each process that measured it, in order.
Processes = dict[str, list[dict[str, float]]]


@dataclass(frozen=True)
class Side:
    """One run: its manifest and, unless only exact figures are asked for, what each process measured.

    total_ms: case -> every valid repetition; sm_clock_mhz: the GPU's clock, the median over all samples, or None.
    valid: case -> the number of its valid samples; as run.json counts them where no sample was kept (`exact_only`).
    """

    path: Path
    manifest: Manifest
    processes: Processes
    total_ms: Mapping[str, Sequence[float]]
    sm_clock_mhz: float | None
    valid: Mapping[str, int]

    @property
    def cases(self) -> Mapping[str, Mapping[str, Any]]:
        """Case id -> its entry of run.json."""
        found: Mapping[str, Mapping[str, Any]] = self.manifest["cases"]
        return found

    @property
    def label(self) -> str:
        """The path, and the commit where the run knows it."""
        checkout = mapping_of(self.manifest["environment"].get("checkout"))
        commit = str(checkout.get("commit") or "")[:12]
        return f"{self.path}" + (f" ({commit}{', changed' if checkout.get('dirty') else ''})" if commit else "")


def load(path: Path, *, exact_only: bool) -> Side:
    """The finished run at `path`, its folder or the run.json in it.

    Raises RunDirectoryError where it can't be read, ComparisonError where it is still being written, or its samples
    are fewer than run.json was made from. With `exact_only` samples may be missing, but none may be malformed.
    """
    folder = path.parent if path.name == MANIFEST else path
    run = RunDirectory.open(folder)
    if run.manifest["finished_at"] is None:
        raise ComparisonError(
            f"{folder}: this run is not finished; wait for it, or go on with "
            f"`perfbench run SCENARIO --out {folder} --resume`"
        )
    valid = {} if exact_only and not run.samples_path.exists() else _valid_samples(run)
    if not exact_only:
        _check_numbers(run, valid)
    samples = {} if exact_only else valid
    clocks = [one.sm_clock_mhz for own in samples.values() for one in own if one.sm_clock_mhz is not None]
    return Side(
        folder,
        run.manifest,
        {case: _by_process(own) for case, own in samples.items()},
        {case: [one.figures["total_ms"] for one in own] for case, own in samples.items()},
        statistics.median(clocks) if clocks else None,
        {case: len(own) for case, own in valid.items()} or _summarised(run),
    )


def _summarised(run: RunDirectory) -> dict[str, int]:
    """Case -> the valid samples that run.json was made from, for a run whose samples were not kept."""
    return {case_id: _rounds(run, case_id, case) for case_id, case in run.manifest["cases"].items()}


@dataclass(frozen=True)
class _Sample:
    """One valid repetition as it was written, and its sampled figures worked out."""

    process: int
    figures: dict[str, float]
    sm_clock_mhz: float | None
    written: Mapping[str, Any]


def _by_process(own: Sequence[_Sample]) -> list[dict[str, float]]:
    """The medians and the tails of each process, of one case's samples."""
    groups: dict[int, list[_Sample]] = defaultdict(list)
    for one in own:
        groups[one.process].append(one)
    return [
        medians(one.figures for one in group) | tail_figures([one.written for one in group])
        for _, group in sorted(groups.items())
    ]


def _valid_samples(run: RunDirectory) -> dict[str, list[_Sample]]:
    """Case -> its valid repetitions. Raises ComparisonError where a sample is malformed."""
    requests = {
        case_id: comparison["workload"]["requests"]
        for comparison in run.manifest["comparisons"]
        for case_id in comparison["case_ids"]
    }
    found: dict[str, list[_Sample]] = {case: [] for case in run.manifest["cases"]}
    for number, sample in enumerate(run.samples(), start=1):
        try:
            if sample["void"] is None and sample["case"] in requests:
                clock = None if sample["sm_clock_mhz"] is None else float(sample["sm_clock_mhz"])
                figures = sample_figures(sample, requests[sample["case"]])
                found[sample["case"]].append(_Sample(int(sample["process"]), figures, clock, sample))
        except (TypeError, ValueError, OverflowError) as error:  # StatisticsError is a ValueError
            raise ComparisonError(f"{run.samples_path}: sample {number}: {error}; run again") from None
    return found


def _check_numbers(run: RunDirectory, found: Mapping[str, Sequence[_Sample]]) -> None:
    """Raises ComparisonError where a case has another number of valid samples than its summary counted."""
    for case_id, case in run.manifest["cases"].items():
        counted, there = _rounds(run, case_id, case), len(found[case_id])
        if case["summary"] and there != counted:
            raise ComparisonError(
                f"{run.samples_path}: {case_id}: expected the {counted} valid samples that {MANIFEST} was made from, "
                f"got {there}; restore the whole file, or compare with --exact-only"
            )


def _rounds(run: RunDirectory, case_id: str, case: Mapping[str, Any]) -> int:
    """The valid samples that the summary of a case counted; 0 where it has none."""
    if not case["summary"]:
        return 0
    try:
        return int(case["summary"]["total_ms"]["rounds"])
    except (KeyError, TypeError, ValueError):
        where = f"{run.manifest_path}: cases.{case_id}.summary"
        raise ComparisonError(f"{where}: expected total_ms.rounds, got none; run again") from None


def compare(
    policy: Policy, baseline: Side, candidate: Side, *, exact_only: bool = False, other_machine: bool = False
) -> Report:
    """What `policy` says about `candidate`. `other_machine`: compare although hardware, driver or clocks differ.

    Raises ComparisonError where they differ and may not, and where the runs have no case in common.
    """
    notes = _machine_notes(baseline, candidate, refuse=not (exact_only or other_machine))
    if baseline.path.resolve() == candidate.path.resolve():
        notes.append("baseline and candidate are one run")
    if not set(baseline.cases) & set(candidate.cases):
        theirs, ours = (next(iter(side.cases), "none at all") for side in (baseline, candidate))
        raise ComparisonError(
            f"{baseline.path} and {candidate.path}: no case in common (such as {theirs} and {ours}); "
            "compare two runs of one scenario"
        )
    findings: list[Finding] = []
    common = []
    differs = ", ".join(workspace_differences(baseline.manifest["environment"], candidate.manifest["environment"]))
    for case_id in dict.fromkeys([*baseline.cases, *candidate.cases]):
        before, after = baseline.cases.get(case_id), candidate.cases.get(case_id)
        samples = (baseline.valid.get(case_id), candidate.valid.get(case_id))
        presence = judge_presence(policy, case_id, before, after, samples)
        findings.append(presence)
        if presence.status == "pass" and before and after:
            common.append(case_id)
            findings += judge_exact(policy, case_id, before, after, differs)
            findings += _shown(case_id, before, after)
    if exact_only:
        notes.append("timed figures were not compared (--exact-only)")
    else:
        findings += _primaries(policy, baseline, candidate, common)
        told = {(finding.case, finding.figure) for finding in findings}
        each = _each_timed(policy, baseline, candidate, common)
        findings += [finding for finding in each if (finding.case, finding.figure) not in told]
    manifest = candidate.manifest
    measured = Measured(manifest["environment"], manifest["started_at"], candidate.total_ms)
    return judge(baseline.label, candidate.label, findings, notes, measured)


def _shown(case_id: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Finding]:
    figures = shown()
    old, new = case_figures(before, figures), case_figures(after, figures)
    return [
        Finding("exact", case_id, name, "shown", old[name], new[name], relative_change(old[name], new[name]))
        for name in figures
        if old[name] is not None or new[name] is not None
    ]


def _primaries(policy: Policy, baseline: Side, candidate: Side, common: Sequence[str]) -> list[Finding]:
    return [finding for primary in policy.primary for finding in _primary(policy, primary, baseline, candidate, common)]


def _primary(policy: Policy, primary: Primary, baseline: Side, candidate: Side, common: Sequence[str]) -> list[Finding]:
    cases = [case for case in common if fnmatchcase(case, primary.cases) and policy.skipped(case) is None]
    if not cases:
        note = f"no case in common matches {primary.cases!r}, so this figure can't be gated"
        return [Finding("case", primary.cases, primary.figure, "fail", note=note)]
    label = cases[0] if len(cases) == 1 else f"{len(cases)} cases ({primary.cases})"
    ours, theirs = (_over_cases(side.processes, cases, primary.figure) for side in (baseline, candidate))
    if not ours or not theirs:
        side = "baseline" if not ours else "candidate"
        why = f"not measured in the {side}"
        if METRICS[primary.figure].tail:
            why += f", or in too few repetitions of a process: {METRICS[primary.figure].definition}"
        return [Finding("case", label, primary.figure, "fail", note=why)]
    values, bound = _bound(policy, primary.figure, ours, theirs)
    few = min(len(ours), len(theirs))
    if few < policy.min_processes:
        note = f"not gated: {few} process{'es' if few > 1 else ''} a side, {policy.min_processes} needed"
        found = timed_finding(label, primary.figure, values, bound)
        return [Finding(**{**vars(found), "note": f"{note} (perfbench run --processes {policy.min_processes})"})]
    return [judge_bound(policy, primary, label, values, bound)]


def _over_cases(processes: Processes, cases: Sequence[str], figure: str) -> list[float]:
    """For the n-th process of every case, the geometric mean of `figure` over the cases; [] where one lacks it."""
    measured = [[one[figure] for one in processes[case] if figure in one] for case in cases]
    return [statistics.geometric_mean(values) for values in zip(*measured, strict=False)]


def _each_timed(policy: Policy, baseline: Side, candidate: Side, common: Sequence[str]) -> list[Finding]:
    """Every timed figure of every case, shown: the primary ones carry the verdict."""
    findings = []
    for case in common:
        for figure in timed():
            ours, theirs = (_over_cases(side.processes, [case], figure) for side in (baseline, candidate))
            if ours and theirs:
                findings.append(timed_finding(case, figure, *_bound(policy, figure, ours, theirs)))
    return findings


def _bound(
    policy: Policy, figure: str, ours: Sequence[float], theirs: Sequence[float]
) -> tuple[tuple[float, float], Bound]:
    """The medians over processes, and the bound of the log slow-down between the two groups of processes."""
    before, after = ([slowdown(figure, 1.0, value) for value in values] for values in (ours, theirs))
    return (statistics.median(ours), statistics.median(theirs)), rank_sum_bound(before, after, policy.confidence)


def _machine_notes(baseline: Side, candidate: Side, *, refuse: bool) -> list[str]:
    """Notes on what differs beside the code. Raises ComparisonError where `refuse` and the machines differ."""
    ours, theirs = baseline.manifest["environment"], candidate.manifest["environment"]
    differences = machine_differences(ours, theirs)
    clocks = baseline.sm_clock_mhz, candidate.sm_clock_mhz
    if clocks[0] != clocks[1] and not nearly(*clocks):
        differences.append(f"GPU clock while measuring {word(clocks[0])} and {word(clocks[1])} MHz")
    if differences and refuse:
        raise ComparisonError(
            f"{baseline.path} and {candidate.path}: the machines differ: {'; '.join(differences)}; "
            "measure both on one machine, or say --other-machine or --exact-only"
        )
    notes = [f"the machines differ: {'; '.join(differences)}"] if differences else []
    old, new = (mapping_of(environment.get("versions")) for environment in (ours, theirs))
    packages = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    changed = [f"{name} {old.get(name)} -> {new.get(name)}" for name in packages]
    if ours.get("python") != theirs.get("python"):
        changed.append(f"{ours.get('python')} -> {theirs.get('python')}")
    if changed:
        notes.append(f"software differs: {', '.join(changed)}")
    settings = [
        f"{name} {baseline.manifest['scenario'].get(name)} -> {candidate.manifest['scenario'].get(name)}"
        for name in ("warmup", "repetitions", "isolation", "seed")
        if baseline.manifest["scenario"].get(name) != candidate.manifest["scenario"].get(name)
    ]
    return [*notes, f"the scenario differs: {', '.join(settings)}"] if settings else notes
