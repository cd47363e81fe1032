"""What a search says while it runs, and how it hears Ctrl-C: parts that Tune calls, and pickles
with the search.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray import tune

from bomemeta.tune.locations import run_of, saved_step

# A cluster that others use may have room later; by then one wants to know what is waited for.
WAITING_S = 30.0


class _Live:
    """What belongs to this process and not to the search: Tune pickles its callbacks, and hands
    copies back when a search is resumed.
    """

    def __init__(self) -> None:
        self.say: Callable[[str], None] = lambda text: None
        self.interrupted = False
        self.idle_since = time.monotonic()
        self.reported = False
        self.notes: dict[int, list[str]] = {}  # of each trial's process, as far as they were said


_live = _Live()


@contextmanager
def spoken(say: Callable[[str], None]) -> Iterator[_Live]:
    """Sends the search's lines to `say`. The first Ctrl-C or SIGTERM ends it with its state saved,
    a second one at once.
    """
    global _live
    before, _live = _live, _Live()
    _live.say = say
    handlers: dict[int, Any] = {}

    def ask(number: int, frame: Any) -> None:
        if _live.interrupted:
            raise KeyboardInterrupt
        _live.interrupted = True
        say("stopping; each trial resumes from its last report (once more to stop at once)")

    if threading.current_thread() is threading.main_thread():
        handlers = {
            number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        if hasattr(signal, "SIGUSR1"):  # not on Windows
            handlers[signal.SIGUSR1] = signal.getsignal(
                signal.SIGUSR1
            )  # Tune takes it and keeps it
    try:
        yield _live
    finally:
        _live = before
        for number, handler in handlers.items():
            signal.signal(number, handler)


def trial_number(trial: Any) -> int:
    """Trials count from 1, in the order in which they were drawn."""
    return int(str(trial.trial_id).rpartition("_")[2]) + 1


def trial_folder(trial: Any) -> str:
    """The name of the trial's folder."""
    return f"trial-{trial_number(trial):02d}"


class Progress(tune.Callback):  # type: ignore[misc]
    """One line for whatever happens to a trial."""

    def __init__(self, metric: str, trials: int) -> None:
        self._metric, self._trials = metric, trials

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if _live.interrupted:
            signal.raise_signal(
                signal.SIGUSR1
            )  # the one signal at which Tune ends a search that is resumed later
        if any(trial.status == "RUNNING" for trial in trials):
            _live.idle_since, _live.reported = time.monotonic(), False
        elif not _live.reported and time.monotonic() - _live.idle_since > WAITING_S:
            _live.reported = True
            _live.say(
                f"no trial runs since {WAITING_S:g} s: waiting for room in the cluster, which others use"
            )

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        steps = (trial.last_result or {}).get("steps", 0)
        if steps == 0:  # what a killed driver had not noted of the trial is in its run folder
            steps = saved_step(run_of(trial))
        _live.say(
            f"{self._name(trial)} {f'resumes at step {steps}' if steps else 'begins'}: {values_text(trial.config)}"
        )

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        reported, notes = (
            _live.notes.get(trial_number(trial), []),
            result.get("notes", "").splitlines(),
        )
        for note in notes[len(reported) if notes[: len(reported)] == reported else 0 :]:
            _live.say(f"{self._name(trial)} note: {note}")
        _live.notes[trial_number(trial)] = notes
        ended = result.get("ended")
        if ended not in (None, "done"):
            _live.say(
                f"{self._name(trial)} {ended} after {result['steps']} steps: {result['reason']}"
            )
            return
        _live.say(
            f"{self._name(trial)} step {result['steps']}: {self._metric} {result[self._metric]:.6g}{', done' if ended else ''}"
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if (trial.last_result or {}).get("ended") is None:
            _live.say(
                f"{self._name(trial)} is stopped after {(trial.last_result or {}).get('steps', 0)} steps: others are better"
            )

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _live.say(
            f"{self._name(trial)} was lost ({_last_line(trial)}) and resumes from its last report"
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _live.say(f"{self._name(trial)} was lost ({_last_line(trial)}) and is given up")

    def _name(self, trial: Any) -> str:
        return f"trial {trial_number(trial)}/{self._trials}"


class Ends(tune.Stopper):  # type: ignore[misc]
    """Ends the whole search where a trial found the search itself to be wrong, as no trial after it
    could do better.
    """

    def __init__(self) -> None:
        self._wrong = False

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        self._wrong = self._wrong or result.get("ended") == "wrong"
        return False

    def stop_all(self) -> bool:
        return self._wrong


def values_text(values: Mapping[str, Any]) -> str:
    """`solver.upper_lr 0.0123, solver.inner_steps 5`."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
    )


def _last_line(trial: Any) -> str:
    """What Ray says of the trial's end, without its traceback."""
    error = trial.get_error()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else f"{type(error).__name__}"


@contextmanager
def tune_settings() -> Iterator[None]:
    """Settings that Tune reads from the environment while it runs; what the user has set stays as
    it is.
    """
    ours = {
        "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a table on stdout whatever its verbosity
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they mean to `train`
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a trial's end is one of our lines
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours says how to resume
        # what a killed driver forgets; trials keep more themselves
        "TUNE_GLOBAL_CHECKPOINT_S": "5",
    }
    set_here = {name: value for name, value in ours.items() if name not in os.environ}
    os.environ.update(set_here)
    try:
        yield
    finally:
        for name in set_here:
            os.environ.pop(name, None)
