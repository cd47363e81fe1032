"""A user's file for the tests of searches: a problem at whose step the trial's own process dies or
stands still, and who computed.

`project_upper` is asked once a step where the run is driven, `load` where tasks are computed,
`setup` in both.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ray

from bomemeta.core.problem import Batch, Split
from bomemeta.core.tree import Params
from bomemeta.problems.analytic import Analytic
from bomemeta.registry import problems


@problems.register("doomed_analytic")
@dataclass(kw_only=True)
class DoomedAnalytic(Analytic):
    """analytic whose driving process is struck in its step number `doom_step`, `doom_times` times in all, each
    time leaving a mark.
    """

    doom_step: int | None = None
    doom: Literal["kill", "wait"] = "kill"
    doom_times: int = 1
    doom_mark: str = ""
    group_folder: str | None = (
        # every process of a trial leaves its placement group and number here, and none begins
        # before
        None
    )
    group_size: int = 0  # so many have

    def project_upper(self, upper: Params) -> Params:
        self._moves += 1
        if self._moves - 1 == self.doom_step and any(
            _made(Path(f"{self.doom_mark}.{number}")) for number in range(self.doom_times)
        ):
            if self.doom == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            while True:
                time.sleep(0.1)
        return super().project_upper(upper)

    def setup(self) -> None:
        super().setup()
        self._moves = 0
        if (
            self.group_folder is not None
            and (group := ray.get_runtime_context().get_placement_group_id()) is not None
        ):
            Path(self.group_folder, f"{group}-{os.getpid()}").touch()

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        if (
            step > 0  # the driver asks for a task of step 0 before there are workers
            and self.group_folder is not None
            and (group := ray.get_runtime_context().get_placement_group_id()) is not None
        ):
            # Toy tasks are done before a second worker is there.
            while len(list(Path(self.group_folder).glob(f"{group}-*"))) < self.group_size:
                time.sleep(0.05)
        return super().load(task_ids, step, split)


def _made(path: Path) -> bool:
    try:
        with path.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    return True
