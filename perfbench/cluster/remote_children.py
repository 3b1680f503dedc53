"""Children on the nodes of a cluster, for the supervisor of a run: as perfbench.measure.children has them here.

Free of torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from perfbench.cluster import node, shared_paths
from perfbench.cluster.ray_cluster import RayCluster
from perfbench.measure.children import FRESH, WORKER_LOG, Children
from perfbench.run_folder.run_directory import RunDirectory


class RemoteChild:
    """One process on a node; what its libraries say is appended to `log` once it has ended."""

    jobs = 1

    def __init__(self, cluster: RayCluster, directory: RunDirectory):
        self.log = directory.path / WORKER_LOG
        self._cluster = cluster
        self._code = 0
        self._stream: Iterator[Any] | None = None

    def events(self, job: dict[str, Any], *, last: bool) -> Iterator[dict[str, Any]]:
        """What it says to a job, the node's own `machine` first; fewer where it dies. NodeLost, PerfbenchError."""
        assert last, "a child on a node takes one job"
        device = job["comparisons"][0]["device"].split(":")[0]
        shared = shared_paths.digests(job["comparisons"])
        self._stream = iter(self._cluster.events(FRESH, job, device, shared))
        for event in self._stream:
            if event["event"] == node.ENDED:
                self._code = event["code"]
                with self.log.open("a", encoding="utf-8") as said:
                    said.write(event["log"])
            else:
                yield event

    def wait(self) -> None:
        """Until it has ended by itself."""
        for event in self._stream or ():
            self._code = event.get("code", self._code)

    def end(self) -> int:
        """Ends it if it still lives. Its exit code."""
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()
        return self._code


class RemoteChildren(Children):
    """A fresh child on some node for each job; `at_once` of them side by side."""

    def __init__(self, cluster: RayCluster):
        super().__init__()
        self.cluster = cluster
        self.at_once = cluster.at_once

    def stop(self) -> None:
        """Ends those under way."""
        self.cluster.stop()

    def take(self, directory: RunDirectory) -> tuple[Any, int]:
        """A child for one job of `directory`, and its number among the processes of that run."""
        with directory.lock:
            number = directory.manifest["processes"]
            directory.manifest["processes"] += 1
            directory.write_manifest()
        return RemoteChild(self.cluster, directory), number
