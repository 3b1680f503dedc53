"""The ranks of a tensor-parallel backbone: processes that each serve a part of it.

Rank 0 is the process that measures, proves and speaks. It starts the others, which build the arms that it builds and
generate whenever it generates, and do nothing else: what to do next is decided in one place, so that no two ranks can
ever wait for different things. The others answer with the tokens that they chose, which must be those of rank 0.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from perfbench.errors import PerfbenchError
from perfbench.methods.bank import Bank
from perfbench.methods.share import Share
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.generation import Batch, Generation, StepClock
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.static.rank import Rank

# How long a rank waits for another one, and how long for the last words of one that has died.
PATIENCE_S = 300
LAST_WORDS_S = 10

# Device kind -> what adds up over processes there.
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


class Leader(Rank):
    """Rank 0, whose arms take the other ranks along."""

    def __init__(self, whole: Backbone, share: Share, others: Others):
        super().__init__(whole, share, add_up)
        self.others = others
        self._built = 0

    def build(self, case_id: str) -> None:
        """Has the others build the arm of that case; the next of `arm` is this one's."""
        self._built += 1
        self.others.tell("build", self._built, case_id)

    def arm(self, bank: Bank | None, kernels: str) -> StaticArm:
        return LeadingArm(self.part, bank, kernels, self.others, self._built)


class LeadingArm(StaticArm):
    """Rank 0's part of an arm: what it is asked, it asks the others first."""

    def __init__(self, part: Backbone, bank: Bank | None, kernels: str, others: Others, number: int):
        super().__init__(part, bank, kernels)
        self._others, self._number = others, number

    def generate(
        self,
        batch: Batch,
        *,
        clock: StepClock | None = None,
        forced: torch.Tensor | None = None,
        with_logits: bool = False,
    ) -> Generation:
        """As StaticArm's. To tell the other ranks is part of the call and its time."""
        asked = {"batch": _plain(batch), "forced": _array(forced), "with_logits": with_logits}
        return self._others.together(
            ("generate", self._number, asked),
            lambda: super(LeadingArm, self).generate(batch, clock=clock, forced=forced, with_logits=with_logits),
        )

    def follow_up(
        self,
        generated: torch.Tensor,
        *,
        clock: StepClock | None = None,
        forced: torch.Tensor | None = None,
        with_logits: bool = False,
    ) -> Generation:
        """As StaticArm's, likewise."""
        asked = {"generated": _array(generated), "forced": _array(forced), "with_logits": with_logits}
        return self._others.together(
            ("follow_up", self._number, asked),
            lambda: super(LeadingArm, self).follow_up(generated, clock=clock, forced=forced, with_logits=with_logits),
        )

    def close(self) -> None:
        self._others.tell("close", self._number)
        super().close()


class Others:
    """The processes of the ranks from 1 on, as rank 0 sees them. They end with this one."""

    def __init__(self, job: dict[str, Any], first: Any):
        """Starts them; they load the backbone of the comparison `first` of `job` while the caller does."""
        self.ranks: int = first.tensor_parallel_size
        _expect_devices(first.device, self.ranks)
        self._meeting = Path(tempfile.mkdtemp(prefix="perfbench-ranks-"))
        self._awaited: torch.Tensor | None = None
        self._links: list[Connection] = []
        self.processes: list[Any] = []
        context = get_context("spawn")
        for rank in range(1, self.ranks):
            here, there = context.Pipe()
            process = context.Process(target=follow, args=(rank, job, self._meeting / "place", there), daemon=True)
            process.start()
            there.close()
            self._links.append(here)
            self.processes.append(process)

    def joined_by(self, whole: Backbone) -> Leader:
        """Rank 0, once all others are ready and have met. What `together` raises, where one is not."""
        for rank in range(1, self.ranks):
            self._answer_of(rank)
        meet(0, self.ranks, self._meeting / "place", whole.device)
        return Leader(whole, Share(0, self.ranks), self)

    def end(self) -> None:
        """Ends them, and lets this process meet others."""
        for process in self.processes:
            process.kill()
            process.join()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        # Not before: a rank that was slower to meet, or that adds up for the first time, still looks there.
        shutil.rmtree(self._meeting, ignore_errors=True)

    def tell(self, *said: Any) -> None:
        """Sends a call to all, once they have done what they were told before. As `together` where one has failed."""
        self._settle()
        for rank, link in enumerate(self._links, 1):
            try:
                link.send(said)
            except OSError as error:
                raise self._fault_of(rank) or error from None

    def together(self, said: tuple[Any, ...], act: Callable[[], Generation]) -> Generation:
        """What `act` gives here while the others do as they are told.

        RuntimeError that names the rank which died, erred, or chose other tokens than this one did; MemoryError where
        it ran out of memory, PerfbenchError where its input was bad.
        """
        self.tell(*said)
        try:
            found = act()
        except RuntimeError as error:
            raise self._first_fault() or error from error
        self._awaited = found.tokens
        return found

    def _settle(self) -> None:
        """Takes the others' answers to the last call, which must be this rank's own."""
        if self._awaited is None:
            return
        own, self._awaited = self._awaited.cpu(), None
        for rank in range(1, self.ranks):
            if not torch.equal(torch.from_numpy(self._answer_of(rank)), own):
                raise RuntimeError(f"rank {rank} of {self.ranks} chose other tokens than rank 0")

    def _answer_of(self, rank: int) -> Any:
        link = self._links[rank - 1]
        if not link.poll(PATIENCE_S):
            raise RuntimeError(f"rank {rank} of {self.ranks} has said nothing for {PATIENCE_S} s")
        try:
            kind, answer = link.recv()
        except (EOFError, OSError) as error:
            raise self._fault_of(rank) or error from None
        if kind != "answer":
            raise _fault(kind, f"rank {rank} of {self.ranks}: {answer}")
        return answer

    def _first_fault(self) -> Exception | None:
        """Why a sum over the ranks failed here: it fails in all of them where one has died, which has no words left."""
        connection.wait([process.sentinel for process in self.processes], LAST_WORDS_S)
        ranks = sorted(range(1, self.ranks), key=lambda rank: self.processes[rank - 1].exitcode or 0)
        return next((fault for rank in ranks if (fault := self._fault_of(rank)) is not None), None)

    def _fault_of(self, rank: int) -> Exception | None:
        """Why that rank has ended, or is about to; None where it has not."""
        link, process = self._links[rank - 1], self.processes[rank - 1]
        while link.poll(LAST_WORDS_S):
            try:
                kind, said = link.recv()
            except (EOFError, OSError):
                process.join(LAST_WORDS_S)
                break
            if kind != "answer":
                return _fault(kind, f"rank {rank} of {self.ranks}: {said}")
        code = process.exitcode
        if code is None:
            return None
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return RuntimeError(f"rank {rank} of {self.ranks} {how}")


def _fault(kind: str, message: str) -> Exception:
    return {"bad_input": PerfbenchError, "out_of_memory": MemoryError}.get(kind, RuntimeError)(message)


def add_up(tensor: torch.Tensor) -> None:
    """The sum over all ranks, in place; the same bits on each of them."""
    torch.distributed.all_reduce(tensor)


def meet(rank: int, ranks: int, place: Path, device: torch.device) -> None:
    """Joins the group of all ranks, which find each other by the file `place`."""
    # The ranks are on this machine: no other interface is asked for.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.distributed.init_process_group(
        BACKENDS[device.type],
        init_method=place.absolute().as_uri(),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=PATIENCE_S),
    )


def _expect_devices(kind: str, ranks: int) -> None:
    if kind == "cuda" and (there := torch.cuda.device_count()) < ranks:
        raise PerfbenchError(f"tensor_parallel_size: expected at most {there}, the GPUs of this machine, got {ranks}")


def follow(rank: int, job: dict[str, Any], place: Path, link: Connection) -> None:
    """The life of a process of another rank than 0."""
    from perfbench.measure.on_device import worker

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with rank 0, whatever ends that
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 hears it, and ends
    try:
        _serve(rank, job, place, link)
    except (EOFError, BrokenPipeError):
        return  # rank 0 has ended
    except Exception as error:
        link.send((worker.kind_of(error), worker.said_of(error)))
        raise


def _serve(rank: int, job: dict[str, Any], place: Path, link: Connection) -> None:
    """Does what rank 0 says, until it has ended."""
    from perfbench.measure.on_device import worker
    from perfbench.spec import cases, method_plugins

    method_plugins.load_again(job["plugins"])
    comparisons = [cases.from_json(comparison) for comparison in job["comparisons"]]
    of_id = {case.id: case for comparison in comparisons for case in comparison.cases}
    session = worker.session_of_rank(job, comparisons[0], lambda event, **fields: None, rank)
    whole, ranks = session.backbone, comparisons[0].tensor_parallel_size
    link.send(("answer", None))
    meet(rank, ranks, place, whole.device)
    whole.rank = Follower(whole, Share(rank, ranks), add_up)
    arms: dict[int, StaticArm] = {}
    gc.disable()  # as in rank 0 while it times: between two calls there is time
    while True:
        call, number, *asked = link.recv()
        if call == "build":
            arms[number] = session._build(of_id[asked[0]]).arm
            gc.collect()
            gc.freeze()
        elif call == "close":
            arms.pop(number).close()
        else:
            found = getattr(arms[number], call)(**_arguments(asked[0], whole.device))
            link.send(("answer", found.tokens.cpu().numpy()))
            gc.collect()


class Follower(Rank):
    """Another rank, which builds what it is told to and tells nobody."""

    def build(self, case_id: str) -> None:
        """Nobody follows."""


def _array(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.cpu().numpy()


def _plain(batch: Batch) -> Batch:
    """The same with arrays in the place of tensors, for another process."""
    ids, mask, follow_up = map(_array, (batch.input_ids, batch.attention_mask, batch.follow_up))
    return replace(batch, input_ids=ids, attention_mask=mask, follow_up=follow_up)


def _arguments(asked: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Of `generate` or `follow_up`, with tensors on `device` again."""

    def tensor(array: Any) -> Any:
        return None if array is None else torch.from_numpy(array).to(device)

    found = {key: value if key in ("batch", "with_logits") else tensor(value) for key, value in asked.items()}
    if (batch := found.get("batch")) is not None:
        own = {name: tensor(getattr(batch, name)) for name in ("input_ids", "attention_mask", "follow_up")}
        found["batch"] = replace(batch, **own)
    return found
