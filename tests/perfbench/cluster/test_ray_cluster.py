"""A real Ray cluster of two nodes, both on this machine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perfbench import api
from perfbench.cluster import ray_cluster
from perfbench.cluster.remote_children import RemoteChildren
from perfbench.errors import PerfbenchError
from perfbench.measure import run
from perfbench.measure.children import Children
from perfbench.run_folder.run_directory import RunDirectory

SCENARIO = {
    "backbone": "llama-tiny", "dtype": ["fp32", "bf16"], "device": "cpu", "methods": ["lora"],
    "workload": {"prompt_tokens": 5, "new_tokens": 6, "requests": 2, "tenants": 2, "resident": 2},
    "warmup": 1, "repetitions": 8,
}  # fmt: skip


def prepared(**changed: Any) -> api.Prepared:
    return api.prepare(SCENARIO | changed, say=lambda text: None)


def test_without_ray_one_line_says_how_to_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: None)
    with pytest.raises(PerfbenchError, match=r"^--cluster: needs Ray.*pip install 'adapter-perfbench\[cluster\]'$"):
        prepared().measure(tmp_path / "out", cluster="local", say=lambda text: None)
    assert not (tmp_path / "out").exists()


def test_a_comparison_goes_on_on_the_same_kind_of_machine_only(tmp_path: Path) -> None:
    """What was measured here may not go on on a node of another kind, nor the other way round."""
    scenario = prepared(dtype="fp32", repetitions=1)
    done = scenario.measure(tmp_path / "out", say=lambda text: None)
    directory = RunDirectory.open(done.path)
    (entry,) = directory.manifest["comparisons"]
    other = json.loads(json.dumps(directory.manifest["environment"]))
    supervisor = run.Supervisor(directory, scenario.scenario, None, RemoteChildren(ray_cluster.RayCluster(2)))  # type: ignore[arg-type]
    supervisor._expect_same_machine(entry, other)
    other["cpu"]["model"] = "Another Processor"
    with pytest.raises(PerfbenchError, match=r"was begun on .*, and would go on on Another Processor, .* threads"):
        supervisor._expect_same_machine(entry, other)
    entry["machine"] = other  # begun on that node, and resumed here
    directory.write_manifest()
    with pytest.raises(PerfbenchError, match="was begun on Another Processor"):
        scenario.measure(tmp_path / "out", resume=True, say=lambda text: None)


def test_an_error_of_one_job_ends_the_others() -> None:
    """So does Ctrl-C: whoever waits for a node would wait until it is done."""
    ended = threading.Event()

    class Two(Children):
        at_once = 2

        def stop(self) -> None:
            ended.set()

    def job(number: Any) -> None:
        if number == 1:
            raise PerfbenchError("this one")
        assert ended.wait(20), "nobody ended it"

    with pytest.raises(PerfbenchError, match="this one"):
        run._run_all([2, 1], Two(), job)  # type: ignore[list-item]
    assert ended.is_set()


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two nodes of one processor each, on this host, as Ray's own tests start them."""
    pytest.importorskip("ray", reason="Ray is not installed: the extra `cluster`")
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    found.add_node(num_cpus=1)
    yield found
    found.shutdown()


def rounds_of(path: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for sample in RunDirectory.open(path).samples():
        found.setdefault(sample["case"], []).append(sample["round"])
    return found


@pytest.mark.cluster
def test_two_nodes_of_one_host_never_time_side_by_side(cluster: Any, tmp_path: Path) -> None:
    scenario = prepared()
    done = scenario.measure(tmp_path / "out", cluster=cluster.address, say=lambda text: None)
    assert done.exit_code == 0
    assert {case: sorted(rounds) for case, rounds in rounds_of(done.path).items()} == {
        case: list(range(8)) for case in scenario.case_ids
    }
    manifest = RunDirectory.open(done.path).manifest
    assert all(entry["machine"]["cpu"]["threads"] for entry in manifest["comparisons"])
    # The samples of a comparison stand together: the second one waited for the first.
    order = [sample["process"] for sample in RunDirectory.open(done.path).samples()]
    assert order == sorted(order) or order == sorted(order, reverse=True)
    assert set(order) == {0, 1}


@pytest.mark.cluster
def test_a_node_that_is_lost_costs_the_sample_in_flight(cluster: Any, tmp_path: Path) -> None:
    scenario = prepared(dtype="fp32", repetitions=60)
    out = tmp_path / "out"
    node = next(one for one in cluster.list_all_nodes() if not one.head)

    def end_it_once_something_is_timed() -> None:
        while not (out / "samples.jsonl").exists():
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=end_it_once_something_is_timed)
    killer.start()
    done = scenario.measure(out, cluster=cluster.address, say=lambda text: None)
    killer.join()
    assert done.exit_code == 0
    assert {case: sorted(rounds) for case, rounds in rounds_of(out).items()} == {
        case: list(range(60)) for case in scenario.case_ids
    }


@pytest.mark.cluster
def test_a_device_that_no_node_has_is_named(cluster: Any) -> None:
    with (
        ray_cluster.connected(cluster.address) as connection,
        pytest.raises(PerfbenchError, match="no node of the cluster has a GPU"),
    ):
        list(connection.events("json", {}, "cuda", {}))


@pytest.mark.cluster
@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "127.0.0.1:99999999"])
def test_where_no_cluster_answers_one_line_says_so(address: str, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: the extra `cluster`")
    with pytest.raises(PerfbenchError, match=rf"^--cluster {address}: expected local, auto or the HOST:PORT"):
        prepared().measure(tmp_path / "out", cluster=address, say=lambda text: None)
    assert not (tmp_path / "out").exists()
