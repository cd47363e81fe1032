"""Configs of small runs of every kind of problem, for the parts that compare bits and trajectories;
none needs a download.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import bomemeta
from benchmarks.device.sizes import Sizes
from bomemeta.registry import solvers
from bomemeta.session import Result

NOISE = str(Path(__file__).with_name("noise.py"))
# Solvers that adapt a network to each episode, and those of streams, are not for every problem.
LEARNERS = ("maml", "fomaml", "anil", "meta_sgd", "reptile")
STREAMS = ("ctn", "agem")
TINY = ("quadratic/bome", "hyper_cleaning/lancbio", "few_shot/bome", "few_shot/maml")
UPPER_LR = {"lancbio": 0.001}


@contextmanager
def jobs(sizes: Sizes) -> Iterator[dict[str, dict[str, Any]]]:
    """By name `problem/solver`, as `bomemeta.train` takes them; their data lie in a folder that is
    gone at the end.
    """
    names = [name for name in solvers.names() if name not in LEARNERS + STREAMS]
    with tempfile.TemporaryDirectory() as folder:
        rows = _labelled(Path(folder) / "rows.npz")
        found = {f"few_shot/{name}": _few_shot(name, sizes) for name in ("bome", "itd")}
        found["few_shot_resnet12/bome"] = _few_shot("bome", sizes, "resnet12")
        for name in names:
            found[f"quadratic/{name}"] = _job(name, sizes, problem=_quadratic(), shards=2)
            found[f"hyper_cleaning/{name}"] = _job(
                name, sizes, problem=_cleaning(), data={"dataset": "labelled_array", "path": rows}
            )
        for name in LEARNERS:
            found[f"few_shot/{name}"] = _few_shot(name, sizes)
        yield found if sizes.all_solvers else {name: found[name] for name in TINY}


def trained(job: dict[str, Any], overrides: Sequence[str]) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        return bomemeta.train(job, [f"output_dir={folder}/run", *overrides])


def _job(solver: str, sizes: Sizes, **sections: Any) -> dict[str, Any]:
    fields = solvers.get(solver).__dataclass_fields__
    options = {"upper_lr": UPPER_LR.get(solver, 0.01)} if "upper_lr" in fields else {}
    return {
        "solver": {"name": solver, **options},
        "steps": sizes.steps,
        "log": {"tensorboard": False},
        **sections,
    }


def _quadratic() -> dict[str, Any]:
    return {"name": "analytic", "case": "quadratic", "tasks": 4, "dim_upper": 50, "dim_lower": 100}


def _cleaning() -> dict[str, Any]:
    return {
        "name": "hyper_cleaning", "train": 300, "validation": 100, "selection": 0, "weights": "sigmoid", "blocks": 4,
    }  # fmt: skip


def _few_shot(solver: str, sizes: Sizes, backbone: str = "conv4") -> dict[str, Any]:
    width = sizes.width if backbone == "conv4" else sizes.resnet_width
    problem = {"name": "few_shot", "backbone": backbone, "width": width}
    if solver in LEARNERS:
        problem["form"] = "network"
    return _job(
        solver,
        sizes,
        imports=[NOISE],
        problem=problem,
        data={"dataset": "device_noise"},
        tasks_per_step=4,
        evaluation={"episodes": 2},
    )


def _labelled(path: Path) -> str:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((600, 40)).astype(np.float32)
    y = np.argmax(x @ draw.standard_normal((40, 5)), 1)
    np.savez(path, x_train=x[:400], y_train=y[:400], x_test=x[400:], y_test=y[400:])
    return str(path)
