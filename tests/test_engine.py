"""The loop's own order: what is said of a step, when, and before what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from bomemeta.assembly import open_transport, trainer_of
from bomemeta.config import load_config
from bomemeta.distributed.transport import Round, ShardCall, nothing
from bomemeta.engine import Trainer
from bomemeta.errors import DivergenceError, LowerStateLost

JOB = {
    "problem": {"name": "analytic", "case": "quadratic", "tasks": 2},
    "solver": {"name": "bome", "inner_steps": 2, "upper_lr": 0.01},
    "checkpoint": {"every_steps": 2},
    "steps": 4,
}


class Loop:
    """`Trainer.fit` on a transport that writes down its rounds, and calls `meanwhile` after them: what is
    said then was not said before.

    `failing`: what the round of a step raises the first time, before anything else.
    """

    collective = False

    def __init__(self, failing: dict[int, Any] | None = None, keys: Sequence[str] = ()) -> None:
        config = load_config(JOB, keys)
        self._serial = open_transport(config, print)
        self._failing = dict(failing or {})
        self.events: list[tuple[str, int]] = []
        self.trainer: Trainer = trainer_of(config, transport=self)
        self.state = self.trainer.state

    def run(
        self,
        broadcast: np.ndarray,
        calls: Sequence[ShardCall],
        meanwhile: Callable[[], None] = nothing,
    ) -> Round:
        step = calls[0].request.step
        if step in self._failing:
            raise self._failing.pop(step)
        if ("round", step) not in self.events:  # a step may have several
            self.events.append(("round", step))
        answer = self._serial.run(broadcast, calls)
        meanwhile()
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._serial, name)

    def go(self, stop: Callable[[], bool] = lambda: False) -> list[tuple[str, int]]:
        self.trainer.fit(
            log=lambda step, metrics: self.events.append(("log", step)),
            save=lambda state: self.events.append(("save", state.step)),
            roll_back=lambda error: self.events.append(("back", self.state.step)),
            stop=stop,
        )
        return self.events


def test_a_step_is_logged_while_the_next_is_on_its_way_and_before_it_is_saved() -> None:
    assert Loop().go() == [
        ("round", 0), ("round", 1), ("log", 0), ("log", 1), ("save", 2), ("round", 2), ("round", 3), ("log", 2), ("log", 3), ("save", 4),
    ]  # fmt: skip


def test_a_loop_that_is_stopped_logs_before_it_saves() -> None:
    loop = Loop(keys=["checkpoint.every_steps=100"])
    assert loop.go(stop=lambda: loop.state.step == 3)[-3:] == [("log", 1), ("log", 2), ("save", 3)]


def test_a_step_is_logged_before_the_run_goes_back() -> None:
    """Else its line would come after those that are dropped."""
    loop = Loop({1: LowerStateLost("gone")})
    assert loop.go()[:4] == [("round", 0), ("log", 0), ("back", 1), ("round", 1)]


def test_a_run_goes_back_where_y_is_gone_when_it_is_to_be_saved() -> None:
    """As with a y that stays with the workers, all of which are lost."""
    loop, saved = Loop(), []

    def save(state: Any) -> None:
        saved.append(state.step)
        if saved.count(state.step) == 1:
            raise LowerStateLost("gone")

    def back(error: LowerStateLost) -> None:
        loop.state.step -= 1

    loop.trainer.fit(log=lambda *_: None, save=save, roll_back=back, stop=lambda: False)
    assert saved == [2, 2, 4, 4]


@pytest.mark.parametrize("error", [DivergenceError("nan"), KeyboardInterrupt()])
def test_a_step_is_logged_whatever_ends_the_next_one(error: Any) -> None:
    loop = Loop({3: error})
    with pytest.raises(type(error)):
        loop.go()
    assert loop.events[-2:] == [("round", 2), ("log", 2)]
