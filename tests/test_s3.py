"""Runs and searches at s3://, against a server that speaks S3's protocol: no folders, no renames,
and other processes elsewhere.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from moto.server import ThreadedMotoServer
from test_promises import QUADRATIC, struck, wait_for
from test_tune import STEPS, based, changed, plain

import bomemeta
from bomemeta import storage
from bomemeta.checkpoint import load_latest
from bomemeta.errors import ConfigError, StorageError
from bomemeta.storage import Mirror, Store

BUCKET = "s3://bucket"


@pytest.fixture(scope="module", autouse=True)
def bucket() -> Iterator[str]:
    """An empty bucket, and the environment in which processes find it, as those of an S3-compatible
    store do.
    """
    from pyarrow.fs import FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setattr(storage, "PAUSES_S", (0.0, 0.0, 0.0))
        FileSystem.from_uri(f"{BUCKET}?allow_bucket_creation=true")[0].create_dir("bucket")
        yield f"{host}:{port}"
    server.stop()


def test_files_of_a_store(bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    store = Store.at(f"{BUCKET}/folder/")
    assert (store.names(), store.read("a/b")) == ([], None)
    store.put("a/b", b"1")
    store.put("a/b", b"2")
    large = tmp_path / "large"
    large.write_bytes(os.urandom(12_000_000))  # sent in parts
    store.put("c", large)
    assert (store.names(), store.read("a/b"), store.read("c")) == (
        ["a/b", "c"],
        b"2",
        large.read_bytes(),
    )
    requests = len(caplog.records)
    store.get("c", tmp_path / "new" / "c")
    assert (tmp_path / "new" / "c").read_bytes() == large.read_bytes()
    assert len(caplog.records) - requests <= 3  # pyarrow alone would make one of every 64 KiB
    store.remove("a/b")
    store.remove("a/b")
    assert store.names() == ["c"]
    same = Store.at(f"{BUCKET}/folder?endpoint_override={bucket}&scheme=http")
    assert same.names() == ["c"]
    store.clear()
    store.clear()
    assert same.names() == []
    with pytest.raises(
        StorageError,
        match=r"s3://no-such-bucket/a cannot be written to \(b\), in 4 tries: .*bucket does not exist",
    ):
        Store.at("s3://no-such-bucket/a").put("b", b"")


def test_a_run_is_gone_on_with_by_another_machine(tmp_path: Path) -> None:
    reference = bomemeta.train(QUADRATIC, [f"output_dir={tmp_path / 'reference'}"])
    location, mark = f"{BUCKET}/run", tmp_path / "mark"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(QUADRATIC))
    armed = struck("sleep", mark)
    arguments = [
        sys.executable,
        "-m",
        "bomemeta",
        "train",
        str(tmp_path / "run.yaml"),
        f"output_dir={location}",
        *armed,
        "--auto-resume",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for(mark.exists, process)
    process.kill()
    process.communicate()
    left = Mirror(location)
    left.fetch()
    assert load_latest(left.folder / "checkpoints").checkpoint.step == 3

    result = bomemeta.train(QUADRATIC, [f"output_dir={location}", *armed], auto_resume=True)
    assert (result.upper_sha256, result.metrics) == (reference.upper_sha256, reference.metrics)
    names = Store.at(location).names()
    assert {"config.yaml", "metrics.jsonl", "result.json"} <= set(names)
    assert [name for name in names if name.endswith(".pt")] == [
        "checkpoints/step_00000006.pt",
        "checkpoints/step_00000008.pt",
    ]
    assert json.loads(Store.at(location).read("result.json") or b"")["first_step"] == 3
    assert bomemeta.evaluate(location).metrics == reference.metrics
    with pytest.raises(
        ConfigError, match="exists and is not empty; a run never overwrites another"
    ):
        bomemeta.train(QUADRATIC, [f"output_dir={location}"])


def test_seeds_go_below_a_uri_with_options(bucket: str, tmp_path: Path) -> None:
    whole = bomemeta.train(QUADRATIC, [f"output_dir={tmp_path / 'whole'}", "seeds=2"])
    options = f"?endpoint_override={bucket}&scheme=http"
    result = bomemeta.train(QUADRATIC, [f"output_dir={BUCKET}/seeds{options}", "seeds=2"])
    assert result.upper_sha256 == whole.upper_sha256
    assert {"result.json", "seed-0/result.json", "seed-1/result.json"} <= set(
        Store.at(f"{BUCKET}/seeds").names()
    )


@pytest.mark.slow(reason="Ray Tune twice, half a minute: pytest -m slow -k without_a_shared_disk")
def test_a_search_without_a_shared_disk_resumes_after_the_death_of_its_driver(
    tmp_path: Path,
) -> None:
    """Its one trial stands still in the middle, and the driver is killed. With a trial that is done:
    tests/test_tune.py.
    """
    from bomemeta.distributed import cluster
    from bomemeta.tune import tune

    problem = {"doom": "wait", "doom_mark": str(tmp_path / "mark")}
    file = changed(
        based(problem=problem),
        space={"problem.doom_step": {"grid": [6]}, "solver.upper_lr": {"grid": [0.03]}},
        trials=1,
        concurrent=1,
        driver_cpus=0.5,
    )
    path, location = tmp_path / "search.yaml", f"{BUCKET}/search"
    path.write_text(yaml.safe_dump(file))
    lines: list[str] = []
    with cluster.local(cluster.RayOptions(workers=4), print):
        arguments = [sys.executable, "-m", "bomemeta", "tune", str(path), f"output_dir={location}"]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        process = subprocess.Popen(
            arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        wait_for((tmp_path / "mark.0").exists, process)
        process.kill()
        output = process.communicate()[0]
        assert f"search folder: {location}" in output
        assert "trial 1/1 step 4: upper_error" in output, output
        with pytest.raises(
            ConfigError, match=r"s3://bucket/search holds another search, with other seed"
        ):
            tune(file, [f"output_dir={location}", "seed=3"])
        result = tune(file, [], resume=location, say=lines.append)
        with pytest.raises(ConfigError, match="s3://bucket/search holds this search, finished"):
            tune(file, [f"output_dir={location}"])
    assert [(row.trial, row.ended, row.steps) for row in result.rows] == [(1, "done", STEPS)], lines
    assert any(line.startswith("trial 1/1 resumes at step 4") for line in lines), lines
    reference = plain({"solver.upper_lr": 0.03}, tmp_path / "plain")
    assert {row.upper_sha256 for row in result.rows} == {reference.upper_sha256}
    assert {row.metrics["upper_error"] for row in result.rows} == {reference.metrics["upper_error"]}

    assert (result.output_dir, result.best_config) == (location, f"{location}/best.yaml")
    names = Store.at(location).names()
    assert {"search.yaml", "results.md", "results.json", "best.yaml", "trials/tuner.pkl"} <= set(
        names
    )
    for row in result.rows:
        run = [
            name.removeprefix(f"{row.run_dir}/") for name in names if name.startswith(row.run_dir)
        ]
        assert {
            "config.yaml",
            "metrics.jsonl",
            "result.json",
            f"checkpoints/step_{STEPS:08d}.pt",
        } <= set(run)
        assert bomemeta.evaluate(f"{location}/{row.run_dir}").upper_sha256 == row.upper_sha256
