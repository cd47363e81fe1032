"""The baselines against closed forms, against their equations written out plainly, and against each
other's identities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from quadratics import Synthetic, kept
from torch import Tensor
from toy import Bench, attached, one_thread

import bomemeta
from bomemeta.config import load_config
from bomemeta.core import tree
from bomemeta.core.implicit import linear_system
from bomemeta.core.inner import gradient_steps
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.oracle import Oracle
from bomemeta.core.problem import Problem
from bomemeta.core.solver import Solver
from bomemeta.errors import ConfigError, DivergenceError
from bomemeta.problems.analytic import Analytic
from bomemeta.problems.few_shot import FewShot
from bomemeta.solvers.aid_cg import AidCG
from bomemeta.solvers.aid_neumann import AidNeumann
from bomemeta.solvers.amigo_cg import AmigoCG
from bomemeta.solvers.amigo_gd import AmigoGD
from bomemeta.solvers.f2sa import F2SA
from bomemeta.solvers.itd import ITD
from bomemeta.solvers.sl_bamm import SLBAMM
from bomemeta.solvers.soba import SOBA
from bomemeta.solvers.stocbio import StocBiO
from bomemeta.solvers.vpbgd import VPBGD

EYE = torch.eye(4, dtype=torch.float64)
RIDGE = 1.0
SOLVERS: dict[str, Solver] = {
    "itd": ITD(inner_steps=3, inner_lr=0.2),
    "aid_cg": AidCG(inner_steps=3, inner_lr=0.2, aux_steps=4),
    "aid_neumann": AidNeumann(inner_steps=3, inner_lr=0.2, aux_steps=4, aux_lr=0.2),
    "stocbio": StocBiO(inner_steps=3, inner_lr=0.2, aux_steps=4, aux_lr=0.2),
    "amigo_gd": AmigoGD(inner_steps=3, inner_lr=0.2, aux_steps=4, aux_lr=0.2),
    "amigo_cg": AmigoCG(inner_steps=3, inner_lr=0.2, aux_steps=4),
    "soba": SOBA(inner_steps=3, inner_lr=0.2, aux_steps=4, aux_lr=0.2),
    "f2sa": F2SA(inner_steps=2, inner_lr=0.2, lower_lr=0.05, adapt_steps=4, penalty=2.0),
    "vpbgd": VPBGD(inner_steps=2, inner_lr=0.2, lower_lr=0.05, adapt_steps=4, penalty=2.0),
}


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Constants(NamedTuple):
    """g_i = y'A_i y/2 - y'(B_i x + c_i), f_i = |y - t_i|^2/2 + (RIDGE/2)|x|^2, stacks over the
    tasks.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    t: Tensor

    def solved(self, x: Tensor) -> Tensor:
        """argmin g_i(x, .)."""
        return torch.linalg.solve(self.a, self.b @ x + self.c)

    def series(self, terms: int, lr: float) -> Tensor:
        """I - (I - lr A)^terms: what a Neumann series of so many terms, or so many gradient steps,
        leave of A^-1 A.
        """
        return EYE - torch.linalg.matrix_power(EYE - lr * self.a, terms)


def quadratic(**changes: Any) -> Analytic:
    """Curvatures of g in [1/2, 1], of the whole problem in [1, 4]: tens of steps are enough."""
    return attached(
        Analytic(
            **{
                "case": "quadratic",
                "tasks": 3,
                "dim_upper": 2,
                "condition": 2.0,
                "ridge": RIDGE,
                **changes,
            }
        )
    )


def lancbio_synthetic() -> Analytic:
    """Curvatures of g in [1, 2], and a solution that is not 0 at x = 0."""
    return attached(Analytic(case="lancbio_synthetic", dim_upper=2, condition=2.0, ridge=RIDGE))


PROBLEMS = {
    "quadratic": (quadratic, 1.3),
    "lancbio_synthetic": (lancbio_synthetic, 0.65),
}  # and a step near 2 / (1/2 + 1), 2 / (1 + 2)


def constants(problem: Analytic) -> Constants:
    data = problem._data
    if problem.case == "quadratic":
        return Constants(data["A"], data["B"].mT, torch.zeros_like(data["t"]), data["t"])
    return Constants(data["A"], data["B"], data["c"], data["t"])


def root(left: Tensor, pull: Tensor, c: Tensor, t: Tensor) -> Tensor:
    """x with mean_i left_i'(pull_i x + c_i - t_i) + RIDGE x = 0."""
    matrix = (left.mT @ pull).mean(0) + RIDGE * torch.eye(left.shape[2], dtype=torch.float64)
    return torch.linalg.solve(matrix, (left.mT @ (t - c)[:, :, None]).mean(0)[:, 0])


def truncated(problem: Analytic, terms: int | None, lr: float) -> Tensor:
    """Where x ends if y solves g and A^-1 in the hypergradient is cut to `terms` terms of its
    Neumann series; None: x*.
    """
    a, b, c, t = constants(problem)
    slope, shift = torch.linalg.solve(a, b), torch.linalg.solve(a, c)
    cut = EYE if terms is None else constants(problem).series(terms, lr)
    return root(cut @ slope, slope, shift, t)


def unrolled_solution(problem: Analytic, steps: int, lr: float) -> Tensor:
    """argmin_x mean_i f_i(x, y_iT(x)), y_iT after T steps from 0: y_T = K A^-1 (B x + c), K = I -
    (I - lr A)^T.
    """
    a, b, c, t = constants(problem)
    cut = constants(problem).series(steps, lr)
    slope = cut @ torch.linalg.solve(a, b)
    return root(slope, slope, (cut @ torch.linalg.solve(a, c)[:, :, None])[:, :, 0], t)


def penalised_solution(problem: Analytic, penalty: float) -> Tensor:
    """argmin_x mean_i min_y [f_i + l g_i] - l min_z g_i, with l B'(z - y) + RIDGE x its gradient.

    y = (I + l A)^-1 (t + l (B x + c)) and z = A^-1 (B x + c), so that l (z - y) = l (I + l A)^-1 (z
    - t).
    """
    a, b, c, t = constants(problem)
    left = penalty * torch.linalg.solve(EYE + penalty * a, b)
    return root(left, torch.linalg.solve(a, b), torch.linalg.solve(a, c), t)


def aux(bench: Bench, task: int = 0) -> Tensor:
    return tree.flatten(kept(bench, task)["v"])


def moved(bench: Bench, ids: Any = None) -> tuple[Tensor, dict[str, float]]:
    """The direction of one step with upper_lr 1, and its metrics."""
    before = bench.x()
    metrics = bench.advance(ids).metrics
    return before - bench.x(), metrics


# Closed forms


@pytest.mark.parametrize("name", ["aid_cg", "amigo_gd", "amigo_cg", "soba"])
@pytest.mark.parametrize("case", PROBLEMS)
def test_implicit_solvers_reach_the_solution(case, name):
    problem, lr = PROBLEMS[case][0](), PROBLEMS[case][1]
    tuned = {"inner_steps": 4, "inner_lr": lr, "upper_lr": 0.3}
    solver = replace(SOLVERS[name], **tuned | ({} if name.endswith("cg") else {"aux_lr": lr}))
    if name == "soba":  # one step each: x has to be slower than y and v
        solver = replace(solver, upper_lr=0.05)
    bench = Bench(problem, solver, 400 if name == "soba" else 60, shards=1)
    metrics = bench.finish()
    torch.testing.assert_close(truncated(problem, None, 0.0), problem.solution())
    # 1e-7: 60 contractions by 0.75 or better, measured below 3e-9
    torch.testing.assert_close(bench.x(), problem.solution(), atol=1e-7, rtol=0)
    torch.testing.assert_close(
        bench.y(), constants(problem).solved(bench.x())[0], atol=1e-6, rtol=0
    )
    assert metrics["residual"] < 1e-6
    assert metrics["hypergradient_norm"] < 1e-6


@pytest.mark.parametrize("name", ["aid_neumann", "stocbio", "itd"])
@pytest.mark.parametrize("case", PROBLEMS)
def test_series_of_finite_length_reach_the_biased_solution(case, name):
    """Three terms in each of them. ITD's y continues from step to step, so that it solves g and the
    cut series alone is what is wrong.
    """
    problem, lr = PROBLEMS[case][0](), PROBLEMS[case][1] / 3
    solver: Solver = {
        "aid_neumann": AidNeumann(inner_steps=8, inner_lr=lr, aux_steps=3, aux_lr=lr, upper_lr=0.3),
        "stocbio": StocBiO(inner_steps=8, inner_lr=lr, aux_steps=2, aux_lr=lr, upper_lr=0.3),
        "itd": ITD(inner_steps=3, inner_lr=lr, upper_lr=0.3),
    }[name]
    bench = Bench(problem, solver, 70, shards=1)
    bench.finish()
    biased, exact = truncated(problem, 3, lr), problem.solution()
    torch.testing.assert_close(bench.x(), biased, atol=1e-7, rtol=0)
    assert (biased - exact).norm() > 1e-2
    if case == "quadratic":  # what BOME with T = 3 tends to, derived elsewhere
        torch.testing.assert_close(biased, problem.solution((3, lr)))


def test_itd_from_its_start_minimises_the_unrolled_objective():
    """Another point than with `warm_start`: y_T is not the lower solution either."""
    problem = lancbio_synthetic()
    bench = Bench(
        problem, ITD(inner_steps=3, inner_lr=0.2, upper_lr=0.3, warm_start=False), 60, shards=1
    )
    bench.finish()
    torch.testing.assert_close(bench.x(), unrolled_solution(problem, 3, 0.2), atol=1e-7, rtol=0)
    assert (bench.x() - truncated(problem, 3, 0.2)).norm() > 1e-2
    y = (constants(problem).series(3, 0.2) @ constants(problem).solved(bench.x())[:, :, None])[
        0, :, 0
    ]
    torch.testing.assert_close(bench.y(), y, atol=1e-7, rtol=0)


@pytest.mark.parametrize("case", PROBLEMS)
@pytest.mark.parametrize("name", ["f2sa", "vpbgd"])
def test_penalty_solvers_reach_the_penalised_solution(name, case):
    problem, lr = PROBLEMS[case][0](), PROBLEMS[case][1]
    tuned = {"penalty": 4.0, "inner_steps": 4, "inner_lr": lr, "lower_lr": lr / 5, "upper_lr": 0.1}
    solver = F2SA(penalty_growth=0.0, **tuned) if name == "f2sa" else VPBGD(**tuned)
    bench = Bench(problem, solver, 170, shards=1)
    metrics = bench.finish()
    torch.testing.assert_close(bench.x(), penalised_solution(problem, 4.0), atol=1e-7, rtol=0)
    assert (bench.x() - problem.solution()).norm() > 1e-3
    assert metrics["hypergradient_norm"] < 1e-6
    a, b, c, t = constants(problem)
    y = torch.linalg.solve(EYE + 4 * a, t + 4 * (b @ bench.x() + c))
    torch.testing.assert_close(bench.y(), y[0], atol=1e-6, rtol=0)
    z = bench.y() + tree.flatten(kept(bench)["z_offset"])
    torch.testing.assert_close(z, constants(problem).solved(bench.x())[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", PROBLEMS)
def test_error_of_a_penalty_falls_as_one_over_it(case):
    problem = PROBLEMS[case][0]()
    errors = [
        float((penalised_solution(problem, 1000.0 * 2**k) - problem.solution()).norm())
        for k in range(3)
    ]
    assert errors[0] > 1e-6
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([2, 2], rel=0.01)


def test_f2sas_growing_penalty_leads_on_to_the_solution():
    """lower_lr would not be stable beyond l = 3, and l grows to 80: y's step has to shrink with it."""
    problem = quadratic()
    # penalty lower_lr = inner_lr: y and z lag alike behind x
    solver = F2SA(
        penalty=2.0, penalty_growth=0.3, inner_steps=4, inner_lr=1.0, lower_lr=0.5, upper_lr=0.15
    )
    bench = Bench(problem, solver, 260, shards=1)
    penalties = [bench.advance().metrics["penalty"] for _ in range(bench.steps)]
    assert penalties == pytest.approx([2 + 0.3 * step for step in range(bench.steps)])
    error = (bench.x() - problem.solution()).norm()
    assert error < 0.1 * (penalised_solution(problem, 2.0) - problem.solution()).norm()
    # The target moves by the last l's change, 0.4 % of an error of 7e-4; x follows within tens of
    # steps.
    torch.testing.assert_close(
        bench.x(), penalised_solution(problem, penalties[-1]), atol=1e-4, rtol=0
    )


def test_itd_solves_the_minimax_toy_inside_its_box():
    bench = Bench(
        attached(Analytic(case="minimax")),
        ITD(inner_steps=10, inner_lr=0.05, upper_lr=0.5),
        150,
        shards=1,
    )
    bench.finish()
    assert max(bench.x().abs().max(), bench.y().abs().max()) < 1e-6


# Steps written out


@pytest.mark.parametrize("name", ["f2sa", "vpbgd"])
def test_penalty_solvers_steps_are_the_papers(name):
    problem = lancbio_synthetic()
    a, b, c, t = (stack[0] for stack in constants(problem))
    x = problem.init_upper(torch.Generator().manual_seed(0))["x"]
    y = z = torch.zeros(4, dtype=torch.float64)
    tuned = {"inner_steps": 2, "inner_lr": 0.2, "lower_lr": 0.1, "upper_lr": 0.3, "penalty": 2.0}
    solver = F2SA(penalty_growth=0.5, **tuned) if name == "f2sa" else VPBGD(**tuned)
    bench = Bench(problem, solver, 10, shards=1)

    def grad_g(y: Tensor) -> Tensor:
        return a @ y - b @ x - c

    for step in range(4):
        for _ in range(2):
            z = z - 0.2 * grad_g(z)
        if name == "f2sa":
            weight = 2 + 0.5 * step
            for _ in range(2):
                y = y - 0.1 * 2 / weight * (y - t + weight * grad_g(y))
            new_y = y
        else:
            weight = 2.0
            new_y = y - 0.1 * (y - t + weight * grad_g(y))
        gap = (y @ a @ y - z @ a @ z) / 2 - (y - z) @ (b @ x + c)
        x, y = x - 0.3 * (RIDGE * x - weight * b.mT @ (y - z)), new_y
        metrics = bench.advance().metrics
        torch.testing.assert_close((bench.x(), bench.y()), (x, y))
        assert (metrics["penalty"], metrics["gap"]) == pytest.approx((weight, float(gap)))


def test_conjugate_gradients_of_as_many_steps_as_numbers_solve_the_system():
    problem = quadratic()
    a, b, c, t = constants(problem)
    bench = Bench(
        problem, AidCG(inner_steps=1, inner_lr=0.7, aux_steps=4, upper_lr=1.0), 2, shards=1
    )
    x = bench.x()
    y = 0.7 * (b @ x + c)  # one step from 0
    direction, metrics = moved(bench)
    v = torch.linalg.solve(a, y - t)
    torch.testing.assert_close(direction, RIDGE * x + (b.mT @ v[:, :, None]).mean(0)[:, 0])
    assert metrics["residual"] < 1e-12
    assert metrics["aux_norm"] == pytest.approx(float(v.norm(dim=1).mean()))
    assert metrics["hypergradient_norm"] == pytest.approx(float(direction.norm()))


# Identities


def state(bench: Bench) -> list[Tensor]:
    tasks = sorted(bench.lower.handles)
    return [bench.x(), *(bench.y(task) for task in tasks), *(aux(bench, task) for task in tasks)]


def of_sl_bamm(**changes: Any) -> SLBAMM:
    return SLBAMM(schedule="constant", mu=0.0, lower_lr=0.2, aux_lr=0.3, upper_lr=0.05, **changes)


SINGLE = {"inner_lr": 0.2, "upper_lr": 0.05}
SL_BAMM = {
    "soba": (SOBA(aux_lr=0.3, **SINGLE), of_sl_bamm()),
    "amigo_gd": (
        AmigoGD(inner_steps=1, aux_steps=1, aux_lr=0.3, **SINGLE),
        of_sl_bamm(order="gauss_seidel"),
    ),
    "amigo_cg": (
        AmigoCG(inner_steps=1, aux_steps=1, **SINGLE),
        of_sl_bamm(order="gauss_seidel", aux_step="cauchy"),
    ),
}


@pytest.mark.parametrize("name", SL_BAMM)
@pytest.mark.parametrize("problem", ["quadratic", "few_shot"])
def test_one_step_each_is_sl_bamm_at_mu_zero(problem, name):
    """SOBA its Jacobi order; AmIGO with one step of y and of v its Gauss-Seidel order, CG's first
    step being Cauchy's.
    """
    made = (
        quadratic()
        if problem == "quadratic"
        else attached(FewShot(ways=3, queries=2, width=4, fixed_tasks=3))
    )
    a, b = (Bench(made, solver, 6) for solver in SL_BAMM[name])
    a.finish(), b.finish()
    for mine, theirs in zip(state(a), state(b), strict=True):
        if name == "soba":
            assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("problem", ["quadratic", "few_shot"])
def test_stocbio_is_aid_neumann_with_a_term_more(problem):
    made = quadratic() if problem == "quadratic" else attached(FewShot(ways=3, queries=2, width=4))
    common = {"inner_steps": 2, "inner_lr": 0.2, "aux_lr": 0.2}
    a, b = (
        Bench(made, solver(aux_steps=steps, **common), 4)
        for solver, steps in ((StocBiO, 3), (AidNeumann, 4))
    )
    a.finish(), b.finish()
    assert torch.equal(a.x(), b.x())


def test_exact_solves_agree():
    exact = {
        "aid_cg": {"aux_steps": 4},
        "amigo_cg": {"aux_steps": 4},
        "amigo_gd": {
            "aux_steps": 90,
            "aux_lr": 1.3,
        },  # contracts by 0.35: rounding is reached long before
        "aid_neumann": {"aux_steps": 90, "aux_lr": 1.3},
    }
    benches = [
        Bench(quadratic(), replace(SOLVERS[name], **changes), 3, shards=1)
        for name, changes in exact.items()
    ]
    for bench in benches:
        bench.finish()
        torch.testing.assert_close(
            (bench.x(), bench.y(2)), (benches[0].x(), benches[0].y(2)), rtol=1e-10, atol=1e-12
        )


def test_warm_starts_differ_from_cold_ones_from_the_second_step_on():
    cold, warm = (Bench(quadratic(), SOLVERS[name], 3) for name in ("aid_neumann", "amigo_gd"))
    cold.advance(), warm.advance()
    assert torch.equal(cold.x(), warm.x())
    cold.advance(), warm.advance()
    assert (cold.x() - warm.x()).norm() > 1e-4


def test_fresh_tasks_make_gradient_steps_in_v_a_neumann_series():
    problem = attached(FewShot(ways=3, queries=2, width=4))
    benches = [Bench(problem, SOLVERS[name], 1) for name in ("aid_neumann", "amigo_gd", "soba")]
    ends = [bench.advance().metrics | {"x": bench.x()} for bench in benches]
    assert torch.equal(ends[0]["x"], ends[1]["x"])
    assert torch.equal(ends[0]["x"], ends[2]["x"])
    assert ends[0]["residual"] == ends[1]["residual"] == ends[2]["residual"]


def test_fresh_tasks_make_f2sa_without_growth_vpbgd():
    problem = attached(FewShot(ways=3, queries=2, width=4))
    a, b = (
        Bench(problem, solver, 2)
        for solver in (replace(SOLVERS["f2sa"], penalty_growth=0.0), SOLVERS["vpbgd"])
    )
    a.finish(), b.finish()
    assert torch.equal(a.x(), b.x())


def test_without_curvature_conjugate_gradients_make_up_no_v():
    """minimax: d2g/dy2 = 0; x moves along grad_x f = y alone."""
    for solver in (AidCG(inner_lr=0.05, upper_lr=0.05), AmigoCG(inner_lr=0.05, upper_lr=0.05)):
        bench = Bench(attached(Analytic(case="minimax")), solver, 2)
        for _ in range(2):
            x = bench.x()
            assert bench.advance().metrics["aux_norm"] == 0
            torch.testing.assert_close(bench.x(), x - 0.05 * bench.y())


# Differentiation through the steps


SMALL = {"ways": 3, "queries": 2, "width": 4}
UNROLLED = {
    "quadratic": lambda: quadratic(),
    "coreset": lambda: attached(Analytic(case="coreset")),
    "prototype": lambda: attached(FewShot(**SMALL)),
    "ridge": lambda: attached(FewShot(**SMALL, head="ridge")),
    "span": lambda: attached(FewShot(**SMALL, head="span")),
    "network": lambda: attached(FewShot(**SMALL, form="network", shots=2)),
}


def located(problem: Problem, task_map: str = "loop", seed: int = 1) -> LocalOracle:
    upper = problem.init_upper(torch.Generator().manual_seed(seed))
    return LocalOracle(
        problem, upper, problem.load(range(problem.num_tasks or 3), 0, "train"), task_map
    )


def by_hand(
    oracle: LocalOracle, start: tree.Params, steps: int, lr: float
) -> tuple[tree.Params, tree.Params]:
    """(y_T, sum_i d f_i(x, y_iT(x)) / dx) task after task, x through `encode` and the steps in one
    graph, nothing of the oracle's.
    """
    problem, x = oracle.problem, tree.leaves(oracle.x)
    ends, total = [], torch.zeros((), dtype=torch.float64)
    for task in range(oracle.tasks):
        batch = {name: tensor[task] for name, tensor in oracle.batch.items()}
        encoded = problem.encode(x, batch)
        y = {name: tensor[task].detach().requires_grad_() for name, tensor in start.items()}
        for _ in range(steps):
            grads = torch.autograd.grad(
                problem.lower_loss(encoded, y, batch), list(y.values()), create_graph=True
            )
            y = {
                name: tensor - lr * grad
                for (name, tensor), grad in zip(y.items(), grads, strict=True)
            }
        total = total + problem.upper_loss(encoded, y, batch)
        ends.append(y)
    stacked = {name: torch.stack([end[name].detach() for end in ends]) for name in ends[0]}
    grads = torch.autograd.grad(total, list(x.values()), allow_unused=True, materialize_grads=True)
    return stacked, dict(zip(x, grads, strict=True))


@pytest.mark.parametrize("task_map", ["loop", "vmap"])
@pytest.mark.parametrize("name", UNROLLED)
def test_unrolled_is_autograd_through_a_plain_loop_and_the_recursion(name, task_map):
    oracle = located(UNROLLED[name](), task_map)
    lr = 0.01 if name == "span" else 0.1
    start = {
        key: tensor + 0.1 * normal(*tensor.shape, seed=3)
        for key, tensor in oracle.init_lower().items()
    }
    graph, recursion = oracle.unrolled(start, 4, lr), Oracle.unrolled(oracle, start, 4, lr)
    at, upper = by_hand(oracle, start, 4, lr)
    for found in (graph, recursion):
        torch.testing.assert_close(found.at, at)
        torch.testing.assert_close(found.upper, upper)
    torch.testing.assert_close(graph.upper_value, recursion.upper_value)
    torch.testing.assert_close(graph.lower_value, recursion.lower_value)
    before = gradient_steps(oracle, start, 3, lr)
    torch.testing.assert_close(graph.lower_value, oracle.lower(before).value)


@pytest.mark.parametrize("name", ["quadratic", "coreset", "prototype"])
def test_unrolled_gradient_is_the_slope_of_the_unrolled_objective(name):
    problem = UNROLLED[name]()
    oracle = located(problem)
    start = oracle.init_lower()
    gradient = oracle.unrolled(start, 4, 0.1).upper
    x = tree.detached(oracle.x)

    def objective(upper: tree.Params) -> float:
        there = LocalOracle(problem, upper, oracle.batch, "loop", False)
        return float(there.upper(gradient_steps(there, start, 4, 0.1)).value.sum())

    for seed in (1, 2):
        direction = {key: normal(*tensor.shape, seed=seed) for key, tensor in x.items()}
        eps = 1e-6 / float(tree.dot(direction, direction).sqrt())
        slope = (
            objective(tree.axpy(eps, direction, x)) - objective(tree.axpy(-eps, direction, x))
        ) / (2 * eps)
        # Central differences of step 1e-6: rounding of f leaves nine digits, a kink of the backbone
        # some of them.
        assert slope == pytest.approx(float(tree.dot(gradient, direction)), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("warm", [True, False])
def test_itds_step_is_that_gradient_from_where_y_is_or_from_its_start(warm):
    problem = lancbio_synthetic()
    bench = Bench(
        problem, ITD(inner_steps=3, inner_lr=0.2, upper_lr=1.0, warm_start=warm), 5, shards=1
    )
    y = torch.zeros(1, 4, dtype=torch.float64)
    for _ in range(3):
        oracle = LocalOracle(problem, {"x": bench.x()}, problem.load([0], 0, "train"), "loop")
        end, upper = by_hand(oracle, {"y": y if warm else torch.zeros_like(y)}, 3, 0.2)
        direction, _ = moved(bench)
        y = end["y"]
        torch.testing.assert_close((direction, bench.y()), (upper["x"], y[0]))


def test_projection_that_is_at_work_has_the_identitys_derivative_both_ways():
    """minimax at the edge: y_T = 10 from the first step on; each step's share of d y_T / dx, lr, is
    there nevertheless.
    """
    problem = attached(Analytic(case="minimax", start=[9.9]))
    oracle = located(problem)  # x = 4
    for found in (
        oracle.unrolled(oracle.init_lower(), 3, 0.05),
        Oracle.unrolled(oracle, oracle.init_lower(), 3, 0.05),
    ):
        assert found.at["y"].tolist() == [[10.0]]
        torch.testing.assert_close(
            found.upper["x"], torch.tensor([10 + 3 * 0.05 * 4], dtype=torch.float64)
        )
        assert float(found.upper_value) == pytest.approx(40)


@dataclass(kw_only=True)
class Boxed(Synthetic):
    """|y_j| <= 0.3, of which steps overshoot by much: y + (0.3 - y) is then not 0.3 in floating
    point.
    """

    def setup(self):
        super().setup()
        self._data["c"] *= 50

    def project_lower(self, lower):
        return {"y": lower["y"].clamp(-0.3, 0.3)}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_y_that_is_kept_is_admissible(name):
    problem = attached(Boxed(tasks=3, dim_upper=4, dim_lower=12, condition=10.0, pull=20.0))
    bench = Bench(problem, replace(SOLVERS[name], inner_lr=0.1, upper_lr=1e-3), 4)
    largest = []
    for _ in range(4):
        bench.advance()
        largest.append(float(torch.cat([bench.y(task) for task in range(3)]).abs().max()))
    assert max(largest) == 0.3  # the edge was reached, and never passed by a rounding


# Episodes: costs, and the hypergradient that many steps approach


# What docs/metrics.md says, at SOLVERS' numbers: Hessian products and gradients, where y persists
# and for fresh tasks.
COSTS = {
    "aid_cg": ((4, 3 + 3), (4, 3 + 3)),
    "amigo_cg": ((4 + 1, 3 + 3), (4, 3 + 3)),
    "aid_neumann": ((4 - 1, 3 + 3), (4 - 1, 3 + 3)),
    "amigo_gd": ((4 - 1 + 1, 3 + 3), (4 - 1, 3 + 3)),
    "stocbio": ((4, 3 + 3), (4, 3 + 3)),
    "soba": ((1, 2), (4 - 1, 3 + 3)),
    "itd": ((3, 3 + 1), (3, 3 + 1)),
    "f2sa": ((None, 3 * 2 + 3), (None, 3 * 4 + 3)),
    "vpbgd": ((None, 2 + 3), (None, 3 * 4 + 3)),
}


@pytest.mark.parametrize("fixed", [3, None])
@pytest.mark.parametrize("name", SOLVERS)
def test_episodes_move_x_at_the_documented_cost(name, fixed):
    problem = attached(FewShot(**SMALL, fixed_tasks=fixed))
    bench = Bench(problem, replace(SOLVERS[name], upper_lr=0.01), 2)
    for _ in range(2):
        direction, metrics = moved(bench, range(3))
        assert (metrics.get("hessian_products"), metrics["gradient_evaluations"]) == COSTS[name][
            fixed is None
        ]
        assert 0 < direction.norm() < 0.1
        assert 0.01 * metrics.get("hypergradient_norm", 0) == pytest.approx(float(direction.norm()))
    assert sorted(bench.lower.handles) == ([0, 1, 2] if fixed else [])


def hyper_objective(problem: FewShot, upper: tree.Params, ids: range) -> float:
    """mean_i f_i(x, argmin g_i(x, .)), lower problems solved to the end."""
    oracle = LocalOracle(problem, upper, problem.load(ids, 0, "train"), "loop", False)
    return float(oracle.upper(gradient_steps(oracle, oracle.init_lower(), 300, 0.2)).value.mean())


@pytest.fixture(scope="module")
def hypergradient() -> Tensor:
    """d/dx mean_i f_i(x, argmin g_i(x, .)) of three episodes as one vector: every Hessian a dense
    matrix, by plain autograd.
    """
    with one_thread():
        problem = attached(FewShot(**SMALL))
        oracle = located(problem, seed=0)
        solved = gradient_steps(oracle, oracle.init_lower(), 300, 0.2)["head"]
        x = tree.leaves(oracle.x)
        total = torch.zeros((), dtype=torch.float64)
        for task in range(3):
            batch = {name: tensor[task] for name, tensor in oracle.batch.items()}
            encoded, y = problem.encode(x, batch), solved[task].clone().requires_grad_()
            f, g = (
                loss(encoded, {"head": y}, batch)
                for loss in (problem.upper_loss, problem.lower_loss)
            )
            slope = torch.autograd.grad(g, y, create_graph=True)[0].reshape(-1)
            rows = [
                torch.autograd.grad(number, y, retain_graph=True)[0].reshape(-1) for number in slope
            ]
            right = torch.autograd.grad(f, y, retain_graph=True)[0].reshape(-1)
            v = torch.linalg.solve(torch.stack(rows), right)
            total = total + (f - slope @ v) / 3
        gradient = dict(zip(x, torch.autograd.grad(total, list(x.values())), strict=True))
        base = tree.detached(x)
        eps = 1e-5 / float(tree.dot(gradient, gradient).sqrt())
        values = [
            hyper_objective(problem, tree.axpy(sign * eps, gradient, base), range(3))
            for sign in (1, -1)
        ]
        # Finite differences along it vouch for the reference itself.
        assert (values[0] - values[1]) / (2 * eps) == pytest.approx(
            float(tree.dot(gradient, gradient)), rel=1e-4
        )
        return tree.flatten(gradient)


MANY: dict[
    str, tuple[dict[str, Any], float]
] = {  # changes, and the relative error: what is left of a penalty, or rounding
    "itd": ({"inner_steps": 80}, 1e-6),
    "aid_cg": ({"inner_steps": 150, "aux_steps": 30}, 1e-6),
    "amigo_cg": ({"inner_steps": 150, "aux_steps": 30}, 1e-6),
    "aid_neumann": ({"inner_steps": 150, "aux_steps": 100}, 1e-6),
    "stocbio": ({"inner_steps": 150, "aux_steps": 100}, 1e-6),
    "amigo_gd": ({"inner_steps": 150, "aux_steps": 100}, 1e-6),
    "soba": ({"inner_steps": 150, "aux_steps": 100}, 1e-6),
    "f2sa": ({"adapt_steps": 150, "penalty": 1e4, "lower_lr": 0.2 / 1e4}, 1e-3),
    "vpbgd": ({"adapt_steps": 150, "penalty": 1e4, "lower_lr": 0.2 / 1e4}, 1e-3),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_direction_of_fresh_episodes_approaches_the_hypergradient(name, hypergradient):
    changes, tolerance = MANY[name]
    problem = attached(FewShot(**SMALL))
    few, many = (
        Bench(problem, replace(solver, upper_lr=1.0), 1)
        for solver in (SOLVERS[name], replace(SOLVERS[name], **changes))
    )
    errors = [
        float((moved(bench, range(3))[0] - hypergradient).norm() / hypergradient.norm())
        for bench in (few, many)
    ]
    assert errors[1] < tolerance
    assert errors[0] > 10 * tolerance  # and few steps are another direction


@pytest.mark.parametrize("name", ["f2sa", "vpbgd"])
def test_penalty_solvers_direction_is_the_slope_of_the_penalised_objective(name):
    """h(x) = min_y [f + l g] - l min_z g, with a penalty at which this is far from the
    hypergradient.
    """
    problem = attached(FewShot(**SMALL))
    solver = replace(SOLVERS[name], adapt_steps=300, lower_lr=0.1, upper_lr=1.0, penalty=1.0)
    bench = Bench(problem, solver, 1)
    before = {key: tensor.clone() for key, tensor in bench.upper.params.items()}
    bench.advance(range(3))
    direction = tree.axpy(-1.0, bench.upper.params, before)

    def objective(upper: tree.Params) -> float:
        oracle = LocalOracle(problem, upper, problem.load(range(3), 0, "train"), "loop", False)
        z = gradient_steps(oracle, oracle.init_lower(), 300, 0.2)
        y = z
        for _ in range(300):
            y = tree.axpy(-0.1, tree.axpy(1.0, oracle.upper(y).lower, oracle.lower(y).lower), y)
        return float((oracle.upper(y).value + oracle.lower(y).value - oracle.lower(z).value).mean())

    eps = 1e-5 / float(tree.dot(direction, direction).sqrt())
    slope = (
        objective(tree.axpy(eps, direction, before)) - objective(tree.axpy(-eps, direction, before))
    ) / (2 * eps)
    assert slope == pytest.approx(float(tree.dot(direction, direction)), rel=1e-4)


# Shards, task maps, pools, runs


@pytest.mark.parametrize("name", SOLVERS)
def test_shards_and_task_map_change_rounding_only(name):
    problem = quadratic(tasks=5)
    benches = [
        Bench(problem, SOLVERS[name], 6, shards=shards, task_map=task_map)
        for shards, task_map in ((1, "loop"), (3, "loop"), (1, "vmap"))
    ]
    for bench in benches:
        bench.finish()
        torch.testing.assert_close(
            (bench.x(), bench.y(4)), (benches[0].x(), benches[0].y(4)), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("name", SOLVERS)
def test_task_met_for_the_first_time_does_not_depend_on_its_neighbours(name):
    """y starts at the class means here, not at 0: what else is kept of a task has to start right in
    any company.
    """
    problem = attached(FewShot(**SMALL, fixed_tasks=4))
    together, apart = (Bench(problem, SOLVERS[name], 3, shards=shards) for shards in (1, 2))
    for bench in (together, apart):
        bench.advance([0, 1])
        bench.advance([1, 3])
    torch.testing.assert_close(
        (apart.x(), apart.y(3)), (together.x(), together.y(3)), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("name", ["amigo_cg", "soba", "itd", "f2sa", "vpbgd"])
def test_resumed_run_has_the_same_bits(name, tmp_path):
    """v, and z's distance from y, are in the checkpoint, and a draw from the pool leaves some tasks
    without.
    """
    job = {
        "problem": {"name": "analytic", "case": "quadratic", "tasks": 5},
        "solver": {"name": name, "upper_optimizer": "momentum", "upper_lr": 0.01},
        "steps": 8, "tasks_per_step": 3, "dtype": "float64", "log": {"tensorboard": False},
    }  # fmt: skip
    whole = bomemeta.train(job, [f"output_dir={tmp_path / 'whole'}"])
    bomemeta.train(job, [f"output_dir={tmp_path / 'cut'}", "steps=3"])
    assert bomemeta.resume(tmp_path / "cut", ["steps=8"]).upper_sha256 == whole.upper_sha256


def test_residual_is_measured_as_often_as_it_is_asked_for():
    for every, steps in ((0, []), (1, [0, 1, 2, 3, 4]), (3, [0, 3, 4])):  # and at the last step
        bench = Bench(quadratic(), replace(SOLVERS["amigo_cg"], residual_every=every), 5)
        assert [step for step in range(5) if "residual" in bench.advance().metrics] == steps


def test_linear_system_on_flat_vectors_is_the_quadratics():
    oracle = located(quadratic())
    a, _, _, t = constants(oracle.problem)
    y, v = normal(3, 4, seed=2), normal(3, 4, seed=3)
    system = linear_system(oracle, {"y": y}, v)
    image = (a @ v[:, :, None])[:, :, 0]
    torch.testing.assert_close(
        (system.right, system.image, system.product(v)), (y - t, image, image)
    )


@pytest.mark.parametrize("name", ["amigo_gd", "itd", "f2sa", "vpbgd"])
def test_divergence_is_said_as_such(name):
    bench = Bench(quadratic(), replace(SOLVERS[name], inner_lr=1e4), 200)
    with pytest.raises(DivergenceError):
        bench.finish()


IMPOSSIBLE = [
    ("itd", "inner_steps", 0),
    ("itd", "warm_start", "often"),
    ("aid_cg", "aux_steps", 0),
    ("aid_neumann", "aux_lr", 0.0),
    ("stocbio", "inner_lr", -0.1),
    ("amigo_gd", "residual_every", -1),
    ("amigo_cg", "aux_lr", 0.1),  # conjugate gradients have no step size
    ("soba", "upper_lr", 0.0),
    ("f2sa", "penalty_growth", -1.0),
    ("vpbgd", "penalty", 0.0),
    ("vpbgd", "penalty_growth", 0.1),
]


@pytest.mark.parametrize(("name", "key", "value"), IMPOSSIBLE)
def test_impossible_values_are_refused_with_their_key(name, key, value):
    job = {
        "problem": {"name": "analytic", "case": "quadratic"},
        "solver": {"name": name, key: value},
        "steps": 1,
    }
    with pytest.raises(ConfigError, match=rf"solver\.{key}"):
        load_config(job)
