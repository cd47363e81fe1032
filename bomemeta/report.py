"""What a person sees of a run: progress, notes and the result. A bar on a terminal, plain lines
everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from bomemeta.errors import ConfigError
from bomemeta.health import HealthMonitor

__all__ = [
    "HealthMonitor",
    "Listener",
    "Outcome",
    "Quiet",
    "TerminalListener",
    "result_lines",
    "show_result",
]

# What the progress line shows of a step, in this order; a solver that does not give one leaves it
# out.
_SHOWN = {
    "upper_loss": "upper loss",
    "lower_loss": "lower loss",
    "multiplier": "lambda",
    "gap": "q",
    "upper_steps": "steps of x",
    "validation_accuracy": "validation accuracy",
}


# Accuracies that are measured now and then: the live line keeps the newest of the first that there is.
_ACCURACIES = ("validation_accuracy", "selection_accuracy", "test_accuracy")


class Listener(Protocol):
    """Hears what happens during a run. Steps are counted from 0.

    It may also have `workers(alive: int, wanted: int)`, called before `step` where workers compute.
    """

    def start(
        self, run_dir: Path | str | None, first_step: int, steps: int, every_steps: int
    ) -> None:
        """Called once before `first_step`; `run_dir` is a path or, as text, a URI, or None where
        nothing is kept; `steps` is the run's whole number, `every_steps` is `log.every_steps`.
        """
        ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called for every committed step, while the next one is on its way: a stop that is asked
        for here comes after that one.
        """
        ...

    def saved(self, checkpoint: Path) -> None:
        """Called after a checkpoint was written, and after `step` for the step that it ends with."""
        ...

    def note(self, text: str) -> None:
        """Something that a person should read: a finding, a lost worker, a checkpoint passed over."""
        ...

    def close(self) -> None:
        """No more is to come; may be called twice, and without a start."""
        ...


class Quiet:
    """Hears nothing: the default of the Python interface."""

    def start(
        self, run_dir: Path | str | None, first_step: int, steps: int, every_steps: int
    ) -> None: ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def saved(self, checkpoint: Path) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


def heard(listener: Listener | None) -> Listener:
    """The listener, or one that hears nothing. Raises ConfigError where it is none."""
    if listener is None:
        return Quiet()
    calls = [name for name in vars(Quiet) if not name.startswith("_")]
    if missing := [name for name in calls if not callable(getattr(listener, name, None))]:
        raise ConfigError(
            f"listener: got an object of {type(listener).__name__} without {', '.join(missing)}; "
            "wanted one with these methods: derive its class from bomemeta.report.Quiet"
        )
    return listener


class TerminalListener:
    """Progress on stderr, so that stdout holds the result alone: on a terminal one live line with
    loss, accuracy, time left and workers alive, elsewhere a plain line now and then.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._steps, self._every_steps = 0, 1
        self._accuracies: dict[str, float] = {}  # the newest
        self._workers = ""
        self.run_dir: Path | str | None = None  # None: no run has begun

    def start(
        self, run_dir: Path | str | None, first_step: int, steps: int, every_steps: int
    ) -> None:
        self._steps, self._every_steps, self.run_dir = steps, every_steps, run_dir
        if run_dir is not None:
            self._print(f"run folder: {run_dir}")
        if first_step > 0:
            self._print(f"resumes at step {first_step} of {steps}")
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            # Where the terminal is narrow the metrics are cut, never the count or the time.
            count = Column(no_wrap=True, min_width=2 * len(str(steps)) + 1)
            self._bar = Progress(
                TextColumn("step", table_column=Column(min_width=4)),
                MofNCompleteColumn(table_column=count),
                BarColumn(bar_width=10, table_column=Column(min_width=10)),
                TextColumn("left", table_column=Column(min_width=4)),
                TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=8)),
                TextColumn(
                    "{task.fields[metrics]}",
                    markup=False,
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
                ),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("", total=steps, completed=first_step, metrics="")
            self._bar.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        done = step + 1
        if self._bar is not None:
            self._bar.update(self._task, completed=done, metrics=self._live(metrics))
        elif done % self._every_steps == 0 or done == self._steps:
            seconds = metrics.get("step_s")
            speed = f", {seconds:.3g} s/step" if seconds is not None else ""
            self._print(f"step {done}/{self._steps}: {_metrics_text(metrics)}{speed}")

    def workers(self, alive: int, wanted: int) -> None:
        """How many workers there are now, and of how many: said in the live line."""
        self._workers = f"workers {alive}/{wanted}"

    def _live(self, metrics: Mapping[str, float]) -> str:
        """What a person looks for first stands first: a narrow terminal cuts the end."""
        self._accuracies |= {name: metrics[name] for name in _ACCURACIES if name in metrics}
        accuracy = next(
            (self._accuracies[name] for name in _ACCURACIES if name in self._accuracies), None
        )
        loss = metrics.get("upper_loss", metrics.get("lower_loss"))
        parts = [
            "" if loss is None else f"loss {loss:.4g}",
            "" if accuracy is None else f"accuracy {_value('accuracy', accuracy, None)}",
            self._workers,
            _metrics_text(
                {name: value for name, value in metrics.items() if name in ("multiplier", "gap")}
            ),
        ]
        return ", ".join(part for part in parts if part)

    def saved(self, checkpoint: Path) -> None: ...

    def note(self, text: str) -> None:
        self._print(f"note: {text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        # Through rich, which moves a running bar out of the way; as plain text, since brackets in
        # paths are no markup.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Outcome(Protocol):
    """What `show_result` reads of a `bomemeta.api.Result`."""

    @property
    def run_dir(self) -> Path | None: ...
    @property
    def uri(self) -> str | None: ...
    @property
    def steps(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def upper_sha256(self) -> str: ...
    @property
    def notes(self) -> Sequence[str]: ...


def result_lines(result: Outcome) -> list[str]:
    """The result as aligned `name  value` lines, accuracies in per cent with their 95 % interval
    where there is one.
    """
    rows = [("steps", str(result.steps))]
    shown = {_interval_of(name) for name in result.metrics if "accuracy" in name}
    for name, value in result.metrics.items():
        if name in shown:
            continue
        interval = result.metrics.get(_interval_of(name)) if "accuracy" in name else None
        rows.append((name.replace("_", " "), _value(name, value, interval)))
    rows += [
        ("upper sha256", result.upper_sha256),
    ]
    location = result.uri or result.run_dir
    if location is not None:
        rows.append(("run folder", str(location)))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows] + [
        f"note: {note}" for note in result.notes
    ]


def show_result(result: Outcome, console: Console | None = None) -> None:
    """Prints the result to stdout, one fact per line, so that it can be cut, searched and compared."""
    console = console or Console()
    for line in result_lines(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _interval_of(name: str) -> str:
    """`test_accuracy` has its half-width of the 95 % interval in `test_ci95`."""
    return name.replace("accuracy", "ci95")


def _value(name: str, value: float, interval: float | None) -> str:
    if not math.isfinite(value):
        return str(value)
    if "accuracy" not in name:
        return f"{value:.6g}"
    return f"{100 * value:.2f} %" + (
        f" ± {100 * interval:.2f} (95 %)" if interval is not None else ""
    )


def _metrics_text(metrics: Mapping[str, float]) -> str:
    return ", ".join(
        f"{label} {_value(name, metrics[name], None) if 'accuracy' in name else format(metrics[name], '.4g')}"
        for name, label in _SHOWN.items()
        if name in metrics
    )
