"""`bomemeta report`: what is on the page, what is left out with a sentence, and what may not get through."""

from __future__ import annotations

import base64
import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_predict import trained
from typer.testing import CliRunner

import bomemeta as bm
from bomemeta.cli import app
from bomemeta.data.class_images import ClassRows, generator
from bomemeta.data.episodes import EpisodeSpec
from bomemeta.errors import ConfigError
from bomemeta.page import charts
from bomemeta.page.classes import components
from bomemeta.page.examination import examine
from bomemeta.page.html import text
from bomemeta.page.source import read

TOY = str(Path(__file__).with_name("toy.py"))
EVIL = "<script>alert(1)</script>"
# Without a name space, a script, a link to elsewhere or an image from elsewhere.
OUTSIDE = re.compile(r"https?:|<script|<link|<iframe|@import|url\((?!#)|javascript:", re.I)


class Page(html.parser.HTMLParser):
    """Tags that are not closed, in the order in which they were opened, and all text."""

    EMPTY = frozenset({"meta", "img", "use", "path", "rect", "br", "input"})

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.parts: list[str] = []
        self.images: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not any(name.startswith("on") for name, _ in attrs)  # a script in an attribute
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())


def page_of(run_dir: Path | str, tmp_path: Path, **options: Any) -> Page:
    path = bm.write_report(run_dir, tmp_path / "page.html", force=True, **options)
    content = path.read_text(encoding="utf-8")
    assert OUTSIDE.search(content) is None
    found = Page(content)
    assert found.open == []
    return found


def toy_run(folder: Path, steps: int = 3, **keys: Any) -> Path:
    config: dict[str, Any] = {
        "problem": {"name": "analytic", "case": "quadratic"},
        "solver": {"name": "bome"},
        "log": {"tensorboard": False},
    }
    bm.train(config, steps=steps, workers=0, output_dir=str(folder), **keys)
    return folder


@pytest.fixture(scope="module")
def few_shot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = trained(tmp_path_factory.mktemp("page")).run_dir
    assert found is not None
    return found


def test_a_few_shot_run_is_shown_whole(few_shot: Path, tmp_path: Path) -> None:
    page = page_of(few_shot, tmp_path)
    for title in (
        "Learning curves", "Lambda and q", "Worst and best test episodes", "Test classes in two dimensions", "Time per step",
        "Health", "Final metrics", "finished after 2 steps", "SHA-256 of x", "PCA", "tested for this page",
    ):  # fmt: skip
        assert title in page.text, title
    record = json.loads((few_shot / "result.json").read_text())
    assert record["upper_sha256"] in page.text
    assert record["versions"]["torch"] in page.text
    assert f"{100 * record['metrics']['test_accuracy']:.1f} %" in page.text
    # 2 + 2 episodes of 3 ways with 2 support images and 4 queries each
    assert len(page.images) == 4 * 3 * 6
    assert all(base64.b64decode(src.partition("base64,")[2]).startswith(b"\x89PNG") for src in page.images)  # fmt: skip
    # The toy data set has no `class_names`.
    assert "does not say which classes its episodes have" in page.text


@pytest.mark.parametrize("problem", [{}, {"head": "span"}, {"head": "r2d2"}, {"form": "network"}], ids=str)  # fmt: skip
def test_what_is_tested_again_is_the_runs_own_evaluation(
    tmp_path: Path, problem: dict[str, Any]
) -> None:
    run = trained(tmp_path, **problem)
    assert run.run_dir is not None
    source = read(str(run.run_dir), [], None, trust=False)
    assert source.checkpoint is not None
    found = examine(source.settings, source.checkpoint, 4, lambda _: None)
    assert found.accuracy[0] == pytest.approx(run.metrics["test_accuracy"], abs=1e-7)
    assert found.accuracy[1] == pytest.approx(
        run.metrics["test_ci95"],
        abs=1e-3,  # the run's is the root of a difference of float32 sums
    )
    ordered = [one.accuracy for one in found.ordered()]
    assert ordered == sorted(ordered)
    assert [one.task for one in found.worst + found.best[::-1]] == [one.task for one in found.ordered()]  # fmt: skip
    assert found.embedding is not None
    assert len(found.embedding.features) == len(found.embedding.labels) == 3 * 6


@pytest.mark.parametrize(
    ("problem", "data", "metric"),
    [
        ({"name": "hyper_cleaning", "train": 60, "validation": 30, "selection": 40, "blocks": 4}, "digits", "test_accuracy"),
        ({"name": "reweighting", "clean": 40, "clean_batch": 13, "blocks": 3, "network": "mlp"}, "digits", "test_accuracy"),
        ({"name": "continual", "stream": "split", "tasks": 2, "samples_per_task": 40, "test_samples_per_task": None,
          "blocks": 2, "objective": "er", "method": "plain"}, "digits", "acc"),
    ],
    ids=["hyper_cleaning", "reweighting", "continual"],
)  # fmt: skip
def test_a_shared_y_is_tested_on_the_whole_part(
    tmp_path: Path, problem: dict[str, Any], data: str, metric: str
) -> None:
    config = {"problem": problem, "data": {"dataset": data}, "solver": {"name": "bome", "inner_steps": 2}}  # fmt: skip
    steps = None if problem["name"] == "continual" else 3
    keys: dict[str, Any] = {} if steps is None else {"steps": steps}
    run = bm.train(config, output_dir=str(tmp_path / "run"), workers=0, log={"tensorboard": False}, **keys)  # fmt: skip
    page = page_of(tmp_path / "run", tmp_path)
    assert f"{100 * run.metrics[metric]:.1f} %" in page.text
    source = read(str(tmp_path / "run"), [], None, trust=False)
    assert source.checkpoint is not None
    found = examine(source.settings, source.checkpoint, 1, lambda _: None)
    counts = found.confusion()
    assert counts is not None
    samples = sum(counts.values())
    right = sum(number for (true, predicted), number in counts.items() if true == predicted)
    assert right / samples == pytest.approx(found.accuracy[0])
    if metric == "test_accuracy":
        assert found.accuracy[0] == pytest.approx(run.metrics[metric], abs=1e-6)
    else:  # the mean over tasks, whose parts differ in size
        of = [sum(one) for one in ([p == t for p, t in zip(b.predicted, b.true, strict=True)] for b in found.tested)]  # fmt: skip
        assert sum(of) == right
        assert "Accuracy on every task" in page.text
    assert "There are no episodes" in page.text


def test_what_a_problem_does_not_have_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    page = page_of(toy_run(tmp_path / "run"), tmp_path)
    assert "The problem is no classification." in page.text
    assert "nothing to say yet" in page.text
    assert page.images == []


def test_a_run_that_has_not_ended_has_a_page(few_shot: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(few_shot, half)
    (half / "result.json").unlink()
    with (half / "metrics.jsonl").open("a") as log:
        log.write('{"step": 2, "upper_lo')  # a kill cut it short
    page = page_of(half, tmp_path)
    assert "not finished: step 2 of 2" in page.text
    assert "there are no final metrics yet" in page.text
    assert "Worst and best test episodes" in page.text
    shutil.rmtree(half / "checkpoints")
    page = page_of(half, tmp_path)
    assert "There is no checkpoint that could be tested" in page.text
    assert "Learning curves" in page.text
    (half / "metrics.jsonl").unlink()
    assert "The log has no losses" in page_of(half, tmp_path).text


def test_data_that_is_not_here_costs_the_classes_alone(few_shot: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    page = page_of(few_shot, tmp_path, overrides=["data.dataset=omniglot", f"data.root={tmp_path}"], say=heard.append)  # fmt: skip
    assert "could not be tested again here: " in page.text
    assert "Learning curves" in page.text
    assert any("omniglot" in note for note in heard)


def test_untrusted_text_is_escaped(few_shot: Path, tmp_path: Path) -> None:
    evil = tmp_path / f"{EVIL.replace('/', '')}"
    shutil.copytree(few_shot, evil)
    lines = [json.loads(line) for line in (evil / "metrics.jsonl").read_text().splitlines()]
    names = (EVIL, "$\\frac{a$", '"><img src=x onerror=alert(1)>', "_hidden", "\N{SNOWMAN}")
    for number, line in enumerate(lines):
        line |= dict.fromkeys(names, number + 1.5)
        line |= {
            "text": EVIL,
            "list": [1],
            "large": 10**400,
            "truth": True,
            f"accuracy {EVIL}": 0.5,
        }
    (evil / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    record = json.loads((evil / "result.json").read_text())
    record["notes"] = [EVIL, {"a": EVIL}]
    record["metrics"] |= {EVIL: 1.0}
    record["versions"] |= {EVIL: EVIL}
    record["wall_s"] = EVIL
    del record["digest"]  # as an older version wrote it
    (evil / "result.json").write_text(json.dumps(record))
    page = page_of(evil, tmp_path)
    assert page.text.count(EVIL) >= 5
    assert "onerror=alert(1)" in page.text
    assert "$\\frac{a$" in page.text


def test_all_text_goes_through_one_function() -> None:
    assert text(f"{EVIL}'\"&") == "&lt;script&gt;alert(1)&lt;/script&gt;&#x27;&quot;&amp;"
    drawing = charts.lines(EVIL, {EVIL: charts.Curve([0, 1], [1, 2]), "b": charts.Curve([0, 1], [2, 3])})  # fmt: skip
    assert "<script" not in drawing
    assert "currentColor" in drawing
    assert "var(--c1)" in drawing


def test_a_page_never_takes_anothers_place(
    few_shot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["report", str(few_shot), "--episodes", "1"]
    for name in ("run-report.html", "run-report-2.html"):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert f"written: {tmp_path / name}" in done.output
        assert "testing 1 test episodes" in done.output
    Path("mine.html").write_text("mine")
    done = CliRunner().invoke(app, [*arguments, "--out", "mine.html"])
    assert (done.exit_code, "mine.html exists" in done.output) == (2, True), done.output
    assert Path("mine.html").read_text() == "mine"
    assert CliRunner().invoke(app, [*arguments, "--out", "mine.html", "--force"]).exit_code == 0
    assert Path("mine.html").read_text().startswith("<!doctype html>")
    for out, message in ((".", "is a folder"), ("no/page.html", "cannot be written")):
        with pytest.raises(ConfigError, match=message):
            bm.write_report(few_shot, out, episodes=1)
    with pytest.raises(ConfigError, match="episodes: got 0"):
        bm.write_report(few_shot, episodes=0)


def test_a_folder_from_elsewhere_executes_nothing_until_it_is_trusted(
    few_shot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))  # another user, as it were
    arguments = ["report", str(few_shot), "--episodes", "1", "--out", str(tmp_path / "page.html")]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, "comes from elsewhere" in done.output) == (2, True), done.output
    assert not (tmp_path / "page.html").exists()
    assert CliRunner().invoke(app, [*arguments, "--trust"]).exit_code == 0


def test_a_folder_of_seeds_says_which_folder_to_give(tmp_path: Path) -> None:
    toy_run(tmp_path / "run", seeds=2)
    with pytest.raises(ConfigError, match=r"holds 2 runs.*report .*run/seed-0"):
        bm.write_report(tmp_path / "run", tmp_path / "page.html")
    assert "finished" in page_of(tmp_path / "run" / "seed-1", tmp_path).text


def test_names_are_those_of_the_draw() -> None:
    spec = EpisodeSpec(4, 1, 2)
    rows = ClassRows(np.arange(9) * 10, np.full(9, 10), [f"c{i}" for i in range(9)])
    drawn = rows.draw(spec, generator((3, 1)))
    assert rows.names_of(spec, (3, 1)) == [f"c{row // 10}" for row in drawn.support[:, 0]]


def test_two_components_are_those_of_the_largest_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(50, 2, generator=generator, dtype=torch.float64) * torch.tensor([5.0, 2.0])
    turned = torch.linalg.qr(torch.randn(7, 7, generator=generator, dtype=torch.float64)).Q[:2]
    points, share = components(plane @ turned + 3)
    assert share == pytest.approx(1.0)
    assert torch.cdist(points, points) == pytest.approx(torch.cdist(plane, plane), abs=1e-6)
    assert points[:, 0].var() > points[:, 1].var()
    assert components(torch.ones(3, 1))[0].shape == (3, 2)


def test_a_long_curve_is_drawn_as_means_and_ranges() -> None:
    curve = charts.Curve(range(10_000), [float(step % 7) for step in range(10_000)])
    steps, low, mean, high = charts._thinned(curve)
    assert len(steps) <= charts.POINTS
    assert (low.min(), high.max()) == (0, 6)
    assert mean[:-1] == pytest.approx([3.0] * (len(mean) - 1), abs=0.2)  # the last has fewer steps


@pytest.mark.slow(
    reason="a real browser, half a minute: apt install chromium-driver, pip install selenium, pytest -m slow -k page"
)
def test_the_page_fits_narrow_and_wide_light_and_dark(few_shot: Path, tmp_path: Path) -> None:
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    if shutil.which("chromedriver") is None:
        pytest.skip("no chromedriver here: apt install chromium-driver")
    page_of(few_shot, tmp_path)
    compared = subprocess.run(
        [sys.executable, "-m", "bomemeta", "compare", f"a={few_shot}", f"b={few_shot}", "--html", str(tmp_path / "two.html")],
        check=True,
    )  # fmt: skip
    assert compared.returncode == 0
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        for name in ("page.html", "two.html"):
            seen = {}
            for scheme in ("light", "dark"):
                for width in (420, 1200):
                    feature = {"name": "prefers-color-scheme", "value": scheme}
                    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
                    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
                    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
                    browser.get((tmp_path / name).as_uri())
                    got = browser.execute_script(
                        "const s = getComputedStyle(document.body), svg = document.querySelector('figure svg');"
                        "return [document.documentElement.scrollWidth, s.backgroundColor, s.color,"
                        " getComputedStyle(svg.querySelector('text')).fill, svg.getBoundingClientRect().width]"
                    )
                    assert got[0] == width
                    assert 300 < got[4] < width
                    assert got[3] == got[2]  # the chart's ink is the page's
                    seen[scheme] = got[1]
            assert seen["light"] != seen["dark"]
            assert browser.get_log("browser") == []
    finally:
        browser.quit()
