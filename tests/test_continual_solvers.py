"""Streams with the solvers that differentiate through y's steps or solve for its multiplier, and
the figures of a run in TensorBoard.
"""

from __future__ import annotations

import io
from pathlib import Path

import pytest

import bomemeta

# Two permutations of the digits, 120 steps: enough to learn both.
CUT = [
    "workers=0",
    "shards=1",
    "problem.blocks=1",
    "problem.tasks=2",
    "problem.samples_per_task=300",
]
# The keys of docs/continual.md.
STEPS = {
    "itd": ["solver.name=itd", "solver.inner_lr=0.1", "solver.upper_lr=0.1"],
    "sl_bamm": [
        "solver.name=sl_bamm", "solver.schedule=constant", "solver.mu=0.1", "solver.lower_lr=0.1", "solver.aux_lr=0.01",
        "solver.upper_lr=0.1",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_stream_is_learned(name: str, tmp_path: Path) -> None:
    result = bomemeta.train(
        "continual_quickstart",
        [*CUT, *STEPS[name], "log.tensorboard=false", f"output_dir={tmp_path / 'run'}"],
    )
    assert result.steps == 120
    # Chance is 0.1; measured 0.85 (itd) and 0.81 (sl_bamm).
    assert result.metrics["acc"] > 0.6
    assert result.notes == []
    page = (Path(__file__).parents[1] / "docs" / "continual.md").read_text(encoding="utf-8")
    assert " ".join(STEPS[name]) in page


def test_metrics_are_in_the_folder_and_in_tensorboard(tmp_path: Path) -> None:
    """Whatever PNG a problem leaves, with the picture's own bits."""
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    few = ["problem.samples_per_task=20", "log.tensorboard=true"]
    run = bomemeta.train("continual_quickstart", [*CUT, *few, f"output_dir={tmp_path / 'run'}"])
    events = EventAccumulator(str(run.run_dir / "tensorboard")).Reload()
    assert sorted(events.Tags()["images"]) == ["accuracy_curve", "accuracy_matrix"]
    for name in events.Tags()["images"]:
        (event,) = events.Images(name)
        assert event.step == run.steps - 1
        with (
            Image.open(io.BytesIO(event.encoded_image_string)) as shown,
            Image.open(run.run_dir / f"{name}.png") as file,
        ):
            assert shown.tobytes() == file.convert("RGB").tobytes()
