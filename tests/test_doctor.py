"""`bomemeta doctor`: what it predicts is what a run then shows, every kind of PROBLEM can be
provoked, and nothing is written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
from torch import nn
from toy import one_thread
from typer.testing import CliRunner

import bomemeta
from bomemeta.assembly import build_problem, build_solver
from bomemeta.checkpoint import load_latest
from bomemeta.cli import app
from bomemeta.config import load_config
from bomemeta.data.class_images import check_size
from bomemeta.data.episodes import EpisodeSpec
from bomemeta.doctor import DoctorReport, Finding, bundles, doctor, examine, machine
from bomemeta.doctor.dry import DryRun, TaskCounts, line_through
from bomemeta.doctor.nodes import Machines, Node, Workers, spread
from bomemeta.metrics import read_metrics
from bomemeta.problems.few_shot import FewShot
from bomemeta.registry import datasets, problems

BOME = {
    "name": "bome",
    "inner_steps": 2,
    "inner_lr": 0.2,
    "lower_lr": 0.2,
    "adapt_steps": 1,
    "barrier_steps": 1,
}
FEW_SHOT: dict[str, Any] = {
    "problem": {"name": "few_shot", "ways": 3, "queries": 2, "test_queries": 2, "width": 4},
    "data": {"dataset": "toy"},
    "solver": BOME,
    "steps": 3,
    "tasks_per_step": 2,
    "evaluation": {"episodes": 4},
}
ANALYTIC: dict[str, Any] = {
    "problem": {"name": "analytic", "case": "quadratic", "tasks": 12, "condition": 4.0},
    "solver": {"name": "bome", "inner_steps": 4, "inner_lr": 0.5, "lower_lr": 0.2},
    "steps": 3,
}
CLEANING: dict[str, Any] = {
    "problem": {
        "name": "hyper_cleaning",
        "train": 60,
        "validation": 30,
        "selection": 0,
        "blocks": 3,
    },
    "data": {"dataset": "toy_labelled"},
    "solver": {"name": "sl_bamm", "lower_lr": 0.1},
    "steps": 3,
    "shards": 3,
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty current folder, no cluster, and threads as they were."""
    for name in ("RAY_ADDRESS", "OMP_NUM_THREADS", "BOMEMETA_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield


def of(report: DoctorReport, topic: str) -> list[Finding]:
    found = [finding for finding in report.findings if finding.topic == topic]
    assert found, f"nothing on {topic}: {report.lines()}"
    return found


def levels(report: DoctorReport, topic: str) -> set[str]:
    return {finding.level for finding in of(report, topic)}


# Predictions


@pytest.mark.parametrize(
    "solver", [BOME, {"name": "itd", "inner_steps": 3, "inner_lr": 0.2}], ids=["bome", "itd"]
)
@pytest.mark.parametrize("form", ["head", "network"])
def test_memory_of_a_larger_shard_is_what_it_then_is(form: str, solver: dict[str, Any]) -> None:
    config = load_config(
        {**FEW_SHOT, "solver": solver}, [f"problem.form={form}", "tasks_per_step=32", "shards=2"]
    )
    metrics = examine(config).values
    assert metrics["plan"]["largest"] == 16
    problem = build_problem(config)
    counted = DryRun(config, problem, build_solver(config, problem)).steps(16).worker_bytes
    # Measured to be within 0.1 %; a head's few small tensors are where anything else would show.
    assert metrics["memory"]["step_bytes"] == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("config", [FEW_SHOT, ANALYTIC, CLEANING], ids=["fresh", "pool", "shared"])
def test_bytes_and_disk_are_those_of_a_run(config: dict[str, Any], tmp_path: Path) -> None:
    found = examine(config).values
    done = bomemeta.train(config, [f"output_dir={tmp_path / 'run'}"])
    first = read_metrics(done.run_dir / "metrics.jsonl")[0]
    assert (found["traffic"]["up"], found["traffic"]["reduces"]) == (
        first["bytes_reduced"],
        first["reduces"],
    )
    largest = max(path.stat().st_size for path in (done.run_dir / "checkpoints").iterdir())
    # What a run counts up from step to step, a few named numbers, is not in a dry step's.
    assert found["disk"]["checkpoint"] == pytest.approx(largest, rel=0.02, abs=512)
    logs = sum(path.stat().st_size for path in (done.run_dir / "tensorboard").iterdir())
    logs += (done.run_dir / "metrics.jsonl").stat().st_size
    assert 0.4 < found["disk"]["logs"] / logs < 2.5


@pytest.mark.parametrize("keys", [[], ["solver.lower_optimizer=adamw"]], ids=["sgd", "adamw"])
def test_lower_states_are_counted_for_all_tasks(keys: list[str], tmp_path: Path) -> None:
    metrics = examine(ANALYTIC, ["tasks_per_step=4", *keys]).values
    done = bomemeta.train(ANALYTIC, [f"output_dir={tmp_path / 'run'}", "steps=1", *keys])
    saved = load_latest(done.run_dir / "checkpoints").checkpoint
    assert metrics["memory"]["lower_state_bytes"] == sum(
        tensor.nbytes for tensor in saved.lower.values()
    )


def test_memory_grows_with_inner_steps_where_it_does() -> None:
    unrolled = {"name": "itd", "inner_steps": 4, "inner_lr": 0.1}
    few = ["problem.form=network", "tasks_per_step=1", "evaluation.episodes=1"]
    grows = examine({**FEW_SHOT, "solver": unrolled}, few)
    stays = examine(FEW_SHOT, [*few, "solver.inner_steps=4"])
    assert levels(grows, "inner steps") == {"NOTE"}
    assert levels(stays, "inner steps") == {"OK"}
    assert stays.values["memory"]["bytes_per_inner_step"] == 0
    # 4 steps or 8: the difference is what was said of a step.
    twice = examine({**FEW_SHOT, "solver": {**unrolled, "inner_steps": 8}}, few)
    more = twice.values["memory"]["step_bytes"] - grows.values["memory"]["step_bytes"]
    assert more == pytest.approx(4 * grows.values["memory"]["bytes_per_inner_step"], rel=0.02)


def test_a_stream_is_measured_where_its_memory_is_full() -> None:
    stream = {
        "name": "continual",
        "tasks": 2,
        "samples_per_task": 40,
        "test_samples_per_task": 20,
        "hidden": 8,
        "memory_per_task": 20,
    }
    config = {
        "problem": stream,
        "data": {"dataset": "digits"},
        "solver": {**BOME, "inner_lr": 0.03},
    }
    report = examine(config)
    assert report.ok, report.lines()
    assert report.values["memory"]["step_bytes"] > 0


def test_a_line_through_points() -> None:
    assert line_through([(1, 10.0), (4, 40.0)]).at(7) == 70
    assert line_through([(1, 10.0)]).at(7) == 10  # flat
    assert line_through([(1, 10.0), (2, 9.0)]).each == 0  # more tasks never take less


# Findings


def test_all_is_well_and_nothing_is_written(tmp_path: Path) -> None:
    report = examine(FEW_SHOT)
    assert report.ok, report.lines()
    assert list(tmp_path.iterdir()) == []
    for topic in (
        "data",
        "batch norm",
        "workers",
        "shards",
        "threads",
        "memory",
        "inner steps",
        "bytes per step",
        "time",
        "output",
    ):
        of(report, topic)
    assert report.lines()[-1] == "0 problems, 1 note"  # BatchNorm's


def test_batch_norm() -> None:
    transductive = of(examine(FEW_SHOT), "batch norm")[0]
    assert (transductive.level, "queries" in transductive.text) == ("NOTE", True)
    inductive = of(examine(FEW_SHOT, ["problem.batch_norm=inductive"]), "batch norm")[0]
    assert (inductive.level, "3 support images" in inductive.text) == ("OK", True)


@problems.register("doctor_running_averages")
@dataclass(kw_only=True)
class RunningAverages(FewShot):
    def setup(self) -> None:
        super().setup()
        self._layer = nn.BatchNorm2d(2)


@datasets.register("doctor_small")
@dataclass(kw_only=True)
class Small(toy.Toy):
    """Four images in each of its classes but one, of which there are three."""

    def check(self, split: str, spec: EpisodeSpec) -> None:
        counts = np.full(self.classes, 4)
        counts[7] = 3
        check_size("doctor_small", split, spec, [f"wave {c}" for c in range(self.classes)], counts)


@datasets.register("doctor_one_sided")
@dataclass(frozen=True, kw_only=True)
class OneSided(toy.ToyLabelled):
    def examples(self, part: str) -> Any:
        whole = super().examples(part)
        labels = whole.labels.clone()
        labels[labels == 1] = 2
        return whole._replace(labels=labels)


def test_counts_of_classes_and_images() -> None:
    few = ["data.dataset=doctor_small", "problem.test_queries=2", "data.classes=9"]
    train, _, test = of(examine(FEW_SHOT, few), "data")
    assert (
        "train: 9 classes, 3 asked for; 3 images in the smallest class, 3 asked for" in train.text
    )
    assert test.text.startswith("test: 9 classes")
    assert "no limit" in of(examine(FEW_SHOT), "data")[0].text
    assert "120 samples of 3 classes, 40 to 40 of each" in of(examine(CLEANING), "data")[0].text
    assert levels(examine(CLEANING, ["problem.validation=9"]), "data") == {"OK", "NOTE"}
    assert (
        "no row of class 1"
        in of(examine(CLEANING, ["data.dataset=doctor_one_sided"]), "data")[0].text
    )


@pytest.mark.parametrize(
    ("topic", "config", "overrides", "says"),
    [
        (
            "data",
            FEW_SHOT,
            ["data.dataset=doctor_small", "problem.queries=3"],
            r"train.*has 3 images; shots \+ queries needs 4",
        ),
        (
            "data",
            FEW_SHOT,
            ["data.dataset=doctor_small", "data.classes=8", "problem.ways=9"],
            "has 8 classes; problem.ways is 9",
        ),
        (
            "data",
            CLEANING,
            ["data.dataset=mnist", "data.root=nowhere"],
            "bomemeta data prepare mnist",
        ),
        ("batch norm", FEW_SHOT, ["problem.name=doctor_running_averages"], "running averages"),
        ("device", FEW_SHOT, ["device=cuda", "workers=1"], "gpus_per_worker"),
        ("dry step", FEW_SHOT, ["solver.inner_lr=1e30", "problem.form=network"], "diverges"),
        ("workers", FEW_SHOT, ["workers=1000"], "has room for"),
        ("workers", FEW_SHOT, ["workers=1", "gpus_per_worker=64"], "has room for 0"),
        ("shards", FEW_SHOT, ["workers=2", "shards=1"], "1 of 2 workers would never have work"),
        ("threads", ANALYTIC, ["threads=2", "workers=7", "shards=7"], "stall each other"),
        ("output", FEW_SHOT, ["output_dir=file/run"], "is no folder"),
        ("output", FEW_SHOT, ["output_dir=full"], "not empty"),
    ],
)
def test_problems(
    topic: str, config: dict[str, Any], overrides: list[str], says: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "result.json").write_text("{}")
    report = examine(config, overrides)
    assert not report.ok
    wrong = [finding for finding in of(report, topic) if finding.level == "PROBLEM"]
    assert wrong, report.lines()
    assert re.search(says, f"{wrong[0].text} {wrong[0].do}"), wrong[0]


def test_too_little_memory_disk_and_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_available", lambda: 10_000)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    report = examine(FEW_SHOT, ["tasks_per_step=8", "shards=2"])
    assert levels(report, "memory") == levels(report, "output") == {"PROBLEM"}
    monkeypatch.setattr(machine, "memory_available", lambda: 1 << 40)
    monkeypatch.setattr(machine, "shm_available", lambda: 100)
    report = examine(FEW_SHOT, ["workers=1"])
    assert levels(report, "object store") == {"NOTE"}


def test_more_shards_are_proposed_where_these_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(FEW_SHOT, ["tasks_per_step=32", "shards=2", "workers=1"])
    metrics = examine(config).values["memory"]
    least = (
        metrics["process_bytes"]
        + metrics["driver_bytes"]
        + metrics["step_bytes"]
        - 8 * metrics["step_bytes_per_task"]
    )
    monkeypatch.setattr(
        machine, "process_memory", lambda: int(metrics["process_bytes"] - doctor.RAY_BYTES)
    )
    monkeypatch.setattr(machine, "memory_available", lambda: int(least / 0.95) + 1000)
    (finding,) = of(examine(config), "memory")
    assert (finding.level, finding.do[:12]) == ("PROBLEM", "Set shards=4")


def test_a_job_of_its_own_folder_loses_what_it_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "pkg"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert "PROBLEM" in levels(examine(FEW_SHOT), "output")
    assert "PROBLEM" not in levels(examine(FEW_SHOT, [f"output_dir={tmp_path / 'run'}"]), "output")
    assert levels(examine(FEW_SHOT, ["output_dir=s3://bucket/run"]), "output") == {"NOTE"}


# Nodes, as they would be on a cluster


def node(name: str, cpus: float, **facts: Any) -> Node:
    return Node(name, {"CPU": cpus}, {**machine.facts(), "cores": int(cpus), **facts}, "")


def test_workers_are_spread_and_waited_for() -> None:
    config = load_config(FEW_SHOT, ["workers=5", "shards=6"])
    machines = Machines(
        "cluster", [node("a", 4.0), node("b", 2.0), node("head", 0.0)], {"CPU": 6.0}
    )
    assert [(one.name, count) for one, count in spread(config, machines, 5)] == [("a", 3), ("b", 2)]
    workers = Workers(5, 5, 5)
    assert [finding.level for finding in bundles.bundles(config, machines, workers)] == ["OK"]
    busy = machines._replace(free={"CPU": 1.0})
    assert "of which 1 free now" in bundles.bundles(config, busy, workers)[0].text
    (idle,) = bundles.shards(config, TaskCounts(6, 6, 1, 0), workers)
    assert (idle.level, "40%" in idle.text) == ("NOTE", True)  # 6 of 10 slots in two waves
    assert bundles.shards(config, TaskCounts(10, 5, 2, 0), workers)[0].level == "OK"


def test_nodes_that_differ_or_do_not_answer() -> None:
    config = load_config(FEW_SHOT, ["workers=2"])
    ours = machine.facts()["versions"]
    machines = Machines(
        "cluster",
        [
            node("good", 1.0),
            node("old", 1.0, versions={**ours, "torch": "1.0"}),
            node("bare", 1.0, versions={**ours, "bomemeta": None}),
            Node("silent", {"CPU": 1.0}, None),
            node("empty", 1.0)._replace(worker="DataError: no such folder"),
        ],
        {"CPU": 5.0},
    )
    reported = [
        finding.text for finding in bundles.nodes(config, machines) if finding.level == "PROBLEM"
    ]
    assert [text.split()[0].rstrip(":") for text in reported] == ["old", "bare", "silent", "empty"]
    assert f"torch 1.0 (here {ours['torch']})" in reported[0]
    assert "bomemeta missing" in reported[1]
    assert "no such folder" in reported[3]


# The command


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


def written(config: dict[str, Any], folder: Path) -> str:
    (folder / "c.yaml").write_text(json.dumps(config))
    return str(folder / "c.yaml")


def test_exit_codes_and_json(tmp_path: Path) -> None:
    noisy = tmp_path / "noisy.py"
    noisy.write_text("print('a word of the user')\n")
    path = written({**ANALYTIC, "imports": ["noisy.py"]}, tmp_path)
    good = invoke(path, "--json")
    assert good.exit_code == 0
    reported = json.loads(good.stdout)
    assert reported["ok"] is True
    assert {finding["level"] for finding in reported["findings"]} <= {"OK", "NOTE"}
    assert reported["figures"]["traffic"]["up"] > 0
    plain = invoke(path, "output_dir=noisy.py/run")
    assert plain.exit_code == 1
    assert "PROBLEM" in plain.stdout
    assert plain.stdout.splitlines()[-1].startswith("1 problem")
    wrong = invoke(path, "solver.inner_step=3")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "Did you mean solver.inner_steps?" in wrong.stderr
    missing = invoke(path, "--address", "ray://somewhere:10001", "workers=1")
    assert missing.exit_code == 2, "an address that no run can have is a wrong config"


# A real cluster, of two nodes on this machine, in a process of its own: Ray reads its
# authentication once per process.

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
cluster.add_node(num_cpus=2, labels={"kind": "fast"})
print("ADDRESS", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=dict(os.environ),
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with process, process.stdin:
            line = next(
                line for line in iter(process.stdout.readline, "") if line.startswith("ADDRESS")
            )
            yield line.split()[1]
            process.stdin.close()
            process.wait(60)


def test_a_cluster_is_asked_and_left(address: str, tmp_path: Path) -> None:
    here_alone = tmp_path / "here_alone.py"
    here_alone.write_text(
        "import os\nif 'DOCTOR_TEST' not in os.environ: raise ValueError('not on this node')\n"
    )
    path = written({**ANALYTIC, "workers": 2, "shards": 4}, tmp_path)
    done = invoke(path, "--address", address, "--json")
    report = json.loads(done.stdout)
    lines = {finding["topic"]: finding for finding in report["findings"]}
    assert done.exit_code == 0, done.stdout
    assert "2 nodes (2 CPU, 0 GPU) have room for 2" in lines["workers"]["text"]
    assert "a worker was built on 1" in lines["nodes"]["text"]
    assert lines["authentication"]["level"] == "OK"
    assert "127.0.0.1" in lines["memory"]["text"]
    os.environ["DOCTOR_TEST"] = "1"
    try:
        failing = examine(path, [f"imports=[{here_alone}]", f"address={address}", "workers=3"])
    finally:
        del os.environ["DOCTOR_TEST"]
    assert "not on this node" in next(
        finding.text for finding in of(failing, "nodes") if finding.level == "PROBLEM"
    )
    assert "have room for 2" in of(failing, "workers")[0].text  # as before: nothing was left behind
    assert levels(failing, "workers") == {"PROBLEM"}


def test_the_nodes_of_worker_labels_are_asked(address: str, tmp_path: Path) -> None:
    path = written({**ANALYTIC, "workers": 2, "shards": 4}, tmp_path)
    done = invoke(path, "--address", address, "--json", "worker_labels={kind: fast}")
    lines = {finding["topic"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert "1 node (2 CPU, 0 GPU) has room for 2" in lines["workers"]["text"]
    done = invoke(path, "--address", address, "--json", "worker_labels={kind: slow}")
    text = " ".join(finding["text"] for finding in json.loads(done.stdout)["findings"])
    assert "no node of the cluster (2 nodes) is so: there are kind=fast" in text


def test_a_cluster_that_is_not_there() -> None:
    report = examine(FEW_SHOT, ["workers=1", "address=127.0.0.1:1"])
    (finding,) = of(report, "cluster")
    assert finding.level == "PROBLEM"
    assert "no Ray cluster could be joined at 127.0.0.1:1" in finding.text
    assert of(report, "memory")[0].level == "OK"  # what does not need it is said all the same


def test_packages_without_bytecode_are_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # torch's compiled modules are looked for in an empty folder.
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert machine.keeps_bytecode()  # a process would leave them there
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert not machine.keeps_bytecode()
    node = Node("worker-7", {"CPU": 2.0}, {"keeps_bytecode": False})
    found = bundles.bytecode(Machines("cluster", [node], {}))
    assert [(one.level, one.topic) for one in found] == [("NOTE", "bytecode")]
    assert "worker-7" in found[0].text
    assert bundles.bytecode(Machines("cluster", [node._replace(facts={})], {})) == []
