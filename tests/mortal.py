"""A user's file for the fault tests: few-shot and quadratic problems whose workers die or hang once, in the middle of a step.

Where and how is told by the environment, which Ray's workers inherit: MORTAL_AT=<step>, MORTAL_SIGNAL=<name>, MORTAL_MARK=<file>.
The mark is made by the first worker to get there, so that only it is struck and the shard's second run goes through.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import toy  # registers the toy data set; tests/ is on the workers' path
from bomemeta.core.problem import Batch, Split
from bomemeta.problems.analytic import Analytic
from bomemeta.problems.few_shot import FewShot
from bomemeta.registry import problems

__all__ = ["toy"]


def strike(step: int, split: Split) -> None:
    if split != "train" or str(step) != os.environ.get("MORTAL_AT"):
        return
    try:
        Path(os.environ["MORTAL_MARK"]).touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), getattr(signal, os.environ["MORTAL_SIGNAL"]))


@problems.register("mortal_few_shot")
@dataclass(kw_only=True)
class MortalFewShot(FewShot):
    """few_shot whose worker is struck once."""

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        strike(step, split)
        return super().load(task_ids, step, split)


@problems.register("mortal_analytic")
@dataclass(kw_only=True)
class MortalAnalytic(Analytic):
    """analytic whose worker is struck once."""

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        strike(step, split)
        return super().load(task_ids, step, split)
