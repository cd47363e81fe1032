"""Where a search keeps what: its folder, on a disk or at a URI, Tune's folder in it, and the run of
each trial.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bomemeta.run_folder import RunFolder
from bomemeta.storage import Store, below, is_uri

TRIALS = "trials"  # Tune's folder in the search's
RUN = "run"  # the run's folder in a trial's
REPORT_FILE = "report.json"  # in a checkpoint: what a report says beside its metrics


def metrics_in(report: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a REPORT_FILE's content; older ones call them figures."""
    return dict(report["metrics"] if "metrics" in report else report["figures"])


def trial_run(name: str) -> str:
    """The run of the trial of this name, within the search's folder."""
    return f"{TRIALS}/{name}/{RUN}"


def run_of(trial: Any) -> Store:
    """The run of one of Tune's trials, as its driver sees it."""
    return Store(
        trial.storage.storage_filesystem,
        f"{trial.storage.trial_fs_path}/{RUN}",
        f"the run of {trial}",
    )


def saved_step(run: Store) -> int:
    """The step of the run's newest checkpoint; 0 where there is none."""
    found = (re.fullmatch(r"checkpoints/step_(\d+)\.pt", name) for name in run.names())
    return max((int(match[1]) for match in found if match), default=0)


def folder_here(storage: Any, search: str | None) -> RunFolder:
    """The run's folder for the trial that this process runs, from Tune's notes of where it keeps
    what.

    Beside the trial's checkpoints where these are on a disk or in the search's folder at a URI;
    else, in a Tuner of the user's own, in the trial's working directory.
    """
    if storage.storage_filesystem.type_name == "local":
        folder = RunFolder(Path(storage.trial_fs_path) / RUN)
    elif search is not None and is_uri(search):
        folder = RunFolder.fetched(str(below(search, trial_run(storage.trial_dir_name))))
    else:
        folder = RunFolder(Path(storage.trial_working_directory) / RUN)
    folder.path.mkdir(parents=True, exist_ok=True)
    return folder
