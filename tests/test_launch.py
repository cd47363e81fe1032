"""launch/: as far as a machine without these schedulers can tell. Scripts run with stand-ins for
them; the commands in them run really.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from bomemeta.cli.app import TRY_AGAIN

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = ["local.sh", "job_submit.sh", "slurm.sbatch"]
CLUSTERS = ["cluster.yaml", "cluster-aws.yaml"]
# The fields of a RayJob and of its cluster (ray.io/v1) that these files may use; KubeRay refuses
# others.
JOB_FIELDS = {
    "entrypoint", "runtimeEnvYAML", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "activeDeadlineSeconds",
    "submissionMode", "submitterPodTemplate", "submitterConfig", "rayClusterSpec", "metadata", "suspend", "entrypointNumCpus",
}  # fmt: skip
CLUSTER_FIELDS = {
    "rayVersion",
    "headGroupSpec",
    "workerGroupSpecs",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "authOptions",
}
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
# Every run below is this short, in this process's own machine, whatever the file says of workers.
SHORT = ["steps=3", "workers=0", "address=null", "log.tensorboard=false"]
CONFIG = ROOT / "configs" / "analytic_quadratic.yaml"
COMMAND = f"{sys.executable} -m bomemeta"


def text(name: str) -> str:
    return (LAUNCH / name).read_text(encoding="utf-8")


def execute(
    arguments: list[str], folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )


def finished(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert record["steps"] == 3
    return record


def test_every_file_is_tested() -> None:
    assert {path.name for path in LAUNCH.iterdir()} == {
        *SCRIPTS,
        *CLUSTERS,
        "rayjob.yaml",
        "Dockerfile",
        "grafana.json",  # tests/test_gauges.py
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash_and_say_how_they_are_called(name, tmp_path):
    assert execute(["bash", "-n", str(LAUNCH / name)], tmp_path).returncode == 0
    assert text(name).startswith("#!/usr/bin/env bash\n")
    assert os.access(LAUNCH / name, os.X_OK)
    bare = execute(["bash", str(LAUNCH / name)], tmp_path)
    assert bare.returncode != 0
    assert "usage: " in bare.stderr


def test_local_begins_and_shows_what_is_done(tmp_path):
    arguments = ["bash", str(LAUNCH / "local.sh"), str(CONFIG), "out", *SHORT]
    first = execute(arguments, tmp_path, BOMEMETA=COMMAND)
    assert first.returncode == 0, first.stderr
    assert first.stderr.splitlines()[0] == f"run folder: {tmp_path / 'out'}"
    before = finished(tmp_path / "out")
    again = execute(arguments, tmp_path, BOMEMETA=COMMAND)
    assert again.returncode == 0, again.stderr
    assert finished(tmp_path / "out") == before


def stand_in(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def test_job_submit_is_one_submission(tmp_path):
    stand_in(tmp_path, "said", 'printf "%s\\n" "$@"')
    arguments = [
        "bash",
        str(LAUNCH / "job_submit.sh"),
        "a.yaml",
        "s3://b/run",
        "8",
        "solver.betas=[0.5, 1]",
    ]
    done = execute(arguments, tmp_path, BOMEMETA=str(tmp_path / "said"), WITH_UV="--uv")
    wanted = [
        "submit",
        "a.yaml",
        "output_dir=s3://b/run",
        "workers=8",
        "solver.betas=[0.5, 1]",
        "--uv",
    ]
    assert done.stdout.splitlines() == wanted  # tests/test_submit.py sends it to a real cluster


def slurm(folder: Path, bomemeta: str, output: Path) -> subprocess.CompletedProcess[str]:
    """The job's script with stand-ins for Slurm, for `ray symmetric-run`, which runs what comes
    after `--`, and for bomemeta.
    """
    tools = folder / "venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "activate").write_text(f"PATH={tools}:$PATH\n")
    stand_in(
        tools,
        "scontrol",
        f'if [ "$1" = requeue ]; then echo "$@" > {folder}/requeued; else printf "%s\\n" node7 node8; fi',
    )
    stand_in(
        tools,
        "srun",
        f'printf "%s\\n" "$@" > {folder}/srun; while [ "$1" != ray ]; do shift; done; "$@"',
    )
    stand_in(tools, "ray", f'env > {folder}/env; while [ "$1" != -- ]; do shift; done; shift; "$@"')
    stand_in(tools, "bomemeta", bomemeta)
    return execute(
        ["bash", str(LAUNCH / "slurm.sbatch"), str(CONFIG), str(output), *SHORT],
        folder, VENV=str(folder / "venv"),
        SLURM_JOB_NODELIST="node[7-8]", SLURM_JOB_ID="123456", SLURM_JOB_NUM_NODES="2", SLURM_CPUS_PER_TASK="16",
    )  # fmt: skip


@pytest.mark.parametrize("code", [0, 1, 75, 130])
def test_slurm_requeues_what_is_worth_another_try(code, tmp_path):
    assert slurm(tmp_path, f"exit {code}", tmp_path / "out").returncode == code
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == (
        "requeue 123456\n" if code == TRY_AGAIN else ""
    )


def test_slurm_runs_the_command_on_the_first_node(tmp_path):
    output = tmp_path / "out"
    done = slurm(
        tmp_path, f'printf "%s\\n" "$@" > {tmp_path}/bomemeta; exec {COMMAND} "$@"', output
    )
    assert done.returncode == 0, done.stderr
    finished(output)
    srun = (tmp_path / "srun").read_text().splitlines()
    start = srun.index("ray")
    assert "--ntasks-per-node=1" in srun[:start]
    assert srun[start : srun.index("--")] == [
        "ray", "symmetric-run", "--address", "node7:23456", "--min-nodes", "2", "--num-cpus=16"
    ]  # fmt: skip
    typed = (tmp_path / "bomemeta").read_text().splitlines()
    assert {"workers=31", "address=node7:23456"} <= set(typed)
    assert " --auto-resume --restarts 3 " in " ".join(typed)
    environment = dict(
        line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line
    )
    assert re.fullmatch(r"[0-9a-f]{64}", environment["RAY_AUTH_TOKEN"])
    assert environment["RAY_AUTH_MODE"] == "token"
    options = dict(
        re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text("slurm.sbatch"), re.MULTILINE)
    )
    assert options["ntasks-per-node"] == "1"
    assert "requeue" in options


def test_clusters_want_a_token() -> None:
    job = yaml.safe_load(text("rayjob.yaml"))["spec"]["rayClusterSpec"]
    assert job["authOptions"] == {"mode": "token"}
    assert tuple(map(int, job["rayVersion"].split("."))) >= (2, 52, 0)  # KubeRay refuses older ones
    for name in CLUSTERS:
        config = yaml.safe_load(text(name))
        assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            settings, start = config[key][-1].split(";", 1)
            assert "RAY_AUTH_MODE=token" in settings.split(), (name, key)
            assert " ray start " in start


def test_symmetric_run_takes_these_options() -> None:
    from ray.scripts import symmetric_run

    assert {"address", "min_nodes", "ray_args_and_entrypoint"} == {
        each.name for each in symmetric_run.symmetric_run.params
    }


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_files_are_what_ray_up_wants(name):
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(text(name))
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    prepared = prepare_config(config)  # as `ray up` fills in the rest
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert sum(node.get("min_workers", 0) for node in types.values()) == prepared["max_workers"]
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for command in config[key]:
            assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
            options = re.findall(r"ray start (.*)", command)
            assert all(start_options(each) for each in options)
        assert "RAY_ENABLE_UV_RUN_RUNTIME_ENV=0" in config[key][-1]
    for excluded in (".git", ".venv", "runs"):
        assert excluded in config["rsync_exclude"]


def start_options(arguments: str) -> bool:
    """Whether `ray start` knows the options."""
    from ray.scripts.scripts import start

    known = {name for each in start.params for name in (*each.opts, *each.secondary_opts)}
    return {
        word.partition("=")[0] for word in shlex.split(arguments) if word.startswith("--")
    } <= known


def test_rayjob_has_the_fields_of_a_rayjob() -> None:
    job = yaml.safe_load(text("rayjob.yaml"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) <= JOB_FIELDS
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0
    assert spec["entrypoint"].endswith(" --auto-resume --restarts 3")
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= CLUSTER_FIELDS
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    output = next(
        word for word in spec["entrypoint"].split() if word.startswith("output_dir=")
    ).removeprefix("output_dir=")
    for group in groups:
        assert set(group) <= GROUP_FIELDS
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) <= volumes
        assert any(
            output.startswith(path + "/") for path in mounts.values()
        )  # what the run leaves outlives the cluster
        assert container["resources"]["limits"] == container["resources"]["requests"]
    workers = int(re.findall(r"workers=(\d+)", spec["entrypoint"])[0])
    room = sum(
        each["replicas"]
        * int(each["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
        for each in cluster["workerGroupSpecs"]
    )
    assert workers <= room
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_rayjobs_command_runs(tmp_path):
    """As it is there, in a folder like the image's, but short, and to an output that this machine
    has.
    """
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    arguments = shlex.split(yaml.safe_load(text("rayjob.yaml"))["spec"]["entrypoint"])
    assert arguments[0] == "bomemeta"
    arguments = [word.replace("/shared", str(tmp_path / "shared")) for word in arguments[1:]]
    short = ["evaluation.episodes=2", *SHORT]
    done = execute([*shlex.split(COMMAND), *arguments, *short], tmp_path)
    assert done.returncode == 0, done.stderr
    finished(tmp_path / "shared" / "runs" / "quickstart")


def test_the_image_has_what_it_copies_and_runs() -> None:
    logical = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text("Dockerfile"), flags=re.MULTILINE))
    instructions = [
        (line.split()[0], line.partition(" ")[2]) for line in logical.splitlines() if line.strip()
    ]
    assert {name for name, _ in instructions} <= {
        "FROM",
        "RUN",
        "WORKDIR",
        "COPY",
        "ENV",
        "USER",
        "CMD",
    }
    assert instructions[0][0] == "FROM"
    stages = re.findall(r"^FROM \S+ AS (\w+)$", logical, re.MULTILINE)
    for name, rest in instructions:
        if name == "FROM":
            assert re.match(r"python:3\.\d+-", rest)
        if name == "COPY":
            options = [word for word in rest.split() if word.startswith("--")]
            sources = [word for word in rest.split() if not word.startswith("--")][:-1]
            stage = [
                option.removeprefix("--from=") for option in options if option.startswith("--from=")
            ]
            assert all(each in stages for each in stage)
            assert stage or all((ROOT / source).exists() for source in sources)
        if name == "RUN":
            assert subprocess.run(["bash", "-n", "-c", rest], check=False).returncode == 0
    assert instructions[-2:][0][0] == "WORKDIR"
    assert ("USER", "ray") in instructions  # not as root
    arguments = json.loads(instructions[-1][1])
    assert arguments[0] == "bomemeta"
    assert execute([*shlex.split(COMMAND), *arguments[1:]], ROOT).returncode == 0
