"""Ray's own metrics: what a run shows is read back from the node's metrics port, as Prometheus reads
it.
"""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import ray
from test_promises import FEW_SHOT, STEPS, struck

import bomemeta
from bomemeta.distributed import cluster, gauges
from bomemeta.distributed.cluster import RayOptions
from bomemeta.environment import RESTARTS
from bomemeta.metrics import read_metrics

BOARD = Path(__file__).parents[1] / "launch" / "grafana.json"


def exported(run: str) -> dict[str, float]:
    """The run's numbers at this node's metrics port, by name and part of the step."""
    own = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == own]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        text = urllib.request.urlopen(address, timeout=30).read().decode()
    except OSError:  # the agent is not there yet
        return {}
    found = {}
    for name, tags, value in re.findall(r"^(ray_bomemeta_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        if f'run="{run}"' in tags:
            part = re.search(r'\bpart="(\w+)"', tags)
            found[f"{name} {part[1]}" if part else name] = float(value)
    return found


def test_a_run_is_seen_at_the_metrics_port(tmp_path, monkeypatch):
    monkeypatch.setenv(RESTARTS, "2")
    keys = [f"output_dir={tmp_path / 'run'}", "workers=1", "cpus_per_worker=0.5"]
    keys += ["evaluation.every_steps=4", "evaluation.validation_episodes=4"]
    with cluster.local(RayOptions(workers=1, cpus_per_worker=0.5), print):
        result = bomemeta.train(FEW_SHOT, keys + struck("SIGKILL", tmp_path / "mark"))
        assert result.run_dir is not None
        last = read_metrics(result.run_dir / "metrics.jsonl")[-1]
        wanted = {
            "ray_bomemeta_step": STEPS,
            "ray_bomemeta_multiplier": last["multiplier"],
            "ray_bomemeta_gap": last["gap"],
            "ray_bomemeta_validation_accuracy": last["validation_accuracy"],
            "ray_bomemeta_workers_alive": 1.0,
            "ray_bomemeta_workers_lost_total": 1.0,
            "ray_bomemeta_restarts": 2.0,
            **{
                f"ray_bomemeta_step_seconds {part}": last[metric]
                for part, metric in gauges.PARTS.items()
            },
        }
        assert {name.partition(" ")[0] for name in wanted} == gauges.exported()
        deadline = time.monotonic() + 120
        while (found := exported(str(result.run_dir))) != wanted:
            assert time.monotonic() < deadline, (found, wanted)
            time.sleep(0.5)


def test_the_dashboard_asks_for_these_names():
    board = json.loads(BOARD.read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [variable["query"] for variable in board["templating"]["list"]]
    assert set(re.findall(r"ray_bomemeta_\w+", " ".join(asked))) == gauges.exported()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_docs_name_them():
    page = (BOARD.parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(ray_bomemeta_\w+)` \|", page, re.MULTILINE))
    assert rows == gauges.exported()
