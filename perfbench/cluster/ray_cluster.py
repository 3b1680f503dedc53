"""A connection to a Ray cluster, and jobs that run on its nodes. Free of torch; imports Ray, which is an extra.

Ray is imported by nothing else, and only where a command has `--cluster`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

from perfbench.cluster import node
from perfbench.errors import PerfbenchError
from perfbench.files.plain_text import printable
from perfbench.machine import environment
from perfbench.measure.children import NodeLost

LOCAL, AUTO = "local", "auto"
OPTION = "--cluster"
_ANSWER_S = 10.0


class RayCluster:
    """A cluster that is connected; `at_once`: how many jobs may be under way, one for each node."""

    def __init__(self, at_once: int):
        self.at_once = at_once
        self._under_way: list[Any] = []
        self._stopped = False

    def stop(self) -> None:
        """Ends what is under way; who reads its events gets a PerfbenchError, and no other job begins."""
        import ray

        self._stopped = True
        for stream in list(self._under_way):
            with suppress(Exception):  # it has ended meanwhile
                ray.cancel(stream, force=True)

    def events(self, module: str, job: Mapping[str, Any], device: str, shared: Mapping[str, str]) -> Iterator[Any]:
        """What `node.measure` yields on a node that has what `device` needs, until it ends.

        shared: {path: hash} that the node must have too. NodeLost where the node is gone, PerfbenchError where no node
        can ever take the job, or where this one has other code, packages or files.
        """
        import ray

        needs = self._needs(device)
        task = ray.remote(node.measure_checked).options(max_retries=0, num_returns="streaming", **needs)
        if self._stopped:
            raise PerfbenchError(f"{OPTION}: the jobs were ended")
        stream = task.remote(module, dict(job), device, environment.variables(), expected(shared))
        self._under_way.append(stream)
        try:
            for reference in stream:
                yield ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise PerfbenchError(f"{OPTION}: {_first_line(error)}") from error
        except ray.exceptions.RayError as error:
            if self._stopped:
                raise PerfbenchError(f"{OPTION}: the jobs were ended") from error
            # What follows the first sentence are addresses and Ray's own commands.
            raise NodeLost(_first_line(error).split(". ")[0]) from error
        finally:
            self._under_way.remove(stream)
            with suppress(Exception):
                ray.cancel(stream, force=True)

    def _needs(self, device: str) -> dict[str, float]:
        """What Ray is asked for: a GPU for a case on one; on a CPU all processors of the smallest node, since nothing
        may run beside what is timed. PerfbenchError where no node has it."""
        import ray

        alive = [one["Resources"] for one in ray.nodes() if one["Alive"]]
        if device == "cuda":
            if not any(one.get("GPU", 0) >= 1 for one in alive):
                raise PerfbenchError(
                    f"{OPTION}: no node of the cluster has a GPU (nodes: {len(alive)}), and the cases run on one; "
                    "start such a node, or measure with --set device=cpu"
                )
            return {"num_gpus": 1, "num_cpus": 1}
        processors = [one["CPU"] for one in alive if one.get("CPU", 0) >= 1]
        if not processors:
            raise PerfbenchError(f"{OPTION}: no node of the cluster has a CPU for tasks; start one with --num-cpus")
        return {"num_cpus": min(processors)}


@contextmanager
def connected(address: str) -> Iterator[RayCluster]:
    """The cluster at `address`: HOST:PORT, `auto` for the one that runs on this machine, `local` for one that is
    started here and ends with this context, on the loopback, without a dashboard.

    PerfbenchError where Ray is not installed, or where no cluster answers at the address.
    """
    if find_spec("ray") is None:
        raise PerfbenchError(f"{OPTION}: needs Ray, which is not installed; pip install 'adapter-perfbench[cluster]'")
    # Read by Ray when it starts: it would report to its makers, and take GPUs away from tasks that ask for none.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    _expect_an_answer(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    try:
        if address == LOCAL:
            ray.init(
                address="local",
                num_cpus=environment.threads(),
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise _no_answer(address, error) from None
    try:
        yield RayCluster(max(1, sum(1 for one in ray.nodes() if one["Alive"])))
    finally:
        ray.shutdown()


def _expect_an_answer(address: str) -> None:
    """PerfbenchError where nobody listens at HOST:PORT: Ray itself would try for minutes, and say nothing."""
    host, _, port = address.rpartition(":")
    if address in (LOCAL, AUTO):
        return
    try:
        with socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=_ANSWER_S):
            return
    except (OSError, ValueError, OverflowError) as error:
        raise _no_answer(address, error) from None


def _no_answer(address: str, error: BaseException) -> PerfbenchError:
    return PerfbenchError(
        f"{OPTION} {printable(address)}: expected {LOCAL}, {AUTO} or the HOST:PORT of a cluster, and none answers "
        f"there ({_first_line(error)}); start one with `ray start --head`, or give `{LOCAL}`"
    )


def expected(shared: Mapping[str, str]) -> dict[str, Any]:
    """What a node is asked to have: this code, these versions of the packages, and the files of `shared`."""
    return {"code": node.code(), "versions": environment.versions(), "shared": dict(shared)}


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    return printable((str(cause).strip().splitlines() or [type(cause).__name__])[0])
