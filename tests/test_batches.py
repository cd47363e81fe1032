"""Minibatches of a shared problem: which samples each solver sees where, what holds in expectation over
them, and each step against plain scripts on the same samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from toy import Bench

from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.oracle import Term
from bomemeta.core.problem import Batch, Encoded, SharedProblem, Split
from bomemeta.core.solver import Solver
from bomemeta.core.tree import Params
from bomemeta.errors import ConfigError
from bomemeta.registry import solvers

SAMPLES, DIM = 4, 3
LR = 0.1


@dataclass(kw_only=True)
class Drawn(SharedProblem):
    """f = mean_j |y - t_j|^2 / 2, g = mean_j a_j |y - B_j x|^2 / 2 + y_1^4 / 10 over the samples j of a
    batch, which `chosen` names for every (step, inner step, block); inner None: the step's own.
    """

    inner_batches: bool = False
    blocks: int = 2
    size: int = 2

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(3)
        self.asked: list[int | None] = []
        self.a = 0.5 + torch.rand(self.blocks, SAMPLES, generator=draw, dtype=torch.float64)
        self.b = torch.randn(self.blocks, SAMPLES, DIM, DIM, generator=draw, dtype=torch.float64)
        self.t = torch.randn(self.blocks, SAMPLES, DIM, generator=draw, dtype=torch.float64)
        self.dtype = torch.float64

    @property
    def num_blocks(self) -> int:
        return self.blocks

    def chosen(self, step: int, inner: int | None, block: int) -> list[int]:
        key = 97 * step + 31 * block + (0 if inner is None else 7 * (inner + 1))
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(key))
        return sorted(order[: self.size].tolist())

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        return self._batch(task_ids, step, None)

    def load_inner(self, task_ids: Sequence[int], step: int, inner: int) -> Batch:
        return self._batch(task_ids, step, inner)

    def _batch(self, blocks: Sequence[int], step: int, inner: int | None) -> Batch:
        self.asked.append(inner)
        rows = [self.chosen(step, inner, block) for block in blocks]
        parts = {"a": self.a, "b": self.b, "t": self.t}
        return {
            name: torch.stack([all_[i][own] for i, own in zip(blocks, rows, strict=True)])
            for name, all_ in parts.items()
        }

    def init_upper(self, generator: torch.Generator) -> Params:
        return {"x": torch.linspace(-1, 1, DIM, dtype=torch.float64)}

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        return {"y": torch.full((DIM,), 0.5, dtype=torch.float64)}

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return ((lower["y"] - batch["t"]) ** 2).sum(1).mean() / 2

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        square = ((lower["y"] - batch["b"] @ encoded["x"]) ** 2).sum(1)
        return (batch["a"] * square).mean() / 2 + lower["y"][0] ** 4 / 10


class Plain:
    """f and g of a `Drawn` on the samples of (step, inner), as plain functions of x and y."""

    def __init__(self, problem: Drawn, step: int) -> None:
        self.problem, self.step = problem, step

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        return self._mean("upper", x, y, None)

    def g(self, x: Tensor, y: Tensor, inner: int | None = None) -> Tensor:
        return self._mean("lower", x, y, inner)

    def _mean(self, loss: str, x: Tensor, y: Tensor, inner: int | None) -> Tensor:
        problem, values = self.problem, []
        for block in range(problem.blocks):
            own = problem.chosen(self.step, inner, block)
            a, b, t = (every[block][own] for every in (problem.a, problem.b, problem.t))
            if loss == "upper":
                values.append(((y - t) ** 2).sum(1).mean() / 2)
            else:
                square = ((y - b @ x) ** 2).sum(1)
                values.append((a * square).mean() / 2 + y[0] ** 4 / 10)
        return torch.stack(values).mean()


def grad(value: Tensor, *at: Tensor, graph: bool = False) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, at, create_graph=graph)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


@pytest.mark.parametrize("inner_batches", [False, True])
def test_bome_is_the_plain_script_on_the_same_samples(inner_batches: bool) -> None:
    """q = g(x, y) - g(x, y_T) on the step's samples, whichever those of the inner steps were."""
    problem = Drawn(inner_batches=inner_batches)
    solver = solvers.get("bome")(inner_steps=3, inner_lr=LR, lower_lr=LR, upper_lr=LR)
    bench = Bench(problem, solver, 3)
    x, y = bench.x().clone(), torch.full((DIM,), 0.5, dtype=torch.float64)
    for step in range(3):
        plain = Plain(problem, step)
        solved = y
        for k in range(3):
            at = leaf(solved)
            (slope,) = grad(plain.g(x, at, k if inner_batches else None), at)
            solved = solved - LR * slope
        px, py = leaf(x), leaf(y)
        fx, fy = torch.autograd.grad(plain.f(px, py), (px, py), materialize_grads=True)
        qx, qy = grad(plain.g(px, py) - plain.g(px, solved), px, py)
        square = (qx**2).sum() + (qy**2).sum()
        weight = max(0.0, float(0.5 - ((fx * qx).sum() + (fy * qy).sum()) / square))
        x, y = x - LR * (fx + weight * qx), y - LR * (fy + weight * qy)
        bench.advance()
        assert torch.allclose(bench.x(), x, rtol=1e-10)
        assert torch.allclose(bench.y(), y, rtol=1e-10)


@pytest.mark.parametrize("inner_batches", [False, True])
def test_itd_goes_back_over_the_samples_that_it_came_by(inner_batches: bool) -> None:
    problem = Drawn(inner_batches=inner_batches)
    solver = solvers.get("itd")(inner_steps=3, inner_lr=LR, upper_lr=LR)
    bench = Bench(problem, solver, 2)
    x, y = bench.x().clone(), torch.full((DIM,), 0.5, dtype=torch.float64)
    for step in range(2):
        plain, px = Plain(problem, step), leaf(x)
        at = leaf(y)
        for k in range(3):
            (slope,) = grad(plain.g(px, at, k if inner_batches else None), at, graph=True)
            at = at - LR * slope
        (direction,) = grad(plain.f(px, at), px)
        x, y = x - LR * direction, at.detach()
        bench.advance()
        assert torch.allclose(bench.x(), x, rtol=1e-10)
        assert torch.allclose(bench.y(), y, rtol=1e-10)


def inner_asked(solver: Solver, inner_batches: bool) -> list[int | None]:
    """What the second step's rounds asked for, each once (in one shard)."""
    problem = Drawn(inner_batches=inner_batches)
    bench = Bench(problem, solver, 2, shards=1)
    bench.advance()
    problem.asked.clear()
    bench.advance()
    return problem.asked


# Rounds of a step, T = 2 inner steps, as docs/architecture.md tells them; None: the step's samples.
ASKED: dict[str, list[int | None]] = {
    "bome": [0, 1, None],
    "itd": [0, 1, None, 1, 0],
    "f2sa": [0, 1, None],
    "vpbgd": [0, 1, None],
    "lower_only": [0, 1],
    "amigo_gd": [0, 1, None, None],
    "subbio": [0, 1, None, None, None],
    "stocbio": [0, 1, None, None, None],
    "sl_bamm": [None],
    "soba": [None],
}
OPTIONS = {"amigo_gd": {"solve_steps": 1}, "stocbio": {"solve_steps": 1}}


@pytest.mark.parametrize("name", ASKED)
def test_which_samples_a_solver_asks_for(name: str) -> None:
    kind = solvers.get(name)
    fields = kind.__dataclass_fields__
    options = {"upper_lr": 0.01} if "upper_lr" in fields else {}
    options |= {"inner_steps": 2} if "inner_steps" in fields else {}
    options |= {k: v for k, v in OPTIONS.get(name, {}).items() if k in fields}
    with_own = inner_asked(kind(**options), True)
    assert [k for k in with_own if k is not None] == [k for k in ASKED[name] if k is not None]
    first = next((i for i, k in enumerate(with_own) if k is None), len(with_own))
    assert with_own[:first] == [k for k in ASKED[name] if k is not None][:first]
    assert set(inner_asked(kind(**options), False)) == {None}


def every_draw(problem: Drawn) -> list[tuple[tuple[int, ...], ...]]:
    """All equally likely draws of the step's samples of all blocks."""
    each = list(itertools.combinations(range(SAMPLES), problem.size))
    return list(itertools.product(each, repeat=problem.blocks))


def test_answers_on_batches_have_the_full_batchs_as_their_mean() -> None:
    """Gradients of f and g in x and y, Hessian products and the cross product: each is linear in the
    samples, so its mean over all draws is the full batch's, to rounding.
    """
    x = {"x": torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)}
    y = {"y": torch.tensor([[0.1, 0.4, -0.7]] * 2, dtype=torch.float64)}
    z = {"y": torch.tensor([[0.3, -0.4, 0.2]] * 2, dtype=torch.float64)}
    v = {"y": torch.tensor([[1.0, -0.5, 0.25]] * 2, dtype=torch.float64)}

    def answers(problem: Drawn) -> Tensor:
        oracle = LocalOracle(problem, x, problem.load(range(2), 0, "train"), "loop")
        q = oracle.total(Term("lower", y), Term("lower", z, -1.0, in_y=False))
        f = oracle.total(Term("upper", y))
        adjoint = oracle.adjoint(y, v, ("lower", 1.0))
        parts = (q.upper["x"], q.lowers[0]["y"].mean(0), f.lowers[0]["y"].mean(0))
        second = (adjoint.residual["y"].mean(0), adjoint.upper["x"])
        image = oracle.hessian(y)(v)["y"].mean(0)
        return torch.cat([*parts, *second, image])

    full = answers(Drawn(size=SAMPLES))
    problem, found = Drawn(), []
    for draw in every_draw(problem):
        problem.chosen = lambda step, inner, block, draw=draw: list(draw[block])  # type: ignore[method-assign]
        found.append(answers(problem))
    assert len(found) == 36
    assert torch.allclose(torch.stack(found).mean(0), full, rtol=1e-12, atol=1e-13)
    assert float(torch.stack(found).std(0).min()) > 1e-3  # a draw alone is not the full batch


def test_the_gap_at_the_solution_of_its_own_samples_is_zero_on_them() -> None:
    """What one q on one batch is for: at y = y_T its gradient is 0 on every batch, not on average."""
    problem = Drawn()
    x = {"x": torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)}
    y = {"y": torch.tensor([[0.1, 0.4, -0.7]] * 2, dtype=torch.float64)}
    for step in range(5):
        oracle = LocalOracle(problem, x, problem.load(range(2), step, "train"), "loop")
        q = oracle.total(Term("lower", y), Term("lower", y, -1.0, in_y=False))
        assert float(q.upper["x"].abs().max()) < 1e-14


def test_a_krylov_basis_over_steps_is_refused_on_batches() -> None:
    problem = Drawn()
    problem.minibatches = True
    with pytest.raises(ConfigError, match="draws other samples"):
        solvers.get("lancbio")(upper_lr=0.1).check(problem)
    solvers.get("lancbio")(upper_lr=0.1).check(Drawn())
