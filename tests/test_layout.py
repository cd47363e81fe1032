"""Tensors in one flat array and back: x, the tasks' states and a round's sums."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import quadratics
import torch
from toy import Bench

from bomemeta.core import tree
from bomemeta.core.oracle import Term
from bomemeta.core.solver import KernelResult, StepResult
from bomemeta.core.tree import Layout
from bomemeta.distributed.packing import pack, pack_tasks, unpack, unpack_tasks
from bomemeta.errors import ConfigError
from bomemeta.solvers.upper_options import UpperOptions

VALUES: dict[str, Any] = {
    "loss": torch.tensor(3.0),
    "x": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([7.0])},
    "none": torch.empty(0, 4),
}


def test_what_was_flattened_comes_back_in_memory_of_its_own() -> None:
    packed = pack(VALUES, torch.float32)
    found = unpack(packed)
    assert packed.buffer.tolist() == tree.flatten(VALUES).tolist()
    assert list(found) == list(VALUES)
    assert list(found["x"]) == ["w", "b"]
    for was, now in zip(tree.tensors(VALUES), tree.tensors(found), strict=True):
        assert torch.equal(was, now)
    found["x"]["w"] += 1
    assert packed.buffer[1] == 0
    assert torch.equal(unpack(packed)["x"]["w"], VALUES["x"]["w"])


def test_a_stack_is_one_row_per_task() -> None:
    groups = {
        "y": {"w": torch.arange(12.0).reshape(2, 3, 2), "b": torch.tensor([5.0, 6.0])},
        "adam": {"steps": torch.ones(2, 1)},
    }
    layout, rows = packed = pack_tasks(groups)
    assert rows.tolist() == [[*range(6), 5, 1], [*range(6, 12), 6, 1]]
    assert layout.plain() == (("y", "w", (3, 2)), ("y", "b", ()), ("adam", "steps", (1,)))
    assert Layout.read([[*entry[:2], list(entry[2])] for entry in layout]) == layout
    assert pickle.loads(pickle.dumps(layout)) == layout
    found = unpack_tasks(packed)
    for was, now in zip(tree.tensors(groups), tree.tensors(found), strict=True):
        assert torch.equal(was, now)
        assert was.shape == now.shape
    one = layout.unflatten(rows[1].numpy())
    assert torch.equal(one["y"]["w"], groups["y"]["w"][1])
    y = groups["y"]
    back = tree.unflatten_tasks(tree.flatten_tasks(y), y)
    assert all(torch.equal(back[name], y[name]) for name in y)


def test_x_is_seen_through_views() -> None:
    x = {"w": torch.zeros(2, 3), "b": torch.zeros(())}
    flat = torch.arange(7.0)
    w, b = Layout.of(x).parts(flat)
    flat += 10
    assert w.tolist() == [[10, 11, 12], [13, 14, 15]]
    assert b.item() == 16


@dataclass(frozen=True, kw_only=True)
class Forgetful(UpperOptions):
    """Its kernel leaves out the y that its round is to keep."""

    def step(self, upper: Any, lower: Any, run: Any) -> StepResult:
        sums, lower = run(measured)
        return StepResult(lower, upper.move(sums["direction"], run.step, run.project_upper))


def measured(solver: Any, oracle: Any, lower: Any) -> KernelResult:
    """Kernel."""
    total = oracle.total(Term("upper", oracle.init_lower()))
    return KernelResult({"direction": total.upper}, {})


def test_a_kernel_that_returns_no_y_where_it_is_kept_is_told() -> None:
    bench = Bench(quadratics.small(2), Forgetful(), 1)
    with pytest.raises(ConfigError, match=r"returned no lower groups.*keeps=False"):
        bench.advance()
