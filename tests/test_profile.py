"""`bomemeta profile` and the spans that it listens to."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from toy import Bench, attached
from typer.testing import CliRunner

from bomemeta.cli import app
from bomemeta.core import spans
from bomemeta.core.spans import heard, span
from bomemeta.problems.few_shot import FewShot
from bomemeta.profile import KNOBS, REST, STEP, Profile, profile
from bomemeta.solvers.bome import BOME

ROOT = Path(__file__).parents[1]
TOY = {
    "problem": {"name": "few_shot", "width": 4, "ways": 3, "queries": 2},
    "data": {"dataset": "toy"},
    "solver": {"name": "bome", "inner_steps": 2},
    "steps": 20,
    "tasks_per_step": 4,
    "shards": 2,
    "workers": 0,
}


def test_an_inner_span_is_not_counted_twice():
    with heard() as found:
        with span("outer"):
            time.sleep(0.01)
            with span("inner"):
                time.sleep(0.03)
        with span("outer"):
            pass
    # Sleeping takes at least as long as was asked for, and by what it takes longer nothing is known
    # but that both have it.
    assert found.seconds["inner"] >= 0.03
    assert 0.01 <= found.seconds["outer"] < found.seconds["inner"]
    with span("unheard"):
        pass
    assert "unheard" not in found.seconds


def test_the_spans_of_a_step_are_what_the_solver_does():
    bench = Bench(
        attached(FewShot(ways=3, queries=2, width=4)),
        BOME(inner_steps=2, barrier="per_task", diagnose_every=0),
        2,
    )
    with heard() as found:
        bench.advance()
    assert set(found.seconds) == {
        spans.LOAD,
        spans.ENCODE,
        spans.INNER_LOOP,
        spans.LOSSES,
        spans.PULL_BACK,
    }
    assert all(seconds > 0 for seconds in found.seconds.values())


def test_a_profile_adds_up(tmp_path):
    found = profile(TOY, steps=3, warm_up=1)
    assert set(found.parts) == set(STEP)
    assert sum(found.parts.values()) == pytest.approx(
        found.step_s, rel=0.5
    )  # medians of the parts, not parts of one step
    assert (found.tasks, found.shards, found.reduces) == (4, 2, 1)
    assert found.within[spans.ENCODE] > 0
    assert REST in found.within
    assert any("conv" in name for name in found.operations)
    path = tmp_path / "profile.json"
    found.write(path)
    assert json.loads(path.read_text())["largest"] == found.largest
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("parts", "largest"),
    [
        ({"broadcast": 3.0, "compute": 1.0}, "broadcast"),
        ({"broadcast": 1.0, "compute": 3.0}, spans.PULL_BACK),
    ],
)
def test_the_largest_part_is_named_with_its_knob(parts, largest):
    within = {spans.PULL_BACK: 0.2, spans.ENCODE: 0.1}
    found = Profile(
        1,
        1,
        1,
        0,
        1,
        4.0,
        parts,
        within,
        {"a": 1.0},
        None,
        1,
        1,
        {"cores": 1, "cpu": "x", "versions": {}},
    )
    assert found.largest == largest
    assert f"largest part: {largest}. {KNOBS[largest]}" in found.lines()


def test_every_part_has_a_knob():
    names = {value for name, value in vars(spans).items() if name.isupper()}
    assert set(KNOBS) == (set(STEP) - {"compute"}) | names | {REST}


def test_the_command_prints_it_and_writes_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "analytic_quadratic.yaml")
    done = CliRunner().invoke(
        app, ["profile", config, "workers=0", "--steps", "2", "--warm-up", "1", "--json", "p.json"]
    )
    assert done.exit_code == 0, done.output
    assert "largest part: " in done.output
    assert set(json.loads((tmp_path / "p.json").read_text())["parts"]) == set(STEP)
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_a_run_that_is_too_short_is_refused():
    config = str(ROOT / "configs" / "analytic_quadratic.yaml")
    done = CliRunner().invoke(app, ["profile", config, "steps=5"])
    assert done.exit_code == 2
    assert (
        "steps: the run has 5; 3 to warm up and 10 to profile are more: set fewer with --steps"
        in done.output
    )
