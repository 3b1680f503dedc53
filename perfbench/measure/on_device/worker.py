"""The child process that touches the device: the comparisons of one backbone and workload, their arms in turn.

It reads a job (JSON) on standard input and writes events, one line of JSON each, to what was its standard output;
whatever the libraries print goes to standard error. The parent alone writes the run directory.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

Emit = Callable[..., None]

# Rounds of each case whose tokens are made again after the timing.
PROVED_ROUNDS = 2

# The statuses that a case can end with here; a crash is seen by the parent.
OUT_OF_MEMORY = "out_of_memory"


def main() -> int:
    """Runs the job on standard input; exit code 0 when it came to its end, 1 after an `error` event."""
    return serve(lambda emit: _run(json.load(sys.stdin), emit))


def serve(work: Callable[[Emit], None]) -> int:
    """Does `work` as a child process: its events, and how it ended, go to what was standard output, and whatever the
    libraries print to standard error. 0 after a `done` event, 1 after an `error` event."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan keeps a GPU busy
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's own chatter, before torch is imported
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    state: dict[str, Any] = {"case": None}

    def emit(event: str, **fields: Any) -> None:
        if event == "phase":
            state["case"] = fields["case"]
        _write(events, {"event": event, **fields})

    try:
        _load_libraries()
        work(emit)
    except Exception as error:
        kind = kind_of(error)
        emit("error", kind=kind, case=state["case"], message=said_of(error))
        if kind != "bad_input":
            raise
    else:
        emit("done")
        return 0
    return 1


def kind_of(error: Exception) -> str:
    """What an `error` event calls it: bad_input, out_of_memory or crashed."""
    from perfbench.errors import PerfbenchError

    if isinstance(error, PerfbenchError):
        return "bad_input"
    return OUT_OF_MEMORY if _is_out_of_memory(error) else "crashed"


def said_of(error: Exception) -> str:
    """It in one line: bad input says itself where it lies."""
    return str(error) if kind_of(error) == "bad_input" else f"{type(error).__name__}: {_first_line(error)}"


def _load_libraries() -> None:
    """What every job needs. Meanwhile no garbage is collected: there is none, and to look for it takes a quarter of the
    time."""
    gc.disable()
    try:
        from perfbench.measure.on_device import arms, memory, repetition  # noqa: F401
        from perfbench.proof import check  # noqa: F401
    finally:
        gc.enable()


def _write(events: TextIO, event: dict[str, Any]) -> None:
    events.write(json.dumps(event, allow_nan=False) + "\n")
    events.flush()


def _run(job: dict[str, Any], emit: Emit) -> None:
    from perfbench.measure.on_device import measured_roof
    from perfbench.spec import cases, method_plugins

    method_plugins.load_again(job["plugins"])
    comparisons = [cases.from_json(comparison) for comparison in job["comparisons"]]
    session = open_session(job, comparisons[0], emit)
    backbone = session.backbone
    roof = measured_roof.device_roof(backbone.device, session.dtype)
    emit("backbone", parameters=backbone.parameters, bytes=backbone.bytes, roof=vars(roof))
    passed = [case for comparison in comparisons for case in comparison.cases if session.prepare(case)]
    built = session.time(passed)
    session.prove_timed(passed, built)
    # Counting needs caches of other sizes: beside all the arms that were timed there may be no room for them.
    for case_id in list(built):
        built.pop(case_id).arm.close()
    session.prove_read(passed)
    session.count(passed)


def open_session(job: dict[str, Any], first: Any, emit: Emit) -> Session:
    """The backbone and the batch of a comparison, loaded, with the job's `threads` and `seed`. Of a comparison of
    several ranks this process is rank 0, and starts the others."""
    from perfbench.errors import PerfbenchError
    from perfbench.measure.on_device import ranks, repetition

    if (fault := repetition.clock_fault()) is not None:
        raise PerfbenchError(f"the clock: {fault}")
    emit("phase", case=None, text=f"loading {first.backbone}")
    others = ranks.Others(job, first) if first.tensor_parallel_size > 1 else None
    session = session_of_rank(job, first, emit, 0)
    if others is not None:
        session.backbone.rank = others.joined_by(session.backbone)
    _spare_from_collection()
    return session


def session_of_rank(job: dict[str, Any], first: Any, emit: Emit, rank: int) -> Session:
    """The same for one of the ranks, which share the threads, before it knows the others."""
    import torch
    import transformers

    from perfbench.measure.on_device import workload
    from perfbench.runtimes import backbone as backbones

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(max(1, job["threads"] // first.tensor_parallel_size))
    several_gpus = first.device == "cuda" and first.tensor_parallel_size > 1
    device = f"cuda:{rank}" if several_gpus else first.device
    if several_gpus:
        torch.cuda.set_device(rank)
    backbone = backbones.load(first.backbone, first.dtype, device, job["seed"], first.quantisation)
    return Session(job, first, backbone, workload.make(first.workload, backbone, job["seed"]), emit)


class Session:
    """One job: arms over one backbone and one batch; `first` is any of its comparisons."""

    def __init__(self, job: dict[str, Any], first: Any, backbone: Any, batch: Any, emit: Emit):
        self.job = job
        self.dtype, self.quantisation = first.dtype, first.quantisation
        self.resident = first.workload.resident
        self.ranks = first.tensor_parallel_size
        self.backbone = backbone
        self.batch = batch
        self.emit = emit
        self.nvml = _nvml(backbone.device)
        self.timed: dict[str, dict[int, Any]] = {}  # case id -> round -> the tokens that it made
        self.kept: Any = None  # what the oracle has answered

    def prepare(self, case: Any) -> bool:
        """Check and memory of one case, with only its arm resident. True where it may be timed.

        What an earlier child of this run has found is not measured again.
        """
        from perfbench.measure.on_device import memory
        from perfbench.proof import check
        from perfbench.spec.cases import source_of

        if (status := self.job["prepared"].get(case.id)) is not None:
            return bool(status == "ok")
        converting = "converting adapters to LoRA, and " if source_of(case) is not case else ""
        self.emit("phase", case=case.id, text=f"{converting}admitting tenants")
        built = self._build(case, figures=True)
        arm, batch, device = built.arm, built.batch, self.backbone.device
        self.emit("phase", case=case.id, text="checking")
        ask = self._oracle_of(case)
        found = check.check(arm, batch, self.resident, self.backbone, self.job["seed"], built.plan_of, ask)
        self.emit("phase", case=case.id, text="measuring memory")
        held = memory.resident_bytes(arm)
        peaks = memory.peaks(arm, batch, held, device, self.nvml)
        free = memory.free_bytes(device, peaks["peak_allocated_bytes"] - held)
        adapter_bytes = memory.adapter_bytes(arm, self.backbone.bytes)
        per_tenant = built.adapters["resident_bytes_per_tenant"]
        compile_ms = getattr(arm, "compile_ms", None)
        compiling = {} if compile_ms is None else {"compile_ms": compile_ms}
        self.emit(
            "case",
            case=case.id,
            status=found.status,
            reason=found.reason,
            check=found.to_json(),
            memory=peaks
            | {"adapter_bytes": adapter_bytes, "tenants_that_fit": free // per_tenant if per_tenant else None},
            adapters=built.adapters | compiling,
        )
        arm.close()
        return found.status == "ok"

    def count(self, cases: list[Any]) -> None:
        """The exact figures of each case that has none yet, with only its arm resident. After the timing, since the
        profiler that counts launches stays in the process once it has run, and may slow what follows."""
        from perfbench.measure.on_device import counts

        for case in cases:
            if case.id in self.job["counted"]:
                continue
            self.emit("phase", case=case.id, text="counting operations")
            own = self._build(case)
            exact = counts.decode_step(own.arm, own.batch, self.backbone.device) | self._least(own)
            # The counter does not know every operation, none of Triton's kernels for one; the least was surely done.
            exact["flops_per_decode_step"] = max(exact["flops_per_decode_step"], exact["least_flops_per_decode_step"])
            self.emit("counted", case=case.id, exact=exact)
            own.arm.close()

    def count_instructions(self, cases: list[Any], counter: str) -> None:
        """The instructions of each case's last decode step, told by one of `machine.instructions.COUNTERS`."""
        from perfbench.errors import PerfbenchError
        from perfbench.machine.instructions import COUNTERS
        from perfbench.measure.on_device import counts

        if self.backbone.device.type != "cpu":
            raise PerfbenchError(
                "--instructions: needs device cpu; beside another the host waits, and counts its waiting"
            )
        open_counter = COUNTERS[counter]()
        for case in cases:
            self.emit("phase", case=case.id, text="counting instructions")
            own = self._build(case)
            found = counts.instructions(own.arm, own.batch, open_counter)
            self.emit("counted", case=case.id, exact={"instructions_per_decode_step": found})
            own.arm.close()

    def _least(self, built: Any) -> dict[str, Any]:
        """What the first and the last decode step must at least read and compute."""
        from perfbench.figures.roof import decode_step

        batch, served = built.batch, [slot for slot in built.batch.slots if slot != -1]
        alike: dict[int, tuple[Any, list[int]]] = {}  # by the sizes of their adapters
        for slot in served if built.sizes else []:
            sizes = built.sizes[slot]
            alike.setdefault(id(sizes), (sizes, []))[1].append(slot)
        adapters = list(alike.values())
        first, last, bare = (
            decode_step(
                self.backbone.model.config.to_dict(),
                self.dtype,
                prompt_tokens=batch.attention_mask.sum(dim=1).tolist(),
                generated_tokens=generated,
                beams=batch.beams,
                adapters=own,
                quantisation=self.quantisation,
                ranks=self.ranks,
            )
            for generated, own in ((0, adapters), (batch.new_tokens - 2, adapters), (batch.new_tokens - 2, []))
        )
        return {
            "bytes_per_first_decode_step": first.bytes,
            "least_flops_per_first_decode_step": first.flops,
            "bytes_per_decode_step": last.bytes,
            "least_flops_per_decode_step": last.flops,
            "kept_bound": bare.bytes / last.bytes,
        }

    def time(self, cases: list[Any]) -> dict[str, Any]:
        """Warm-up, then the rounds that are still missing; in each, every arm once, in an order drawn for it.
        {case id: its arm, still resident} of those that were timed."""
        missing = {case.id: set(self.job["rounds"]) - set(self.job["done"][case.id]) for case in cases}
        cases = [case for case in cases if missing[case.id]]
        built = self.warm_up(cases)
        for number in self.job["rounds"]:
            turn = [case for case in cases if number in missing[case.id]]
            random.Random(f"{self.job['seed']}/{number}").shuffle(turn)
            for case in turn:
                self.emit("phase", case=case.id, text=f"round {number + 1} of {self.job['last_round'] + 1}")
                done = self.repetition(built[case.id], number)
                self.timed.setdefault(case.id, {})[number] = done.tokens
                self.emit("sample", case=case.id, round=number, **done.sample)
        return built

    def prove_timed(self, cases: list[Any], built: dict[str, Any]) -> None:
        """That what was timed was the real thing, for each case of which this is not known yet. Of a few rounds, drawn
        by lot, the tokens that were made in the window are made again without a clock, by the arm as it is resident
        beside the others, and must be the same; and of one request the oracle must agree with that arm."""
        from perfbench.proof import check

        for case in cases:
            rounds = self.timed.get(case.id, {})
            if not rounds and case.id in self.job["proved"]:
                continue
            self.emit("phase", case=case.id, text="proving what was timed")
            own = built[case.id] if case.id in built else self._build(case)
            if not rounds:  # an earlier child took the samples and died before it came to this
                rounds = self.timed[case.id] = {0: self.repetition(own, 0).tokens}
            lot = random.Random(f"{self.job['seed']}/{case.id}")
            drawn = sorted(lot.sample(sorted(rounds), min(PROVED_ROUNDS, len(rounds))))
            fault = None
            for number in drawn:
                batch, request = self._batch_of(own, number), lot.randrange(len(own.batch.slots))
                found = check.as_timed(own.arm, batch, rounds[number], request, self.backbone, own.plan_of)
                if found is not None:
                    fault = f"round {number + 1}: {found}"
                    break
            alike = [other for other in cases if self._is_of_peft_and_like(case, other)]
            unlike = [self._parted(case, own, other, built) for other in alike]
            fault = next((found for found in (fault, *unlike) if found is not None), None)
            same = {"same_tokens_as": [other.id for other in alike]} if alike else {}
            self.emit("proved", case=case.id, rounds=drawn, reason=fault, **same)
            if case.id not in built:
                own.arm.close()

    def _is_of_peft_and_like(self, case: Any, other: Any) -> bool:
        """Whether PEFT serves the adapters of `case`, and perfbench the same ones in `other`."""
        from perfbench.methods.registry import METHODS

        method, another = METHODS[case.method], METHODS[other.method]
        same = (method.module, case.options) == (another.module, other.options)
        return same and method.served_by in ("peft", "peft-single") and another.served_by == "plan"

    def _parted(self, case: Any, own: Any, other: Any, built: dict[str, Any]) -> str | None:
        """Where PEFT's arm of `case` and that of `other`, which hold the same adapters, chose other tokens for the same
        prompts in any round that both were timed in. Which of them is wrong nothing says: the other fails here too."""
        from perfbench.proof import same_adapters

        made = built[other.id] if other.id in built else self._build(other)
        theirs, ours = self.timed[case.id], self.timed.get(other.id, {})
        if not set(ours) & set(theirs):  # an earlier child timed the other one
            ours = {number: self.repetition(made, number).tokens for number in [min(theirs)]}
        fault = None
        for number in sorted(set(ours) & set(theirs)):
            pair = (ours[number], theirs[number])
            batch = self._batch_of(made, number)
            parted = same_adapters.parted(batch, own.batch.slots, *pair, self.backbone, made.plan_of)
            if parted:
                where = f"round {number + 1}: request(s) {', '.join(map(str, parted))}: other tokens than"
                fault = f"{where} {other.id} with the same adapters"
                self.emit("proved", case=other.id, rounds=[], reason=f"{where} {case.id} with the same adapters")
                break
        if other.id not in built:
            made.arm.close()
        return fault

    def prove_read(self, cases: list[Any]) -> None:
        """That adapters out of folders are those that PEFT reads there, one request of each sampled tenant; with no
        arm resident, since the weights are loaded once more for it."""
        from functools import partial

        from perfbench.measure.on_device import arms, workload
        from perfbench.measure.on_device.adapter_folders import adapter_folders
        from perfbench.proof import by_peft, check
        from perfbench.runtimes import backbone as backbones
        from perfbench.spec.cases import source_of

        fresh = None
        for case in map(source_of, cases):
            if getattr(case.options, "adapters", None) is None or case.id in self.job["proved"]:
                continue
            self.emit("phase", case=case.id, text="reading the adapters with PEFT")
            own = self.backbone
            fresh = fresh or backbones.load(own.name, self.dtype, str(own.device), self.job["seed"], self.quantisation)
            every = adapter_folders(case.options.adapters, case.method, self.resident)
            sampled = check.sample(self.batch.slots, self.job["seed"])[: check.SAMPLED_REQUESTS]
            folders = {i: every[self.batch.slots[i]] for i in sampled if self.batch.slots[i] != -1}
            plan_of = partial(arms.plan_of_tenant, case, own, self.resident, self.job["seed"])
            invocations = {slot: plan_of(slot)[0].invocation for slot in {self.batch.slots[i] for i in folders}}
            batch = workload.invoked(self.batch, invocations.get)
            fault = by_peft.fault_of(fresh, own, batch, folders, plan_of)
            self.emit("proved", case=case.id, rounds=[], read_by_peft=len(folders), reason=fault)

    def warm_up(self, cases: list[Any]) -> dict[str, Any]:
        """{case id: its arm, built, warm and resident}."""
        # All are built before any warms up: an arm that makes room for its adapters moves the weights of all.
        built = {}
        for case in cases:
            self.emit("phase", case=case.id, text="admitting tenants beside the other arms")
            built[case.id] = self._build(case)
        _spare_from_collection()
        for case in cases:
            self.emit("phase", case=case.id, text="warming up")
            for turn in range(self.job["warmup"]):
                self.repetition(built[case.id], -1 - turn)
        _spare_from_collection()
        return built

    def repetition(self, built: Any, turn: int) -> Any:
        """One timed repetition of a built arm, on the prompts of this turn: `measure.repetition`'s."""
        from perfbench.measure.on_device import repetition

        return repetition.repetition(built.arm, self._batch_of(built, turn), self.backbone.device, self.nvml)

    def _batch_of(self, built: Any, turn: int) -> Any:
        """The arm's batch with the prompts of a turn, which all arms have in common."""
        from perfbench.measure.on_device import workload

        return workload.fresh(built.batch, self.job["seed"], turn)

    def _oracle_of(self, case: Any) -> Any:
        """The oracle, which knows what it has answered of an earlier arm with the same adapters: one of the same
        method's file and options, since nothing else makes them, whatever serves them."""
        from perfbench.methods.registry import METHODS
        from perfbench.proof.answers import Kept, Oracle

        self.kept = self.kept or Kept()
        return Oracle(self.backbone, (METHODS[case.method].module, case.options), self.kept)

    def _build(self, case: Any, *, figures: bool = False) -> Any:
        from perfbench.measure.on_device import arms

        if self.backbone.rank is not None:
            self.backbone.rank.build(case.id)
        with tempfile.TemporaryDirectory(prefix="perfbench-") as scratch:
            seed = self.job["seed"]
            return arms.build(case, self.backbone, self.batch, self.resident, seed, Path(scratch), figures=figures)


def _spare_from_collection() -> None:
    """What is here now, the libraries' objects too, stays: without it, each of the collections that follow, one before
    every repetition, takes longer than a short repetition."""
    gc.collect()
    gc.freeze()


def _nvml(device: Any) -> Any:
    import torch

    from perfbench.machine.nvml import Nvml

    if device.type != "cuda":
        return None
    return Nvml.open(str(torch.cuda.get_device_properties(device).uuid))


def _is_out_of_memory(error: BaseException) -> bool:
    """torch's CPU allocator raises a plain RuntimeError, which only its text tells apart."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


if __name__ == "__main__":
    sys.exit(main())
