"""The upper variable: one array for the optimiser, named tensors for everybody else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from bomemeta.core.optimizer import OptimizerName
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable

OPTIMIZERS: list[OptimizerName] = ["sgd", "momentum", "adam"]
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


def variable(optimizer: OptimizerName, dtype: torch.dtype = torch.float32) -> UpperVariable:
    return UpperVariable(
        drawn(0, dtype), 50, optimizer=optimizer, lr=0.03, momentum=0.9, schedule="constant"
    )


def move(upper: UpperVariable, steps: range) -> None:
    for step in steps:
        direction = drawn(step + 1, next(iter(upper.params.values())).dtype)
        upper.move(dict(reversed(direction.items())), step, lambda x: x)


def equal(one: Params, other: Params) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def each_by_itself(
    optimizer: OptimizerName, dtype: torch.dtype
) -> tuple[Params, torch.optim.Optimizer]:
    """The readable version: torch's optimiser on every tensor."""
    params = drawn(0, dtype)
    tensors = list(params.values())
    momentum = 0.9 if optimizer == "momentum" else 0.0
    sgd = torch.optim.SGD(tensors, lr=0.03, momentum=momentum, foreach=False)
    return params, torch.optim.Adam(tensors, lr=0.03, foreach=False) if optimizer == "adam" else sgd


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_same_bits_as_an_optimiser_on_every_tensor(
    optimizer: OptimizerName, dtype: torch.dtype
) -> None:
    params, plain = each_by_itself(optimizer, dtype)
    upper = variable(optimizer, dtype)
    for step in range(20):
        for name, gradient in drawn(step + 1, dtype).items():
            params[name].grad = gradient
        plain.step()
        move(upper, range(step, step + 1))
        assert equal(params, upper.params)


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
def test_a_checkpoint_goes_on_to_the_same_bits(optimizer: OptimizerName, steps: int) -> None:
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
    said = upper.move(drawn(1, torch.float32), 0, clamped)
    assert float(upper.params["b"].min()) >= 0
    assert float(upper.params["w"].max()) <= 0.1 + 1e-7
    flat = torch.cat([tensor.reshape(-1) for tensor in upper.params.values()])
    assert said["upper_norm"] == pytest.approx(float(flat.norm()))
