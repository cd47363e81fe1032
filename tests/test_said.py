"""What a run says where its metrics are not what one would expect: a stream that was cut, a schedule
that was stretched, a closing examination that was cut short, data that is not sound.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

import bomemeta
from bomemeta.doctor.doctor import examine
from bomemeta.solvers.bome import BOME

STREAM: dict[str, Any] = {
    "problem": {
        "name": "continual", "tasks": 2, "samples_per_task": 20, "test_samples_per_task": 10,
        "hidden": 4, "layers": 1, "method": "plain", "objective": "er",
    },
    "data": {"dataset": "digits"},
    "solver": {"name": "lower_only", "inner_lr": 0.05},
    "log": {"tensorboard": False},
}  # fmt: skip
QUADRATIC: dict[str, Any] = {
    "problem": {"name": "analytic", "case": "quadratic", "tasks": 2},
    "solver": {"name": "bome", "inner_steps": 2, "upper_lr": 0.1, "upper_schedule": "cosine"},
    "steps": 4,
    "log": {"tensorboard": False},
}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (3, "no metrics of the stream: it was cut after 3 of 8 steps, inside its first task, which ends after step 4"),
        (4, "cut after 4 of 8 steps: its metrics are those of the 1 of 2 tasks that were learned to their end$"),
        (6, "the 1 of 2 tasks that were learned to their end, as they were after step 4$"),
        (8, None),
    ],
)  # fmt: skip
def test_a_stream_that_was_cut(steps, message, tmp_path):
    run = bomemeta.train(STREAM, [f"steps={steps}", f"output_dir={tmp_path / 'run'}"])
    reported = [note for note in run.notes if "the stream" in note]
    if message is None:
        assert reported == []
    else:
        assert len(reported) == 1
        import re

        assert re.search(message, reported[0]), reported
        assert json.loads((run.run_dir / "result.json").read_text())["notes"] == run.notes
    assert ("acc" in run.metrics) == (steps >= 4)


def test_a_cosine_schedule_that_was_stretched(tmp_path):
    bomemeta.train(QUADRATIC, [f"output_dir={tmp_path / 'run'}"])
    longer = bomemeta.resume(tmp_path / "run", ["steps=8"])
    reported = [note for note in longer.notes if "cosine" in note]
    assert len(reported) == 1
    assert "steps was 4 and is 8" in reported[0]
    assert "at step 4 solver.upper_lr is multiplied by 0.5 and not by 0" in reported[0]
    constant = ["solver.upper_schedule=constant"]
    bomemeta.train(QUADRATIC, [*constant, f"output_dir={tmp_path / 'constant'}"])
    assert bomemeta.resume(tmp_path / "constant", ["steps=8"]).notes == []


@pytest.mark.parametrize(
    ("inner_steps", "key", "taken"),
    [(2, None, 20), (100, None, 1000), (101, None, 1000), (5000, None, 5000), (2, 7, 7), (5000, 9, 9)],
)  # fmt: skip
def test_how_many_steps_the_closing_examination_takes(inner_steps, key, taken):
    solver = BOME(inner_steps=inner_steps)
    assert solver._examine_steps(key) == taken
    capped = solver.examined_steps(key)
    assert capped == (
        (taken, 10 * inner_steps) if key is None and taken < 10 * inner_steps else None
    )


def test_the_closing_examination_says_so_and_has_a_key(tmp_path):
    short = ["steps=1", "solver.inner_steps=150", "solver.inner_lr=0.01"]
    capped = bomemeta.train(QUADRATIC, [*short, f"output_dir={tmp_path / 'capped'}"])
    assert any("1000 inner steps and not with the usual 1500" in note for note in capped.notes)
    assert "stationarity_gap_long" in capped.metrics
    none = bomemeta.train(
        QUADRATIC, [*short, "evaluation.examine_steps=0", f"output_dir={tmp_path / 'none'}"]
    )
    assert not any("_long" in name for name in none.metrics)
    assert none.notes == []
    assert none.upper_sha256 == capped.upper_sha256


def test_the_doctor_looks_at_the_episodes():
    config = {
        "imports": ["mixed_toy"],
        "problem": {"name": "few_shot", "ways": 3, "queries": 2, "test_queries": 2, "width": 4},
        "data": {"dataset": "mixed_toy", "fault": "one_based"},
        "solver": {"name": "bome", "inner_steps": 1, "adapt_steps": 1, "barrier_steps": 1},
        "steps": 1, "tasks_per_step": 1,
    }  # fmt: skip
    found = [finding.text for finding in examine(config).findings if finding.level == "PROBLEM"]
    assert any(
        "MixedToy, split train, episode 0: the support labels are 1" in text for text in found
    )
