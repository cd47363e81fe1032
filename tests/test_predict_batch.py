"""`bomemeta predict --workers`: images of folders and of a bucket through Ray Data, as in one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image
from pyarrow.fs import FileSystem
from test_predict import trained
from typer.testing import CliRunner

from bomemeta.cli import app
from bomemeta.storage import Store


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    FileSystem.from_uri("s3://bucket?allow_bucket_creation=true")[0].create_dir("bucket")
    yield "s3://bucket"
    server.stop()


def test_workers_answer_as_one_process(bucket: str, tmp_path: Path) -> None:
    result = trained(tmp_path)
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    for number, name in enumerate(("sky", "grass")):
        (photos / name).mkdir(parents=True)
        for i in range(4):
            array = rng.integers(0, 60, (20, 30, 3), np.uint8)
            array[:, :: number + 2] += 150
            Image.fromarray(array).save(photos / name / f"{i}.png")
    clf, runner = tmp_path / "clf", CliRunner()
    result.classifier().fit(photos).save(clf)
    here = runner.invoke(app, ["predict", str(clf), str(photos), "--json"])
    wanted = [json.loads(line) for line in here.stdout.splitlines()]
    assert len(wanted) == 8
    store = Store.at(f"{bucket}/new")
    for record in wanted:
        path = Path(record["path"])
        store.put(f"{path.parent.name}-{path.name}", path)
    store.put("broken.png", b"no image")
    store.put("notes.txt", b"not looked at")
    done = runner.invoke(
        app, ["predict", str(clf), f"{bucket}/new", str(photos), "--json", "--workers", "2"]
    )
    assert done.exit_code == 1, done.output  # of the broken one
    assert done.stdout, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    remote = sorted(found[:8], key=lambda record: record["path"])
    assert [record["path"].rpartition("/")[2] for record in remote] == sorted(
        f"{Path(record['path']).parent.name}-{Path(record['path']).name}" for record in wanted
    )
    assert [(r["path"], r["class"]) for r in found[8:]] == [(r["path"], r["class"]) for r in wanted]
    by_name = {Path(r["path"]).parent.name + "-" + Path(r["path"]).name: r for r in wanted}
    for record in remote:
        same = by_name[record["path"].rpartition("/")[2]]
        # To rounding: other images were in its batch.
        assert record["probabilities"] == pytest.approx(same["probabilities"], abs=1e-6)
    assert "broken.png cannot be read" in done.stderr


def test_what_is_refused(tmp_path: Path) -> None:
    result = trained(tmp_path)
    pixels = np.random.default_rng(0).random((4, 16, 16)).astype(np.float32)
    result.classifier().fit(pixels, [0, 0, 1, 1]).save(tmp_path / "clf")
    for arguments, message in (
        (["s3://bucket/x"], "s3://bucket/x: a URI is read by Ray Data: give --workers N too"),
        (["a.png", "--address", "1.2.3.4:5"], "--address: wanted together with --workers N"),
    ):
        done = CliRunner().invoke(app, ["predict", str(tmp_path / "clf"), *arguments])
        assert (done.exit_code, done.stderr.strip()) == (2, message)
