"""`check_problem`: planted mistakes, each with what is said of it, and the shipped problems, of
which nothing is said.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import Toy, attached

from bomemeta.api import train
from bomemeta.contract import check_problem
from bomemeta.core.problem import LossGradient, Problem, SharedProblem
from bomemeta.errors import ConfigError
from bomemeta.problems.analytic import Analytic
from bomemeta.problems.continual_meta import ContinualMeta
from bomemeta.problems.few_shot import FewShot
from bomemeta.registry import problems


class Good(Problem):
    """f_i = |y - t_i|^2 / 2, g_i = |y - x - t_i|^2 / 2, with fresh tasks."""

    def init_upper(self, generator: torch.Generator) -> Any:
        return {"x": torch.randn(3, generator=generator, dtype=self.dtype)}

    def load(self, task_ids, step, split) -> Any:
        rows = [
            torch.randn(
                3,
                generator=torch.Generator().manual_seed(1000 * self.seed + task),
                dtype=self.dtype,
            )
            for task in task_ids
        ]
        return {"t": torch.stack(rows)}

    def init_lower(self, encoded, batch) -> Any:
        return {"y": torch.zeros_like(batch["t"])}

    def upper_loss(self, encoded, lower, batch) -> Any:
        return ((lower["y"] - batch["t"]) ** 2).sum() / 2

    def lower_loss(self, encoded, lower, batch) -> Any:
        return ((lower["y"] - encoded["x"] - batch["t"]) ** 2).sum() / 2


class GoodShared(SharedProblem, Good):
    num_blocks = property(lambda self: 2)  # type: ignore[assignment]


def upper(result):
    return {"init_upper": lambda self, generator: result}


def loads(function):
    return {"load": function}


def g(function):
    return {"lower_loss": function}


def plus(amount):
    """g plus an amount that is made of its arguments."""
    return g(lambda self, e, y, b: Good.lower_loss(self, e, y, b) + amount(e, y, b))


def in_place(self, encoded, lower, batch):
    lower["y"].add_(1)
    return Good.lower_loss(self, encoded, lower, batch)


def counted(self, task_ids, step, split):
    self.calls = getattr(self, "calls", 0) + 1
    return {
        "t": torch.full((len(task_ids), 3), float(self.calls)) + torch.tensor(task_ids)[:, None]
    }


def of_the_stack(self, task_ids, step, split):
    batch = Good.load(self, task_ids, step, split)["t"]
    return {"t": batch - batch.mean(0)}


def by_value(self, encoded, lower, batch):
    scale = 2.0 if batch["t"].sum().item() > 0 else 1.0
    return scale * Good.lower_loss(self, encoded, lower, batch)


def wrong_gradient(self, loss, encoded, lower, batch, in_encoded):
    if loss == "upper" or in_encoded:
        return None
    off = lower["y"] - encoded["x"] - batch["t"]
    return LossGradient((off**2).sum(1) / 2, {"y": 1.1 * off}, {})


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "missing method": (
        {"upper_loss": Problem.upper_loss},
        "Mine: upper_loss missing; a problem must define init_upper, load",
    ),
    "lower misspelt": (
        {"__init__": lambda self: setattr(self, "lower", "sharred")},
        "Mine.lower: got 'sharred'; .* bomemeta.SharedProblem",
    ),
    "num_tasks a method": (
        {"num_tasks": lambda self: 3},
        "Mine.num_tasks: got a method; wanted a property. To do: write @property",
    ),
    "num_tasks zero": (
        {"num_tasks": property(lambda self: 0)},
        "Mine.num_tasks: got 0; wanted a whole number, 1 or more, or None",
    ),
    "integer in x": (
        upper({"x": torch.zeros(3), "n": torch.tensor([1])}),
        r"Mine.init_upper: got n in torch.int64; wanted .* torch.float32",
    ),
    "float64 in y": (
        {"init_lower": lambda self, e, b: {"y": b["t"].double()}},
        "Mine.init_lower: got y in torch.float64; wanted every entry of y in torch.float32",
    ),
    "x from global randomness": (
        {"init_upper": lambda self, generator: {"x": torch.randn(3)}},
        "Mine.init_upper: got another x from the same generator",
    ),
    "x no dict": (
        upper(torch.zeros(3)),
        "Mine.init_upper: got a Tensor; wanted a dict of names and tensors",
    ),
    "x empty": (upper({}), "Mine.init_upper: got an empty dict"),
    "load not pure": (
        loads(counted),
        r"Mine.load: got other data when it was called again .* \(t\); wanted a pure function of \(self.seed, step, split, task id\)",
    ),
    "load with global randomness": (
        loads(lambda self, ids, step, split: {"t": torch.randn(len(ids), 3)}),
        "Mine.load: got random numbers of torch's global generator",
    ),
    "load with numpy's": (
        loads(
            lambda self, ids, step, split: {"t": torch.tensor(np.random.rand(len(ids), 3)).float()}
        ),
        "Mine.load: got random numbers of numpy's global generator",
    ),
    "load with Python's": (
        loads(lambda self, ids, step, split: {"t": torch.full((len(ids), 3), random.random())}),
        "Mine.load: got random numbers of Python's global generator",
    ),
    "load without task axis": (
        loads(lambda self, ids, step, split: {"t": torch.zeros(3)}),
        r"Mine.load: got t of shape \[3\] for 2 task\(s\); wanted a leading task axis, \[2, ...\]",
    ),
    "load ignores ids": (
        loads(lambda self, ids, step, split: {"t": torch.ones(len(ids), 3)}),
        "Mine.load: got the same data for the tasks 0 and 1",
    ),
    "load depends on company": (
        loads(of_the_stack),
        "Mine.load: got other data for task 1 alone than for it beside task 0",
    ),
    "load ignores split": (
        {"meta_tests": True},
        "Mine.load: got the training tasks for split 'validation' too",
    ),
    "wrong device": (
        loads(lambda self, ids, step, split: {"t": torch.zeros(len(ids), 3, device="meta")}),
        "Mine.load: got t on device meta; wanted tensors on the device",
    ),
    "load raises": (
        loads(lambda self, ids, step, split: {}["train"]),
        r"Mine.load: raised KeyError at .*test_contract.py:\d+: 'train'",
    ),
    "init_lower not finite": (
        {"init_lower": lambda self, e, b: {"y": b["t"] / 0 * 0}},
        "Mine.init_lower: got y with NaN or infinite numbers",
    ),
    "init_lower random": (
        {"init_lower": lambda self, e, b: {"y": torch.from_numpy(np.random.rand(3)).float()}},
        "Mine.init_lower: got random numbers of numpy's global generator",
    ),
    "loss no scalar": (
        g(lambda self, e, y, b: (y["y"] - e["x"]) ** 2),
        r"Mine.lower_loss: got shape \[3\]; wanted a scalar, shape \[\]",
    ),
    "loss a float": (
        g(lambda self, e, y, b: Good.lower_loss(self, e, y, b).item()),
        r"Mine.lower_loss: got a float; wanted a tensor of shape \[\]",
    ),
    "loss in float64": (
        plus(lambda e, y, b: b["t"].double().sum()),
        "Mine.lower_loss: got a loss in torch.float64; wanted torch.float32",
    ),
    "loss NaN": (
        plus(lambda e, y, b: (-y["y"].square() - 1).log().sum()),
        "Mine.lower_loss: got nan at the start; wanted a finite loss",
    ),
    "loss with numbers of numpy's": (
        plus(lambda e, y, b: np.random.rand() * y["y"].sum()),
        "Mine.lower_loss: got random numbers of numpy's global generator; .*dropout",
    ),
    "gradient NaN": (
        plus(lambda e, y, b: y["y"].norm().sqrt()),
        "Mine.lower_loss: got a gradient in y that is not finite at the start",
    ),
    "no graph to y": (
        g(lambda self, e, y, b: ((y["y"].detach() - e["x"]) ** 2).sum()),
        "Mine.lower_loss: got a loss without a gradient in y",
    ),
    "y changed in place": (
        g(in_place),
        "Mine.lower_loss: got y, one of its arguments, changed in place",
    ),
    "x in neither loss": (
        g(lambda self, e, y, b: ((y["y"] - e["x"].detach()) ** 2).sum()),
        "Mine.upper_loss and lower_loss: got no gradient in x from either",
    ),
    "item under vmap": (
        g(by_value),
        r"Mine.lower_loss: fails under torch.vmap at .*test_contract.py:\d+: .* Wanted plain torch operations: no .item\(\)",
    ),
    "wrong closed form": (
        {"loss_gradient": wrong_gradient},
        "Mine.loss_gradient: got for 'lower' another value or gradient than autograd",
    ),
    "evaluate not per task": (
        {"evaluate": lambda self, e, y, b: {"error": (y["y"] - b["t"]).abs()}},
        r"Mine.evaluate: got error of shape \[3\]; wanted one number per task",
    ),
    "evaluate a float": (
        {"evaluate": lambda self, e, y, b: {"error": 1.0}},
        r"Mine.evaluate: got error: a float; wanted a tensor of shape \[\]",
    ),
    "projection of another shape": (
        {"project_lower": lambda self, y: {"y": y["y"][0]}},
        r"Mine.project_lower: got shape \[3\] for y; wanted shape \[2, 3\]",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_named(name):
    changes, message = MISTAKES[name]
    with pytest.raises(ConfigError) as caught:
        check_problem(type("Mine", (Good,), changes)())
    assert re.match(message, str(caught.value)), str(caught.value)


def test_the_docs_show_what_is_said():
    text = (Path(__file__).parents[1] / "docs/extending.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| `(Mine[^|]+)` \|$", text, re.MULTILINE)
    assert len(rows) == 14
    for name, shown in rows:
        with pytest.raises(ConfigError) as caught:
            check_problem(type("Mine", (Good,), MISTAKES[name][0])())
        parts = shown.replace("at mine.py:12: ... ", "at ... ").split("...")
        whole = ".*".join(re.escape(part) for part in parts) if name == "item under vmap" else None
        assert re.fullmatch(whole or re.escape(shown), str(caught.value)), name


def test_a_shared_y_that_depends_on_the_block_is_named():
    changes = {"init_lower": lambda self, encoded, batch: {"y": batch["t"].clone()}}
    with pytest.raises(ConfigError, match=r"Mine.init_lower: got y that depends on the block"):
        check_problem(type("Mine", (GoodShared,), changes)())


def test_what_is_no_problem_is_named():
    with pytest.raises(ConfigError, match=r"got the class Good; wanted an object, as in Good\(\)"):
        check_problem(Good)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="got a dict; wanted an object of a class that derives"):
        check_problem({})  # type: ignore[arg-type]


def test_branches_on_values_pass_where_no_vmap_is_used():
    check_problem(type("Mine", (Good,), g(by_value))(), vmap=False)
    check_problem(type("Mine", (GoodShared,), g(by_value))())


SHIPPED = {
    "good": (Good, None),
    "good shared": (GoodShared, None),
    "few_shot head": (lambda: FewShot(ways=3, width=4, queries=2, test_queries=2), Toy()),
    "few_shot span": (lambda: FewShot(head="span", ways=3, width=4, test_queries=2), Toy()),
    "few_shot network": (lambda: FewShot(form="network", ways=3, width=4, test_queries=2), Toy()),
    "few_shot fixed": (lambda: FewShot(fixed_tasks=4, ways=3, width=4, test_queries=2), Toy()),
    "continual_meta": (lambda: ContinualMeta(classes=3, lengths=[2, 4], width=4, shots=2), Toy()),
    **{
        f"analytic {case}": (lambda case=case: Analytic(case=case), None)
        for case in ("coreset", "minimax", "degenerate", "quadratic", "lancbio_synthetic")
    },
}


@pytest.mark.parametrize("name", SHIPPED)
def test_nothing_is_said_of_good_problems_and_nothing_is_left_changed(name):
    make, data = SHIPPED[name]
    if data is not None:
        data.prepare()
    problem = make()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    check_problem(problem, data=data)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()
    assert "dtype" not in vars(problem)  # a copy was attached


def test_an_attached_problem_is_checked_as_it_is():
    check_problem(attached(Analytic(case="quadratic", tasks=3), dtype=torch.float64))


@problems.register("contract_ignores_ids")
@dataclass(kw_only=True)
class IgnoresIds(Good):
    def load(self, task_ids, step, split) -> Any:
        return {"t": torch.ones(len(task_ids), 3)}


def test_a_run_begins_with_the_check(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("problem: {name: contract_ignores_ids}\nsolver: {name: bome}\nsteps: 1\n")
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"IgnoresIds\.load: got the same data for the tasks 0"):
        train(str(config), ["workers=0", f"output_dir={folder}"])
    assert not folder.exists()


@pytest.mark.parametrize("vmap", [False, True])
def test_dropout_in_a_loss_and_a_random_start_are_sound(vmap: bool) -> None:
    """torch's generator is seeded before each task, by seed, step and task."""
    drops = plus(lambda e, y, b: torch.nn.functional.dropout(y["y"]).sum())
    starts = {"init_lower": lambda self, e, b: {"y": torch.rand(3)}}
    for changes in (drops, starts):
        check_problem(type("Mine", (Good,), changes)(), vmap=vmap)
