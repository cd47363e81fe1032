"""The upper variable: one array for the optimiser, named tensors for everybody else."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from bomemeta.api import evaluate, load, resume, train
from bomemeta.config import differing_keys, load_config
from bomemeta.core.optimizer import OptimizerName
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable, schedule_factor
from bomemeta.registry import solvers
from bomemeta.solvers.upper_options import UpperSteps

OPTIMIZERS: list[OptimizerName] = ["sgd", "momentum", "adam", "adamw"]
SHAPES: dict[str, tuple[int, ...]] = {
    "w": (7, 3, 3, 3),
    "b": (7,),
    "scale": (),
    "one": (1,),
    "v": (65, 5),
}


def drawn(seed: int, dtype: torch.dtype) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()
    }


def variable(
    optimizer: OptimizerName, dtype: torch.dtype = torch.float32, **more: Any
) -> UpperVariable:
    given = {"optimizer": optimizer, "lr": 0.03, "momentum": 0.9, "schedule": "constant", **more}
    return UpperVariable(drawn(0, dtype), 50, **given)


def move(upper: UpperVariable, steps: range) -> None:
    for step in steps:
        direction = drawn(step + 1, next(iter(upper.params.values())).dtype)
        upper.move(dict(reversed(direction.items())), step, lambda x: x)


def equal(one: Params, other: Params) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def each_by_itself(
    optimizer: OptimizerName, dtype: torch.dtype, weight_decay: float = 0.0
) -> tuple[Params, torch.optim.Optimizer]:
    """The readable version: torch's optimiser on every tensor."""
    params = drawn(0, dtype)
    tensors = list(params.values())
    given: dict[str, Any] = {"lr": 0.03, "foreach": False, "weight_decay": weight_decay}
    if optimizer in ("sgd", "momentum"):
        given["momentum"] = 0.9 if optimizer == "momentum" else 0.0
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return params, kinds.get(optimizer, torch.optim.SGD)(tensors, **given)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_same_bits_as_an_optimiser_on_every_tensor(
    optimizer: OptimizerName, dtype: torch.dtype, weight_decay: float
) -> None:
    params, plain = each_by_itself(optimizer, dtype, weight_decay)
    upper = variable(optimizer, dtype, weight_decay=weight_decay)
    for step in range(20):
        for name, gradient in drawn(step + 1, dtype).items():
            params[name].grad = gradient
        plain.step()
        move(upper, range(step, step + 1))
        assert equal(params, upper.params)


def test_adam_has_the_bits_that_it_was_written_out_with() -> None:
    """What bomemeta's own few lines did before torch's function took their place: old runs resume."""
    x, mean, square = (torch.cat([t.reshape(-1) for t in drawn(0, torch.float32).values()]), 0, 0)
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    upper = variable("adam")
    for step in range(1, 6):
        gradient = torch.cat([t.reshape(-1) for t in drawn(step, torch.float32).values()])
        mean.lerp_(gradient, 1 - 0.9)
        square.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        length = (square.sqrt() / (1 - 0.999**step) ** 0.5).add_(1e-8)
        x.addcdiv_(mean, length, value=-0.03 / (1 - 0.9**step))
        move(upper, range(step - 1, step))
    assert torch.equal(x, torch.cat([t.reshape(-1) for t in upper.params.values()]))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_copy_goes_its_own_way_to_the_same_bits(optimizer: OptimizerName) -> None:
    upper = variable(optimizer)
    move(upper, range(3))
    kept = copy.deepcopy(upper)
    before = {name: tensor.clone() for name, tensor in upper.params.items()}
    move(upper, range(3, 6))
    assert equal(kept.params, before)
    move(kept, range(3, 6))
    assert equal(kept.params, upper.params)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_checkpoint_resumes_to_the_same_bits(optimizer: OptimizerName, steps: int) -> None:
    upper, other = variable(optimizer), variable(optimizer)
    move(upper, range(steps))
    other.load(upper.params, copy.deepcopy(upper.state_dict()))
    for one in (upper, other):
        move(one, range(steps, 6))
    assert equal(upper.params, other.params)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_with_a_state_for_every_tensor_is_read(optimizer: OptimizerName) -> None:
    params, plain = each_by_itself(optimizer, torch.float32)
    for step in range(3):
        for name, gradient in drawn(step + 1, torch.float32).items():
            params[name].grad = gradient
        plain.step()
    upper, expected = variable(optimizer), variable(optimizer)
    state: dict[str, Any] = plain.state_dict()
    upper.load(params, state)
    move(expected, range(6))
    move(upper, range(3, 6))
    assert equal(upper.params, expected.params)


def test_a_direction_may_hang_on_a_graph() -> None:
    upper = variable("momentum")
    for step in range(2):
        upper.move(
            {
                name: tensor.requires_grad_() * 2
                for name, tensor in drawn(step, torch.float32).items()
            },
            step,
            lambda x: x,
        )
    assert not any(
        tensor.requires_grad for tensor in [*upper.params.values(), *upper.state_dict().values()]
    )


def test_a_projection_may_give_new_tensors_or_write_into_x() -> None:
    def clamped(x: Params) -> Params:
        x["b"].clamp_(min=0)
        return {**x, "w": x["w"].clamp(max=0.1)}

    upper = variable("sgd")
    metrics = upper.move(drawn(1, torch.float32), 0, clamped)
    assert float(upper.params["b"].min()) >= 0
    assert float(upper.params["w"].max()) <= 0.1 + 1e-7
    flat = torch.cat([tensor.reshape(-1) for tensor in upper.params.values()])
    assert metrics["upper_norm"] == pytest.approx(float(flat.norm()))


# Step sizes


def factors(schedule: str, steps: int, **more: Any) -> list[float]:
    return [schedule_factor(schedule, step, steps, **more) for step in range(steps + 1)]  # type: ignore[arg-type]


def test_schedules_in_closed_form() -> None:
    assert factors("constant", 3) == [1.0] * 4
    assert factors("cosine", 4) == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0])
    assert factors("step", 6, every=2, factor=0.5) == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]
    assert factors("constant", 5, warmup=3) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert factors("cosine", 6, warmup=2) == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0]
    )
    assert factors("step", 4, warmup=2, every=1, factor=0.1) == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.1, 0.01]
    )
    assert factors("cosine", 2, warmup=2) == pytest.approx([1 / 3, 2 / 3, 1])


def test_a_long_direction_is_cut_and_a_short_one_is_not() -> None:
    direction = drawn(1, torch.float64)
    flat = torch.cat([t.reshape(-1) for t in direction.values()])
    for clip, share in ((float(flat.norm()) / 4, 0.25), (float(flat.norm()) * 2, 1.0)):
        upper = variable("sgd", torch.float64, clip_norm=clip)
        upper.move(direction, 0, lambda x: x)
        for name, start in drawn(0, torch.float64).items():
            torch.testing.assert_close(upper.params[name], start - 0.03 * share * direction[name])


# The mean of x


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_mean_of_x_weighs_each_step_and_leaves_training_alone(
    optimizer: OptimizerName,
) -> None:
    plain, upper = (variable(optimizer, torch.float64, average=average) for average in (None, 0.8))
    assert upper.averaged is upper.params  # before the first step
    seen: list[Params] = []
    for step in range(7):
        move(plain, range(step, step + 1))
        move(upper, range(step, step + 1))
        assert equal(plain.params, upper.params)
        seen.append({name: tensor.clone() for name, tensor in upper.params.items()})
        weights = torch.tensor([0.8 ** (step - k) for k in range(step + 1)], dtype=torch.float64)
        for name, got in upper.averaged.items():
            wanted = sum(w * x[name] for w, x in zip(weights / weights.sum(), seen, strict=True))
            torch.testing.assert_close(got, wanted)
    assert plain.averaged is plain.params


def test_the_mean_of_x_survives_a_copy_and_a_checkpoint() -> None:
    upper, other = (variable("momentum", average=0.9) for _ in range(2))
    move(upper, range(3))
    kept = copy.deepcopy(upper)
    other.load(upper.params, copy.deepcopy(upper.state_dict()))
    for one in (upper, other, kept):
        move(one, range(3, 6))
    assert equal(upper.averaged, other.averaged)
    assert equal(upper.averaged, kept.averaged)
    assert not equal(upper.averaged, upper.params)


# Over the registry


def test_every_solver_that_moves_x_has_all_keys_of_its_step() -> None:
    keys = {field.name for field in dataclasses.fields(UpperSteps)}
    ours = [
        name for name in solvers.names() if solvers.get(name).__module__.startswith("bomemeta.")
    ]
    for name in ours:
        has = {field.name for field in dataclasses.fields(solvers.get(name))}
        assert keys <= has or not keys & has, name
        assert keys <= has or "upper_lr" not in has, name


def test_a_run_is_judged_by_the_mean_and_resumes_to_the_same(tmp_path: Path) -> None:
    keys = [
        "steps=6", "workers=0", "solver.upper_average=0.7", "solver.upper_optimizer=adamw",
        "solver.weight_decay=0.01", "solver.clip_norm=0.5", "solver.upper_warmup_steps=2", "checkpoint.every_steps=2",
        "solver.upper_schedule=step", "solver.step_every=2", "solver.step_factor=0.5", "solver.lower_schedule=constant",
    ]  # fmt: skip
    whole = train("analytic_quadratic", [*keys, f"output_dir={tmp_path / 'whole'}"])
    part = train("analytic_quadratic", [*keys, "steps=4", f"output_dir={tmp_path / 'part'}"])
    resumed = resume(tmp_path / "part", ["steps=6"])
    assert part.upper_sha256 != whole.upper_sha256 == resumed.upper_sha256
    assert load(tmp_path / "whole").upper_sha256 == whole.upper_sha256
    assert evaluate(tmp_path / "whole").metrics == pytest.approx(whole.metrics)
    plain = train(
        "analytic_quadratic",
        [*keys, "solver.upper_average=null", f"output_dir={tmp_path / 'plain'}"],
    )
    assert plain.metrics["upper_error"] != whole.metrics["upper_error"]


def test_runs_of_earlier_versions_do_not_differ_in_keys_that_they_lack() -> None:
    config = load_config("analytic_quadratic").to_dict()
    old = {**config, "solver": {k: v for k, v in config["solver"].items() if k != "weight_decay"}}
    assert differing_keys(old, config) == []
    new = {**config, "solver": {**config["solver"], "weight_decay": 0.1}}
    assert [difference.key for difference in differing_keys(old, new)] == ["solver.weight_decay"]
