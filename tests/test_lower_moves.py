"""How y is moved: each rule against torch's optimiser of the name, and in runs of the solvers that have
the keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

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


@pytest.mark.parametrize("solver", ["bome", "lower_only"])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_runs_go_on_with_what_an_optimiser_keeps(solver: str, name: str, tmp_path: Path) -> None:
    """Two steps and a resumed third and fourth end with the bits of four."""
    keys = [
        f"solver.name={solver}", f"solver.lower_optimizer={name}", "solver.lower_clip_norm=0.5", "solver.lower_decay=0.01",
        "workers=0", "log.tensorboard=false", "problem.tasks=3", "tasks_per_step=2",
    ]  # fmt: skip

    if solver == "bome":  # a schedule would be stretched by `steps`
        keys += ["solver.upper_schedule=constant", "solver.lower_schedule=constant"]

    def run(where: str, steps: int) -> bomemeta.Result:
        out = [f"output_dir={tmp_path / where}", f"steps={steps}"]
        return bomemeta.train("analytic_quadratic", [*keys, *out])

    whole = run("whole", 4)
    run("parts", 2)
    assert bomemeta.resume(tmp_path / "parts", ["steps=4"]).metrics == whole.metrics
