"""Objects of classes that nobody would write on purpose: each trains, or is refused in one line."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from house import Heated

import bomemeta as bm
from bomemeta.errors import ConfigError

KEYS: dict[str, Any] = {"steps": 2, "log": {"tensorboard": False}}


class Plain(Heated):
    num_tasks, _curvature = 4, 1.0

    def __init__(self) -> None:
        pass


class Raises(Plain):
    @property
    def num_tasks(self) -> int:  # type: ignore[override]
        raise AttributeError("no such table")


class WithLock(Plain):
    def __init__(self) -> None:
        self.lock = threading.Lock()


class WithScale(Plain):
    def __init__(self, scale: Any) -> None:
        self.scale = scale


class Anything(Plain):
    def __init__(self, *parts: Any, **more: Any) -> None:
        self.parts, self.more = parts, more


class HasAll(Plain):
    def __getattr__(self, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return 7


class NoSlots(Plain):
    __slots__ = ("scale",)


def solver(**fields: Any) -> bm.BOME:
    return bm.BOME(**{"inner_steps": 2, "upper_lr": 0.1} | fields)


def train(problem: Any = None, fields: dict[str, Any] | None = None, **keys: Any) -> bm.Result:
    return bm.train(problem or Plain(), solver(**fields or {}), **{**KEYS, **keys})


WORK: dict[str, Callable[[], bm.Result]] = {
    "numpy numbers in a solver": lambda: train(
        None, {"inner_steps": np.int64(2), "upper_lr": np.float32(0.1)}
    ),
    "numpy numbers as keys": lambda: train(steps=np.int64(2), workers=np.int32(0)),
    "a lambda": lambda: train(WithScale(lambda number: 2 * number)),
    "a tensor": lambda: train(WithScale(torch.nn.Parameter(torch.ones(3)))),
    "* and **": lambda: train(Anything(1, 2, scale=3)),
    "every attribute": lambda: train(HasAll()),
    "slots": lambda: train(NoSlots()),
}


@pytest.mark.parametrize("name", WORK)
def test_trains(name: str) -> None:
    assert WORK[name]().steps == 2


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a tensor for a number": (
        lambda: train(None, {"upper_lr": torch.tensor(0.1)}),
        "solver.upper_lr: got an object of torch:Tensor, wanted a number",
    ),
    "a generator as data": (
        lambda: bm.train(bm.FewShot(ways=2, shots=1), solver(), data=(i for i in ()), **KEYS),
        "data: an object of generator cannot be copied",
    ),
    "a lock": (lambda: train(WithLock()), "problem.lock: an object of lock cannot be copied"),
    "a property that raises": (
        lambda: train(Raises()),
        r"problem Raises raised AttributeError: no such table at .*test_odd_objects.py",
    ),
    "no listener": (
        lambda: train(listener=object()),
        "listener: got an object of object without start, step, saved, note, close",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_in_one_line(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_numpy_numbers_are_recorded_and_resumed(tmp_path: Path) -> None:
    keys = {"output_dir": str(tmp_path / "run")}
    train(WithScale(np.float64(0.5)), {"upper_lr": np.float64(0.1)}, **keys)
    longer = bm.resume(tmp_path / "run", problem=WithScale, steps=4)
    assert longer.steps == 4
    assert longer.upper_sha256 == train(WithScale(0.5), {"upper_lr": 0.1}, steps=4).upper_sha256


def test_keywords_that_no_parameter_names_are_fields(tmp_path: Path) -> None:
    train(Anything(scale=3), output_dir=str(tmp_path / "run"))
    bm.resume(tmp_path / "run", steps=4)  # by the class's module
    train(Anything(1, scale=3), output_dir=str(tmp_path / "more"))
    with pytest.raises(ConfigError, match=r"problem\.parts was given by position"):
        bm.resume(tmp_path / "more", steps=4)
    assert bm.resume(tmp_path / "more", problem=Anything(1, scale=3), steps=4).steps == 4
