"""Minibatches of a shared problem: which samples each solver sees where, what holds in expectation over
them, and each step against plain scripts on the same samples.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from drawn import DIM, SAMPLES, Drawn, Plain, grad, leaf
from torch import Tensor
from toy import Bench

from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.oracle import Term
from bomemeta.core.solver import Solver
from bomemeta.errors import ConfigError
from bomemeta.registry import solvers

LR = 0.1


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
