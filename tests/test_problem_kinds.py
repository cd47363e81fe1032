"""What a problem is said to be by its base class, and what is said of names that are not asked for."""

from __future__ import annotations

import pytest
import torch

import bomemeta as bm
from bomemeta.core.problem import (
    Problem,
    SharedProblem,
    StreamProblem,
    start_memory,
    stream_length,
)
from bomemeta.errors import ConfigError


def method(self, *_):
    return None


@pytest.mark.parametrize(
    ("base", "name", "value", "message"),
    [
        (Problem, "lower", "shared", r"class Mine .*: got lower = 'shared'; .*bomemeta.SharedProblem"),
        (Problem, "lower", "sharred", r"got lower = 'sharred'; .*bomemeta.SharedProblem"),
        (SharedProblem, "lower", "per_task", "got lower = 'per_task'"),
        (Problem, "pool", property(method), "pool is not asked for any more; define `num_tasks`"),
        (Problem, "lower_gradient", method, "lower_gradient is not asked .*loss_gradient"),
        (Problem, "upper_gradient", method, "upper_gradient is not asked .*loss_gradient"),
        (SharedProblem, "num_tasks", property(method), "called num_blocks; rename it"),
        (Problem, "num_blocks", property(method), "asked of a SharedProblem alone"),
        (Problem, "length", property(method), "asked of a StreamProblem alone"),
        (SharedProblem, "milestone", method, "asked of a StreamProblem alone"),
    ],
)  # fmt: skip
def test_names_that_mean_nothing_are_refused(base, name, value, message):
    with pytest.raises(ConfigError, match=message):
        type("Mine", (base,), {name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("lower", 0.5), ("lower", "per_task"), ("pool", 3), ("length", 7)]
)
def test_fields_of_such_names_are_the_users_own(name, value):
    assert getattr(type("Mine", (Problem,), {name: value})(), name) == value


def test_kinds_and_their_defaults():
    assert Problem().num_tasks is None
    assert (SharedProblem().num_blocks, SharedProblem().num_tasks) == (1, 1)
    assert stream_length(SharedProblem()) is None
    assert start_memory(SharedProblem()) == {}
    stream = StreamProblem()
    assert start_memory(stream) == {}
    assert not stream.memory_due(0)
    assert not stream.milestone(0)
    assert stream.final_metrics([]) == {}
    with pytest.raises(TypeError, match=r"StreamProblem must define length\(\)"):
        stream_length(stream)


class Numbers(Problem):
    """f_i = (y - a_i)^2 and g_i = (y - x)^2 + y^2 / 2, with no axis in x and none in y but the tasks':
    y_i = 2 x / 3, and x* is 3 / 2 times the mean of the a_i, which is 2.
    """

    @property
    def num_tasks(self):
        return 3

    def init_upper(self, generator):
        return {"x": torch.zeros(())}

    def load(self, task_ids, step, split):
        return {"a": torch.tensor([1.0, 2.0, 3.0])[list(task_ids)]}

    def init_lower(self, encoded, batch):
        return {"y": torch.zeros(())}

    def upper_loss(self, encoded, lower, batch):
        return (lower["y"] - batch["a"]) ** 2

    def lower_loss(self, encoded, lower, batch):
        return (lower["y"] - encoded["x"]) ** 2 + lower["y"] ** 2 / 2


@pytest.mark.parametrize("solver", ["BOME", "LancBiO", "SOBA", "ITD", "F2SA"])
def test_x_and_y_may_be_single_numbers(solver):
    made = getattr(bm, solver)(upper_lr=0.3, upper_schedule="cosine")
    result = bm.train(Numbers(), made, steps=100, workers=0)
    # F2SA's penalty is 2 after 100 steps: its bias is of the order of its inverse.
    assert result.upper["x"].item() == pytest.approx(3, abs=0.3)
