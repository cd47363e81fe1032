"""The server: what it keeps, what it answers, a real one on Ray Serve, and its page in a browser."""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image as Pillow
from starlette.testclient import TestClient
from test_predict import trained
from typer.testing import CliRunner

from bomemeta.cli import app
from bomemeta.errors import ConfigError
from bomemeta.predict import load_classifier
from bomemeta.serve.desk import Desk, Image
from bomemeta.serve.tenants import Tenants, TooLate
from bomemeta.serve.web import web

MOST = 10**6  # bytes of a request
START_S = 300.0  # a server may take on a busy machine


class Here:
    """The desk in this process, as the web side asks it."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def fit(self, name: str, images: Sequence[Image], adds: bool) -> dict[str, Any]:
        return self._desk.fit(name, images, adds)

    async def predict(self, name: str, images: Sequence[Image]) -> list[dict[str, Any]]:
        classifier = self._desk.classifier(name, self._desk.tenants.version(name))
        return self._desk.predict(classifier, images)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = trained(tmp_path_factory.mktemp("serve")).run_dir
    assert found is not None
    return str(found)


@pytest.fixture
def desk(run_dir: str, tmp_path: Path) -> Desk:
    return Desk(run_dir, tmp_path / "tenants")


@pytest.fixture
def client(desk: Desk) -> TestClient:
    return TestClient(web(desk.tenants, Here(desk), MOST))


def png(kind: int, seed: int = 0) -> bytes:
    """Stripes of a width of their own for each kind, with noise."""
    rng = np.random.default_rng((kind, seed))
    row = 128 + 90 * np.sin(np.arange(24) * (kind + 1) / 2)
    pixels = (row[:, None] + rng.normal(0, 10, (24, 24))).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Pillow.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def form(kinds: Sequence[int], seed: int = 0, labels: bool = True) -> dict[str, Any]:
    files = [("images", (f"{kind}.png", png(kind, seed), "image/png")) for kind in kinds]
    return {
        "files": files,
        "data": {"labels": [f"kind {kind}" for kind in kinds]} if labels else {},
    }


def test_fit_add_and_predict_are_those_of_the_classifier(client: TestClient, run_dir: str) -> None:
    fitted = client.post("/tenants/one/fit", **form([0, 1, 0, 1]))
    assert fitted.status_code == 200, fitted.text
    added = client.post("/tenants/one/add_examples", **form([2]))
    assert added.json()["classes"] == [
        {"class": "kind 0", "examples": 2}, {"class": "kind 1", "examples": 2}, {"class": "kind 2", "examples": 1},
    ]  # fmt: skip
    assert (added.json()["version"], client.get("/tenants/one").json()) == (2, added.json())
    asked = client.post("/tenants/one/predict", **form([0, 1, 2], seed=1, labels=False))
    found = asked.json()["predictions"]
    clf = load_classifier(run_dir)
    given = [Pillow.open(io.BytesIO(png(kind))) for kind in (0, 1, 0, 1, 2)]
    clf.fit(given, [f"kind {kind}" for kind in (0, 1, 0, 1, 2)])
    new = [Pillow.open(io.BytesIO(png(kind, 1))) for kind in (0, 1, 2)]
    assert [one["class"] for one in found] == clf.predict(new).tolist()
    rows = [list(one["probabilities"].values()) for one in found]
    assert rows == clf.predict_proba(new).tolist()
    assert [one["name"] for one in found] == ["0.png", "1.png", "2.png"]


def test_json_says_the_same_as_a_form(client: TestClient) -> None:
    client.post("/tenants/one/fit", **form([0, 1]))
    by_form = client.post("/tenants/one/predict", **form([1], labels=False)).json()
    body = {"images": [{"image": base64.b64encode(png(1)).decode(), "name": "1.png"}]}
    assert client.post("/tenants/one/predict", json=body).json() == by_form
    labelled = [
        {"image": base64.b64encode(png(kind)).decode(), "label": f"kind {kind}"} for kind in (0, 1)
    ]
    client.post("/tenants/two/fit", json={"images": labelled})
    assert client.post("/tenants/two/predict", json=body).json() == by_form
    assert [one["tenant"] for one in client.get("/tenants").json()["tenants"]] == ["one", "two"]


@pytest.mark.parametrize(
    ("path", "request_", "status", "message"),
    [
        ("new/predict", form([0], labels=False), 404, "there is no tenant 'new' yet"),
        ("new/add_examples", form([0]), 404, "there is no tenant 'new' yet"),
        ("a b/fit", form([0, 1]), 422, "wanted 1 to 64 letters"),
        ("new/fit", form([0, 0]), 422, "y has one class, 'kind 0'"),
        ("new/fit", form([0, 1], labels=False), 422, "0.png has no label"),
        ("new/fit", {**form([0, 1]), "data": {"labels": ["a"]}}, 422, "2 files `images` and 1 texts"),
        ("one/predict", {"files": [("images", ("x.png", b"no"))]}, 422, "x.png cannot be read: it is no image"),
        ("one/predict", {"files": [("images", ("x.png", png(0)[:90]))]}, 422, "x.png cannot be read"),
        ("one/predict", {"data": {"images": "text"}}, 415, "application/x-www-form-urlencoded; wanted"),
        ("one/predict", {"json": {"images": []}}, 422, "no images"),
        ("one/predict", {"json": {"images": ["?"]}}, 422, "image 0 is not base64"),
        ("one/predict", {"json": {"images": [3]}}, 422, "image 0: wanted a base64 text"),
        ("one/predict", {"json": {"images": [{"image": "", "label": 3}]}}, 422, "wanted texts"),
        ("one/predict", {"json": [1]}, 400, "the body is not JSON like"),
        ("one/predict", {"content": b"{", "headers": {"content-type": "application/json"}}, 400, "not JSON"),
        ("one/predict", {"json": {"images": ["AAAA"] * 1001}}, 422, "1001 images in one request"),
        ("one/predict", {"content": bytes(MOST + 1)}, 413, "larger than 1 MB"),
        ("one/predict", {"content": iter([bytes(MOST), b"1"]), "headers": {"content-type": "application/json"}}, 413, "larger"),
        ("one/fit", {**form([0, 1]), "headers": {"origin": "http://other.example"}}, 403, "may not ask"),
        ("one/none", {}, 404, "Not Found"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_answered_in_words(
    client: TestClient, path: str, request_: dict[str, Any], status: int, message: str
) -> None:
    before = client.post("/tenants/one/fit", **form([0, 1])).json()
    answer = client.post(f"/tenants/{path}", **request_)
    assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text
    assert client.get("/tenants/one").json() == before
    assert len(client.get("/tenants").json()["tenants"]) == 1


def test_a_tenant_outlives_the_server_and_can_be_deleted(
    desk: Desk, run_dir: str, tmp_path: Path
) -> None:
    desk.fit("one", [Image("a", png(0), "a"), Image("b", png(1), "b")], adds=False)
    again = Desk(run_dir, tmp_path / "tenants")
    client = TestClient(web(again.tenants, Here(again), MOST))
    assert client.post("/tenants/one/predict", **form([0], labels=False)).status_code == 200
    assert client.delete("/tenants/one").status_code == 200
    assert client.delete("/tenants/one").status_code == 404
    assert list((tmp_path / "tenants").iterdir()) == []


def test_versions_are_whole_and_none_is_lost(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [Image("a", png(0), "a"), Image("b", png(1), "b")]
    desk.fit("one", examples, adds=False)
    # Another server adds a class between this one's look at the newest version and its own write.
    store, others = Tenants.store, [Image("c", png(2), "c")]

    def late(self: Tenants, name: str, classifier: Any, after: int) -> int:
        monkeypatch.setattr(Tenants, "store", store)
        desk.fit("one", others, adds=True)
        return store(self, name, classifier, after)

    monkeypatch.setattr(Tenants, "store", late)
    known = desk.fit("one", [Image("d", png(3), "d")], adds=True)
    assert [one["class"] for one in known["classes"]] == ["a", "b", "c", "d"]
    with pytest.raises(TooLate):
        desk.tenants.store("one", desk.classifier("one", known["version"]), after=1)
    (tmp_path / "tenants" / "one" / "9").mkdir()  # a version that is not whole does not count
    assert desk.tenants.version("one") == 3
    kept = sorted(path.name for path in (tmp_path / "tenants" / "one").iterdir())
    assert kept == ["2", "3", "9"]  # and no draft


def test_a_head_is_of_its_network_alone(desk: Desk, tmp_path: Path) -> None:
    desk.fit("one", [Image("a", png(0), "a"), Image("b", png(1), "b")], adds=False)
    home = tmp_path / "tenants" / "one" / "1"
    assert sum(path.stat().st_size for path in home.glob("head.*")) < 10_000
    assert not (home / "model.safetensors").exists()
    other = trained(tmp_path, ways=2)
    stranger = Desk(str(other.run_dir), tmp_path / "tenants")
    with pytest.raises(ConfigError, match="fitted on another network"):
        stranger.classifier("one", 1)


# Of Ray Serve's own models, when it is imported.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field` is deprecated")
def test_what_cannot_be_served_is_said_before_anything_is_started(
    run_dir: str, tmp_path: Path
) -> None:
    def message(*arguments: str) -> str:
        outcome = CliRunner().invoke(app, ["serve", *arguments])
        assert outcome.exit_code == 2, outcome.output
        return outcome.output

    assert "none" in message(str(tmp_path / "none"))
    (tmp_path / "file").touch()
    assert "cannot be made" in message(run_dir, "--tenants", str(tmp_path / "file" / "t"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        text = message(run_dir, "--tenants", str(tmp_path / "t"), "--port", port)
        assert f"127.0.0.1:{port} cannot be listened on" in text


@contextlib.contextmanager
def served(run_dir: str, folder: Path) -> Iterator[str]:
    """A server of its own process; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = folder / "serve.log"
    command = [sys.executable, "-m", "bomemeta", "serve", run_dir, "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--tenants", str(folder / "tenants"), "--replicas", "2"], stderr=out
        )
    try:
        _wait(lambda: b"serving at" in log.read_bytes() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(START_S) == 0, log.read_text()


def _wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + START_S
    while not done():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.2)


def test_a_real_server_answers_and_leaves_nothing_running(run_dir: str, tmp_path: Path) -> None:
    with served(run_dir, tmp_path) as url, httpx.Client(base_url=url, timeout=START_S) as http:
        assert http.post("/tenants/one/fit", **form([0, 1])).json()["version"] == 1
        first = http.post("/tenants/one/predict", **form([0, 1], labels=False)).json()
        # Every replica knows a class that was added through one of them.
        assert http.post("/tenants/one/add_examples", **form([2])).json()["version"] == 2
        answers = [
            http.post("/tenants/one/predict", **form([0, 2], labels=False)).json() for _ in range(8)
        ]
        assert all(answer == answers[0] for answer in answers)
        assert len(answers[0]["predictions"][1]["probabilities"]) == 3
        assert len(first["predictions"][0]["probabilities"]) == 2
        assert http.post("/tenants/no/predict", **form([0], labels=False)).status_code == 404
        bad = http.post("/tenants/one/predict", files=[("images", ("x.png", b"no"))])
        assert (bad.status_code, "x.png cannot be read" in bad.json()["error"]) == (422, True)
        assert "<title>bomemeta</title>" in http.get("/").text
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
    assert not [pid for pid in _processes() if str(tmp_path).encode() in _command(pid)]


def _processes() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()]


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow(
    reason="a real browser, half a minute: apt install chromium-driver, pip install selenium, pytest -m slow -k page"
)
def test_the_page_fits_and_predicts_in_a_browser(
    run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "docs"))
    pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    if shutil.which("chromedriver") is None:
        pytest.skip("no chromedriver here: apt install chromium-driver")
    images = [tmp_path / f"{kind}-{seed}.png" for kind in (0, 1) for seed in (0, 1)]
    for path in images:
        kind, seed = path.stem.split("-")
        path.write_bytes(png(int(kind), int(seed)))
    page = importlib.import_module("screenshots")
    with served(run_dir, tmp_path) as url:
        browser = page.chrome()
        try:
            browser.get(url)
            page.fit(browser, {"a": images[:1], "b": images[2:3]})
            assert page.ask(browser, [images[1], images[3]]) == ["a", "b"]
            for width, path in zip(page.WIDTHS, page.photographed(browser, tmp_path), strict=True):
                with Pillow.open(path) as shown:
                    assert shown.size[0] == width
                assert path.stat().st_size < 150_000
            wide = browser.execute_script("return document.documentElement.scrollWidth")
            assert wide <= min(page.WIDTHS)  # nothing sticks out on a telephone
            (tmp_path / "text.png").write_bytes(b"no image")
            browser.find_element("id", "ask").send_keys(str(tmp_path / "text.png"))
            message = browser.find_element("id", "message")
            page.wait(lambda: "text.png cannot be read" in message.text)
            errors = [
                entry for entry in browser.get_log("browser") if "422" not in entry["message"]
            ]
            assert errors == []
        finally:
            browser.quit()
