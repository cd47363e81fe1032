"""What takes long says that it still runs, and for how long; what is quick says nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from bomemeta import evaluation, runs, session
from bomemeta.heartbeat import Heartbeat
from bomemeta.report import Quiet


def test_a_word_comes_while_it_lasts_and_none_after() -> None:
    heard, spoken = [], threading.Event()

    def say(text: str) -> None:
        heard.append(text)
        spoken.set()

    with Heartbeat(say, first_s=0.01, every_s=0.01) as life:
        assert not spoken.wait(0.1)  # nothing is named yet
        life.doing("counting")
        assert spoken.wait(60)
    assert heard[0].startswith("counting: ")
    assert heard[0].endswith(" s so far")
    assert not life._thread.is_alive()


def test_what_is_quick_is_not_spoken_of() -> None:
    heard: list[str] = []
    with Heartbeat(heard.append, first_s=3600) as life:
        life.doing("counting")
    assert heard == []


def test_the_closing_examination_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it runs, and not in the result, which is the same for a slow machine."""
    heard = threading.Event()

    class Heard(Quiet):
        def note(self, text: str) -> None:
            if text.startswith("the closing examination, with more inner steps than in training: "):
                heard.set()

    def slow(*given: Any) -> dict[str, float]:
        given[2]("the closing examination, with more inner steps than in training")
        assert heard.wait(60)
        return {}

    monkeypatch.setattr(evaluation, "final_metrics", slow)
    monkeypatch.setattr(session, "Heartbeat", lambda say: Heartbeat(say, 0.01, 0.01))
    settings = {
        "problem": {"name": "analytic", "case": "quadratic", "tasks": 2},
        "solver": {"name": "bome", "inner_steps": 2}, "steps": 1, "log": {"tensorboard": False},
    }  # fmt: skip
    result = runs.train(settings, listener=Heard())
    assert heard.is_set()
    assert not [note for note in result.notes if "closing" in note]
