"""A run directory: `run.json` (manifest and summaries) and `samples.jsonl` (every repetition). Free of torch.

`run.json` is replaced as a whole and `samples.jsonl` only grows by whole lines, so that a kill at any moment
loses at most the sample in flight.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from perfbench import exit_codes
from perfbench.errors import RunDirectoryError
from perfbench.figures.metrics import PARTS, named, required_of_samples, sample_values, tails_of
from perfbench.figures.roof import impossible
from perfbench.figures.stats import TAILS, Interval, interval_over_processes, paired_ratios, summary, tail
from perfbench.files import strict_json
from perfbench.files.run_lock import LOCK
from perfbench.run_folder.run_schema import Case, Comparison, Manifest, Sample, problem_of_run, problem_of_sample

SCHEMA_VERSION = 2
STATUSES = ("pending", "ok", "check_failed", "check_void", "crashed", "out_of_memory")
MANIFEST, SAMPLES = "run.json", "samples.jsonl"
# What `perfbench accuracy` and `perfbench study` write in place of the first.
ACCURACY_MANIFEST = "accuracy.json"
STUDY_MANIFEST = "study.json"
# One fixed name, so that what a kill leaves behind is overwritten by the next write.
_TEMPORARY = ".run.json.tmp"
_ELSEWHERE = "run again with another --out"
_SPEEDS = ("decode_tokens_per_s", "tokens_per_s")
_SAMPLE_FIELDS = frozenset((
    "case", "round", "process", "void", "sm_clock_mhz", "throttle_reasons", "energy_mj", "unix_time_s",
    *required_of_samples(),
))  # fmt: skip
_MANIFEST_FIELDS = {
    "perfbench_version": str,
    "started_at": str,
    "scenario": dict,
    "environment": dict,
    "processes": int,
    "comparisons": list,
    "cases": dict,
}
_COMPARISON_FIELDS = ("id", "backbone", "dtype", "device", "runtime", "workload", "case_ids")


def is_finetune(path: Path) -> bool:
    """Whether the folder holds what `perfbench finetune` wrote; False too where nothing there can be read."""
    try:
        manifest = strict_json.parse((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == "finetune"


def pending_case(
    case_id: str, comparison: str, arm: str, method: str, options: Mapping[str, Any], kernels: str
) -> dict[str, Any]:
    """The manifest's entry of a case that is not measured yet: every field is there, every figure is None."""
    figures = ("reason", "check", *PARTS, "summary", *named("ratio"))
    return {
        "id": case_id,
        "comparison": comparison,
        "arm": arm,
        "method": method,
        "options": dict(options),
        "kernels": kernels,
        "status": "pending",
        **dict.fromkeys(figures),
    }


def is_something_else(path: Path) -> bool:
    """Whether the run.json in the folder is whole and not what `perfbench run` writes: a training's, or that of
    another program. False where it can't be read: it may be a damaged run."""
    try:
        manifest = strict_json.parse((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return not isinstance(manifest, dict) or "kind" in manifest or "perfbench_version" not in manifest


_CASE_FIELDS = frozenset(pending_case("", "", "", "", {}, ""))


class RunDirectory:
    """One run on disk. Change `manifest`, then call `write_manifest()`; made by `create` or `open`, which check that
    what they are given is a Manifest."""

    def __init__(self, path: Path, manifest: Any) -> None:
        self.path = path
        self.manifest: Manifest = manifest
        self.manifest_path = path / MANIFEST
        self.samples_path = path / SAMPLES
        # Of the threads that bring the jobs of a run to their ends, where there are several.
        self.lock = threading.RLock()
        # Until this process has looked, the last line may be torn by the kill of an earlier one.
        self._ends_whole = False
        # Of samples.jsonl, once this process has written it.
        self._size: int | None = None

    @classmethod
    def create(cls, path: str | Path, manifest: Any) -> RunDirectory:
        """A new run in the folder `path`, which must be empty or not there yet.

        Raises RunDirectoryError where that is not so or it can't be written; then nothing is left behind.
        """
        path = Path(path)
        run = cls(path, manifest)
        _check_manifest(manifest, run.manifest_path)
        made: list[Path] = []
        try:
            if path.is_dir() and any(entry.name not in (_TEMPORARY, LOCK) for entry in path.iterdir()):
                raise RunDirectoryError(
                    f"{path}: expected a new or empty folder, this one has files in it; --resume continues "
                    "the run in it, another --out starts a new one"
                )
            made = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            run.write_manifest()
        except (OSError, RunDirectoryError, ValueError) as error:
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()
            if isinstance(error, OSError):
                raise _unwritable(path, error) from error
            raise
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """The run in the folder `path`. Raises RunDirectoryError where there is none that can be read."""
        path = Path(path)
        file = path / MANIFEST
        if not file.is_file():
            what = f"not a run directory, it has no {MANIFEST}" if path.is_dir() else "no such folder"
            raise RunDirectoryError(f"{path}: {what}; give the folder that `perfbench run` wrote")
        try:
            manifest = strict_json.parse(file.read_bytes())
        except OSError as error:
            raise RunDirectoryError(f"{file}: can't be read ({error.strerror}); check its permissions") from error
        except ValueError as error:  # malformed JSON, and bytes that are not UTF-8
            raise RunDirectoryError(f"{file}: not valid JSON ({error}); restore the file or {_ELSEWHERE}") from error
        _check_manifest(manifest, file)
        if problem := problem_of_run(manifest):
            raise RunDirectoryError(f"{file}: {problem[0]}: {problem[1]}; restore the file or {_ELSEWHERE}")
        return cls(path, manifest)

    def write_manifest(self) -> None:
        """Puts `manifest` in the place of `run.json`, as a whole or not at all.

        Raises RunDirectoryError where it can't be written, ValueError on a NaN or an infinity (our fault).
        """
        _refuse_not_finite(self.manifest, MANIFEST)
        text = json.dumps(self.manifest, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        temporary = self.path / _TEMPORARY
        try:
            with temporary.open("wb") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.manifest_path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise _unwritable(self.manifest_path, error) from error

    def append_sample(self, sample: Mapping[str, Any]) -> None:
        """Appends one repetition as one whole line, handed to the system before this returns.

        Raises RunDirectoryError where it can't be written, with the file cut back to its last whole line;
        ValueError on a sample with other fields, of an unknown case or with a NaN (our fault).
        """
        if wrong := _SAMPLE_FIELDS ^ (set(sample) - (named("sample").keys() - _SAMPLE_FIELDS)):
            raise ValueError(f"sample: missing or unknown fields: {sorted(wrong)}")
        if sample["case"] not in self.manifest["cases"]:
            raise ValueError(f"sample: unknown case {sample['case']!r}")
        self.append_line(sample)

    def append_line(self, sample: Mapping[str, Any]) -> None:
        """As `append_sample`, for runs of another kind, whose samples have other fields."""
        _refuse_not_finite(dict(sample), "sample")
        line = json.dumps(dict(sample), allow_nan=False).encode() + b"\n"
        try:
            if not self._ends_whole:
                self._cut_torn_line()
            self._write_line(line)
        except OSError as error:
            raise _unwritable(self.samples_path, error) from error

    def _write_line(self, line: bytes) -> None:
        with self.samples_path.open("ab", buffering=0) as file:
            whole = os.fstat(file.fileno()).st_size
            self._expect_size(whole)
            try:
                written = 0
                while written < len(line):  # a disk that fills up takes a part first, and only then fails
                    written += file.write(line[written:])
            except OSError:
                self._ends_whole = False
                with suppress(OSError):
                    os.ftruncate(file.fileno(), whole)
                raise
        self._size = whole + len(line)

    def _expect_size(self, size: int) -> None:
        """RunDirectoryError where the samples are not as this process left them: some are lost, or not its own."""
        if self._size is not None and size != self._size:
            raise RunDirectoryError(
                f"{self.samples_path}: expected the {self._size:,} bytes that were written, got {size:,}: another "
                f"program changed it during the run; {_ELSEWHERE}"
            )

    def samples_replaced(self) -> None:
        """To be called by who wrote samples.jsonl anew."""
        self._size = None

    def _cut_torn_line(self) -> None:
        """Cuts off what follows the last newline: the line that a kill tore."""
        with suppress(FileNotFoundError), self.samples_path.open("r+b", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            whole = file.read(size).rfind(b"\n") + 1
            if whole < size:
                os.ftruncate(file.fileno(), whole)
        self._ends_whole = True

    def samples(self) -> list[Sample]:
        """Every whole line of `samples.jsonl`, in order; a last line without its newline is ignored.

        Raises RunDirectoryError where the file can't be read, or, with its number, where a line is corrupt.
        """
        return list(self._read_samples())

    def _read_samples(self) -> Iterator[Sample]:
        summarised = any(case["summary"] for case in self.manifest["cases"].values())
        if not summarised and not self.samples_path.exists():
            self._expect_size(0)
            return  # no sample was taken yet
        try:
            with self.samples_path.open("rb") as file:
                self._expect_size(os.fstat(file.fileno()).st_size)
                lines = file.read(os.fstat(file.fileno()).st_size).split(b"\n")[:-1]
        except OSError as error:
            raise RunDirectoryError(
                f"{self.samples_path}: can't be read ({error.strerror}); restore the file or {_ELSEWHERE}"
            ) from error
        for number, line in enumerate(lines, start=1):
            try:
                sample = strict_json.parse(line)
            except ValueError as error:
                raise self._corrupt(number, f"not valid JSON ({error})") from error
            if not isinstance(sample, dict) or not set(sample) >= _SAMPLE_FIELDS:
                raise self._corrupt(number, "expected a sample with all of its fields")
            if problem := problem_of_sample(sample):
                raise self._corrupt(number, problem)
            yield sample

    def _corrupt(self, number: int, what: str) -> RunDirectoryError:
        return RunDirectoryError(f"{self.samples_path}:{number}: {what}; delete that line, or {_ELSEWHERE}")

    def summarise(self) -> None:
        """Fills `summary`, `kept`, `versus_lora` and `versus_plain` of every case from the samples that are not void.

        A case whose status is not ok gets none of them: no speed without its check. Writes nothing.
        Raises RunDirectoryError as `samples` does, and where a case has two samples in one turn.
        """
        cases = self.manifest["cases"]
        valid = self.valid(self.samples())
        for comparison in self.manifest["comparisons"]:
            requests = comparison["workload"]["requests"]
            members = [cases[case_id] for case_id in comparison["case_ids"]]
            for case in members:
                own = valid[case["id"]]
                ok = case["status"] == "ok" and bool(own)
                case["summary"] = _summarise_samples(own, requests) if ok else None
                if (why := impossible(comparison, case)) is not None:
                    case["status"], case["reason"], case["summary"] = "check_failed", why, None
            for case in members:
                case["kept"] = self._versus(case, _reference(members, "none", case["kernels"]), valid)
                case["versus_lora"] = self._versus(case, _reference(members, "lora", case["kernels"]), valid)
        for comparison in self.manifest["comparisons"]:
            plain = self._plain(comparison)
            for case in (cases[case_id] for case_id in comparison["case_ids"]):
                case["versus_plain"] = self._versus(case, plain.get(case["arm"]), valid)

    def valid(self, samples: Iterable[Sample]) -> dict[str, list[Sample]]:
        """Case -> its samples that are not void."""
        valid: dict[str, list[Sample]] = {case_id: [] for case_id in self.manifest["cases"]}
        for sample in samples:
            if sample["void"] is None and sample["case"] in valid:
                valid[sample["case"]].append(sample)
        return valid

    def add_tails(self, samples: Iterable[Sample]) -> None:
        """Fills the tails of the summaries of a run that an earlier perfbench wrote without them, in memory only;
        those of a case whose `samples` are not all there stay unknown."""
        for case_id, own in self.valid(samples).items():
            case_summary = self.manifest["cases"][case_id]["summary"] or {}
            for name, found in case_summary.items():
                if missing := [key for key in tails_of(name) if key in TAILS and key not in found]:
                    values = [value for one in own for value in sample_values(name, one, 1)]
                    if len(values) == found["rounds"]:
                        found.update({key: tail(values, key) for key in missing})

    def _plain(self, comparison: Comparison) -> dict[str, Case]:
        """Arm -> its case on runtime transformers with kernels eager, everything else being as in `comparison`."""

        def shared(one: Comparison) -> tuple[Any, ...]:
            others = one.get("quantisation", "none"), one.get("tensor_parallel_size", 1)
            return one["backbone"], one["dtype"], one["device"], one["workload"], *others

        return {
            case["arm"]: case
            for other in self.manifest["comparisons"]
            if other["runtime"] == "transformers" and shared(other) == shared(comparison)
            for case in (self.manifest["cases"][case_id] for case_id in other["case_ids"])
            if case["kernels"] == "eager"
        }

    def _versus(
        self, case: Case, reference: Case | None, valid: Mapping[str, list[Sample]]
    ) -> dict[str, Interval] | None:
        """Speeds of `case` / those of `reference`; None: no such arm, itself, not ok, or no common round."""
        if reference is None or reference is case or case["summary"] is None or reference["summary"] is None:
            return None
        both = [*valid[case["id"]], *valid[reference["id"]]]
        try:
            ratios = {speed: paired_ratios(both, case["id"], reference["id"], speed) for speed in _SPEEDS}
        except ValueError as error:
            raise RunDirectoryError(f"{self.samples_path}: {error}; delete the wrong line, or {_ELSEWHERE}") from error
        if not ratios[_SPEEDS[0]]:
            return None
        seed = self.manifest["scenario"].get("seed") or 0
        return {speed: interval_over_processes(values, seed=seed) for speed, values in ratios.items()}

    def exit_code(self) -> int:
        """0 all measured; 1 some check failed or was void; 4 some case crashed, ran out of memory or was not
        measured. 4 wins over 1. Call it after `summarise`: an ok case without a summary (all of its samples
        void, or none taken) was not measured.
        """
        cases = self.manifest["cases"].values()
        statuses = {case["status"] for case in cases}
        unmeasured = any(case["status"] == "ok" and case["summary"] is None for case in cases)
        if unmeasured or statuses & {"pending", "crashed", "out_of_memory"}:
            return exit_codes.FAULT
        return exit_codes.FAILED if statuses & {"check_failed", "check_void"} else exit_codes.OK


def _summarise_samples(samples: list[Sample], requests: int) -> dict[str, Interval]:
    """{metric: summary and tails} of one case: of `itl_ms` over the steps of all rounds, of one that samples may lack
    over those that have it."""
    figures: dict[str, Interval] = {}
    for name in named("sample"):
        if values := [value for one in samples for value in sample_values(name, one, requests)]:
            figures[name] = summary(values) | {key: tail(values, key) for key in tails_of(name) if key in TAILS}
    return figures


def _reference(members: list[Case], method: str, kernels: str) -> Case | None:
    """The first arm of `method` that ran with the same `kernels`."""
    return next((case for case in members if case["method"] == method and case["kernels"] == kernels), None)


def _check_manifest(manifest: Any, file: Path) -> None:
    """Raises RunDirectoryError where `manifest` is not a run of this schema version, with all fields."""

    def refuse(where: str, expected: str, got: Any) -> RunDirectoryError:
        return RunDirectoryError(f"{file}: {where}: expected {expected}, got {got}; {_ELSEWHERE}")

    if not isinstance(manifest, dict):
        raise refuse("the whole file", "a JSON object", type(manifest).__name__)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise RunDirectoryError(
            f"{file}: schema_version: expected {SCHEMA_VERSION}, got {manifest.get('schema_version')!r}; "
            f"read it with the perfbench that wrote it ({manifest.get('perfbench_version')}), or {_ELSEWHERE}"
        )
    if "kind" in manifest:
        raise RunDirectoryError(
            f"{file.parent}: a run of `perfbench {manifest['kind']}`, which has no cases; `perfbench show` prints it"
        )
    for field, kind in _MANIFEST_FIELDS.items():
        if not isinstance(manifest.get(field), kind):
            raise refuse(field, f"a value of type {kind.__name__}", type(manifest.get(field)).__name__)
    for case_id, case in manifest["cases"].items():
        if missing := _missing(case, _CASE_FIELDS):
            raise refuse(f"cases.{case_id}", "every field of a case", f"none called {missing}")
        if case["status"] not in STATUSES:
            raise refuse(f"cases.{case_id}.status", f"one of {', '.join(STATUSES)}", repr(case["status"]))
    for index, comparison in enumerate(manifest["comparisons"]):
        if missing := _missing(comparison, _COMPARISON_FIELDS):
            raise refuse(f"comparisons[{index}]", "every field of a comparison", f"none called {missing}")
        if missing := _missing(comparison["workload"], ("requests",)):
            raise refuse(f"comparisons[{index}].workload", "the number of requests", f"none called {missing}")
        if not isinstance(comparison["case_ids"], list):
            raise refuse(f"comparisons[{index}].case_ids", "a list", repr(comparison["case_ids"]))
        for case_id in comparison["case_ids"]:
            if not isinstance(case_id, str) or case_id not in manifest["cases"]:
                raise refuse(f"comparisons[{index}].case_ids", "ids of cases of this run", repr(case_id))


def _missing(value: Any, fields: Iterable[str]) -> str:
    """The `fields` that `value` lacks, as text: all of them where it is no object, "" where it has all."""
    return ", ".join(sorted(set(fields) - set(value if isinstance(value, dict) else ())))


def _refuse_not_finite(value: Any, place: str) -> None:
    """Raises ValueError that names the field where a float is not finite: JSON has no such number."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}: expected a finite number or null, got {value}")
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    for key, member in value.items() if isinstance(value, dict) else ():
        _refuse_not_finite(member, f"{place}.{key}")


def _unwritable(path: Path, error: OSError) -> RunDirectoryError:
    """One line for an OSError while writing: what can't be written, why, and what to do about it."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space and continue with --resume, or give an --out on another disk"
        return RunDirectoryError(f"{path}: disk full ({reason}); {remedy}")
    return RunDirectoryError(f"{path}: can't be written ({reason}); give an --out that you can write to")
