"""How y is moved: each rule against torch's optimiser of the name, and in runs of the solvers that have
the keys.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import DIM, SAMPLES, Drawn, Plain
from toy import Bench

import bomemeta
from bomemeta.core.lower_moves import LowerRule
from bomemeta.errors import ConfigError
from bomemeta.registry import solvers

STEPS, LR = 6, 0.05


def torchs(name: str, at: list[torch.nn.Parameter], decay: float) -> Any:
    if name in ("sgd", "momentum"):
        return torch.optim.SGD(
            at, lr=LR, momentum=0.9 if name == "momentum" else 0.0, weight_decay=decay
        )
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(at, lr=LR, weight_decay=decay)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_a_rule_is_torchs_optimiser_for_each_task(name: Any, clip: float | None) -> None:
    """Two tasks of one stack, whose gradients' norms differ, so that one is clipped and one is not."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"weight": (3, 4), "bias": (3,)}

    def stack() -> dict[str, torch.Tensor]:
        return {
            key: torch.randn(2, *shape, generator=draw, dtype=torch.float64)
            for key, shape in shapes.items()
        }

    y, slopes = stack(), [stack() for _ in range(STEPS)]
    for slope in slopes:
        for tensor in slope.values():
            tensor[1] *= 0.01
    rule = LowerRule(name, 0.9 if name == "momentum" else 0.0, 0.1, clip)
    params = [[torch.nn.Parameter(y[key][i].clone()) for key in shapes] for i in range(2)]
    others = [torchs(name, own, 0.1) for own in params]
    state = rule.state(None, y)
    for slope in slopes:
        y, state = rule.move(y, slope, LR, state)
        for i, own in enumerate(params):
            for parameter, key in zip(own, shapes, strict=True):
                parameter.grad = slope[key][i].clone()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(own, clip)
            others[i].step()
    for i, own in enumerate(params):
        for parameter, key in zip(own, shapes, strict=True):
            # torch divides by the norm plus 1e-6
            assert torch.allclose(y[key][i], parameter, rtol=1e-9 if clip is None else 1e-4)


def test_a_task_that_is_met_later_starts_its_own_count() -> None:
    rule, y = LowerRule("adam"), {"y": torch.zeros(2, 3)}
    state = rule.state(None, y)
    state["adam"]["steps"][0, 0] = 100.0
    moved, _ = rule.move(y, {"y": torch.ones(2, 3)}, 0.1, state)
    assert torch.allclose(moved["y"][1], torch.full((3,), -0.1))  # a first step is of length lr
    assert float(moved["y"][0].abs().max()) < 0.1 * 4


def test_momentum_is_what_lower_momentum_was() -> None:
    bome = solvers.get("bome")
    assert bome(lower_momentum=0.9).lower_rule() == LowerRule("momentum", 0.9)
    assert bome(lower_optimizer="momentum", lower_momentum=0.9).lower_rule().momentum == 0.9
    with pytest.raises(ConfigError, match=r"solver\.lower_momentum"):
        bome(lower_optimizer="adam", lower_momentum=0.5)


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        ("bome", "adam"),
        ("bome", "adamw"),
        ("lower_only", "adamw"),
        ("lancbio", "adam"),
        ("ctn", "momentum"),
    ],
)
def test_runs_continue_with_what_an_optimiser_keeps(solver: str, name: str, tmp_path: Path) -> None:
    """Two steps and a resumed third and fourth end with the bits of four."""
    keys = [
        f"solver.name={solver}", f"solver.lower_optimizer={name}", "solver.lower_clip_norm=0.5", "solver.lower_decay=0.01",
        "workers=0", "log.tensorboard=false", "problem.tasks=3", "tasks_per_step=2",
    ]  # fmt: skip

    if name == "momentum":
        keys.append("solver.lower_momentum=0.5")
    keys.append("solver.lower_schedule=constant")  # it would be stretched by `steps`
    if solver != "lower_only":
        keys.append("solver.upper_schedule=constant")

    def run(where: str, steps: int) -> bomemeta.Result:
        out = [f"output_dir={tmp_path / where}", f"steps={steps}"]
        return bomemeta.train("analytic_quadratic", [*keys, *out])

    whole = run("whole", 4)
    run("parts", 2)
    assert bomemeta.resume(tmp_path / "parts", ["steps=4"]).metrics == whole.metrics


LR_RUN = 0.05


def stepped(problem: Drawn, name: str, steps: int, inner: int, rate: Any = lambda step: 1.0) -> Any:
    """y by torch's optimiser on g at the first x, and the optimiser's y after each run step."""
    x, plain = problem.init_upper(torch.Generator())["x"], Plain(problem, 0)
    y = torch.nn.Parameter(torch.full((DIM,), 0.5, dtype=torch.float64))
    other, found = torchs(name, [y], 0.1), []
    for step in range(steps):
        other.param_groups[0]["lr"] = LR_RUN * rate(step)
        for _ in range(inner):
            other.zero_grad()
            plain.g(x, y).backward()
            other.step()
        found.append(y.detach().clone())
    return found


@pytest.mark.parametrize(
    "solver", ["amigo_cg", "aid_cg", "subbio", "lancbio", "soba", "ctn", "lower_only"]
)
@pytest.mark.parametrize("name", ["momentum", "adam", "adamw"])
def test_y_follows_g_by_torchs_optimiser(solver: str, name: str) -> None:
    """x stands still up to the last step, which moves y before x: four steps of the run at one x."""
    problem, kind = Drawn(size=SAMPLES), solvers.get(solver)
    fields = {"inner_steps": 3, "inner_lr": LR_RUN, "upper_every": 4, "lower_optimizer": name, "lower_decay": 0.1,
              "lower_momentum": 0.9 if name == "momentum" else 0.0}  # fmt: skip
    found = Bench(
        problem, kind(**{k: v for k, v in fields.items() if k in kind.__dataclass_fields__}), 4
    )
    for y in stepped(problem, name, 4, 1 if solver == "soba" else 3):
        found.advance()
        assert torch.allclose(found.y(), y, rtol=1e-9)


@pytest.mark.parametrize("solver", ["amigo_cg", "ctn", "lower_only", "agem"])
def test_the_step_of_y_has_a_schedule(solver: str) -> None:
    """With an upper step of 1e-12, y is that of torch's optimiser at one x with the cosine's step sizes."""
    problem, kind = Drawn(size=SAMPLES), solvers.get(solver)
    fields = {
        "inner_steps": 2,
        "inner_lr": LR_RUN,
        "upper_lr": 1e-12,
        "lower_schedule": "cosine",
        "lower_decay": 0.1,
    }
    found = Bench(
        problem, kind(**{k: v for k, v in fields.items() if k in kind.__dataclass_fields__}), 4
    )
    if (
        solver == "agem"
    ):  # f's gradient has no part where it does not conflict: compare the step's size alone
        sizes = []
        for _ in range(4):
            before = (
                found.y().clone() if found.step else torch.full((DIM,), 0.5, dtype=torch.float64)
            )
            found.advance()
            sizes.append(float((found.y() - before).norm()))
        assert sizes[3] < 0.3 * sizes[0]
        return
    for y in stepped(problem, "sgd", 4, 2, lambda step: (1 + math.cos(math.pi * step / 4)) / 2):
        found.advance()
        assert torch.allclose(found.y(), y, rtol=1e-8)


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw"])
def test_the_inner_loop_of_bome_is_torchs_optimiser_begun_anew(name: str) -> None:
    """q of each step is g(y) - g(y_T), with y_T by torch's optimiser from y."""
    problem = Drawn(size=SAMPLES)
    momentum = 0.9 if name == "momentum" else 0.0
    solver = solvers.get("bome")(
        inner_steps=4, inner_lr=LR, upper_lr=0.01, inner_optimizer=name, inner_momentum=momentum
    )
    found, y, plain = (
        Bench(problem, solver, 3),
        torch.full((DIM,), 0.5, dtype=torch.float64),
        Plain(problem, 0),
    )
    for _ in range(3):
        x, at = found.x().clone(), torch.nn.Parameter(y.clone())
        other = torchs(name, [at], 0.0)
        for _ in range(4):
            other.zero_grad()
            plain.g(x, at).backward()
            other.step()
        gap = float((plain.g(x, y) - plain.g(x, at)).detach())
        assert found.advance().metrics["gap"] == pytest.approx(gap, rel=1e-9)
        y = found.y()
    with pytest.raises(
        ConfigError, match=r"solver\.inner_momentum: got 0\.5 with inner_optimizer: adam"
    ):
        solvers.get("bome")(inner_optimizer="adam", inner_momentum=0.5)
