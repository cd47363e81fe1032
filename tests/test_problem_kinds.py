"""What a problem is said to be by its base class, and what is said of names that are not asked for."""

from __future__ import annotations

import pytest

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
    ("base", "name", "value", "words"),
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
def test_names_that_mean_nothing_are_refused(base, name, value, words):
    with pytest.raises(ConfigError, match=words):
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
