"""A user's file for the fault tests: problems of all kinds whose worker dies, hangs or is slow
once, in the middle of a step.

The mark is made by the first worker to get there, so that only it is struck and the shard's second
run goes through.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import toy  # registers the toy data set; tests/ is on the workers' path

from bomemeta.core.problem import Batch, Split
from bomemeta.problems.analytic import Analytic
from bomemeta.problems.continual import Continual
from bomemeta.problems.data_mixing import DataMixing
from bomemeta.problems.few_shot import FewShot
from bomemeta.problems.hyper_cleaning import HyperCleaning
from bomemeta.registry import problems

__all__ = ["toy"]


# In one call into C, out of which no Python handler runs, the matrix takes longer than a minute on
# one core.
SLOW: dict[str, Callable[[], object]] = {
    "sleep": lambda: time.sleep(60),
    "compute": lambda: torch.linalg.eigvals(torch.rand(4000, 4000, dtype=torch.float64)),
}


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 200  # the caller then goes on, and the test sees that it did
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


@dataclass(kw_only=True)
class Strike:
    """The process that first loads training tasks of `strike_step` gets the signal, or is SLOW
    there; no step: nobody does.
    """

    strike_step: int | None = None
    strike_signal: str = "SIGKILL"
    strike_mark: str = ""
    # A folder: in every step k, the process that first comes to its load number k there gets the signal.
    strike_rounds: str = ""
    # A folder: who comes new while it has `hold` is built only when somebody is in round k of step k + 1,
    # who waits for it there.
    strike_joins: str = ""
    strike_loads: int = 1  # of a process in a round

    def setup(self) -> None:
        super().setup()  # type: ignore[misc]
        if self.strike_joins and (hold := Path(self.strike_joins, "hold")).exists():
            step = hold.read_text()
            _wait_for(Path(self.strike_joins, f"go{step}"))
            Path(self.strike_joins, f"came{step}").touch()

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        if split == "train" and self.strike_rounds:
            last, loads = getattr(self, "_loads", (step, 0))
            loads = loads if last == step else 0
            self._loads = (step, loads + 1)
            if loads == step:
                try:
                    Path(self.strike_rounds, str(step)).touch(exist_ok=False)
                    os.kill(os.getpid(), getattr(signal, self.strike_signal))
                except FileExistsError:
                    pass
        if split == "train" and self.strike_joins and step > 0:
            last, loads = getattr(self, "_loads", (step, 0))
            loads = loads if last == step else 0
            self._loads = (step, loads + 1)
            if loads == (step - 1) * self.strike_loads:
                Path(self.strike_joins, f"go{step}").touch()
                _wait_for(Path(self.strike_joins, f"came{step}"))
        if split == "train" and step == self.strike_step:
            try:
                Path(self.strike_mark).touch(exist_ok=False)
                if self.strike_signal in SLOW:
                    SLOW[self.strike_signal]()
                else:
                    os.kill(os.getpid(), getattr(signal, self.strike_signal))
            except FileExistsError:
                pass
        return super().load(task_ids, step, split)  # type: ignore[misc]


@problems.register("mortal_few_shot")
@dataclass(kw_only=True)
class MortalFewShot(Strike, FewShot):
    """few_shot whose worker is struck once."""


@problems.register("mortal_analytic")
@dataclass(kw_only=True)
class MortalAnalytic(Strike, Analytic):
    """analytic whose worker is struck once."""


@problems.register("mortal_hyper_cleaning")
@dataclass(kw_only=True)
class MortalHyperCleaning(Strike, HyperCleaning):
    """hyper_cleaning whose worker is struck once."""


@problems.register("mortal_continual")
@dataclass(kw_only=True)
class MortalContinual(Strike, Continual):
    """continual whose worker is struck once."""


@problems.register("mortal_data_mixing")
@dataclass(kw_only=True)
class MortalDataMixing(Strike, DataMixing):
    """data_mixing whose worker is struck once."""
