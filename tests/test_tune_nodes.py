"""A search of one's own on a cluster of several nodes, one of which is lost with the trial on it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from test_transport_nodes import nodes, wait_for
from test_tune import EVERY, STEPS, based, plain

import bomemeta.tune

__all__ = ["nodes"]  # the fixture


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow(reason="four nodes, two trials: pytest -m slow tests/test_tune_nodes.py")
def test_a_trial_outlives_its_node(nodes: Cluster, tmp_path: Path) -> None:
    from ray import tune

    there = [nodes.add_node(num_cpus=2) for _ in range(3)]  # one for each trial, and one more
    wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == 4)
    mark, killed = tmp_path / "mark.0", list[Any]()
    problem = {"doom_step": 6, "doom": "wait", "doom_mark": str(tmp_path / "mark")}
    function = bomemeta.tune.trainable(
        based(problem=problem)["base"],
        ["solver.inner_steps=3", "workers=2"],
        report_every_steps=EVERY,
        driver_cpus=0.5,
    )

    def strike() -> None:
        """The first trial to come to step 6 stands still there: its node goes."""
        wait_for(lambda: mark.exists() and mark.read_text(), 600)
        raylet = parent_of(int(mark.read_text()))
        killed.extend(
            node for node in there if node.all_processes["raylet"][0].process.pid == raylet
        )
        nodes.remove_node(killed[0], allow_graceful=False)

    killer = threading.Thread(target=strike)
    killer.start()
    rates = [0.02, 0.03]
    results = tune.Tuner(
        function,
        param_space={"solver": {"upper_lr": tune.grid_search(rates)}},
        run_config=tune.RunConfig(
            name="own",
            storage_path=str(tmp_path),
            failure_config=tune.FailureConfig(max_failures=3),
            verbose=0,
        ),
    ).fit()
    killer.join()
    assert len(killed) == 1
    for rate, result in zip(rates, results, strict=True):
        metrics = result.metrics
        assert (result.error, metrics["steps"], metrics["ended"]) == (None, STEPS, "done")
        values = {"solver.upper_lr": rate, "solver.inner_steps": 3}
        assert metrics["upper_sha256"] == plain(values, tmp_path / f"{rate}").upper_sha256
