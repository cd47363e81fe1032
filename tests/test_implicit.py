"""What LancBiO and SubBiO ask of the oracle, the hypergradient they make of it, its price, and
where it ends.
"""

from dataclasses import replace

import pytest
import torch
from quadratics import SOLVERS, Synthetic, kept, lancbio, small
from reference import curvature
from toy import Bench, attached, one_thread

from bomemeta.core import tree
from bomemeta.core.implicit import flat
from bomemeta.core.inner import gradient_steps
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.oracle import Hessian, Term
from bomemeta.errors import ConfigError, DivergenceError
from bomemeta.problems.analytic import Analytic
from bomemeta.problems.few_shot import FewShot
from bomemeta.solvers.lancbio import LancBiO
from bomemeta.solvers.subbio import SubBiO


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The oracle's Hessian products


def located(problem, task_map="loop"):
    problem = attached(problem)
    upper = problem.init_upper(torch.Generator().manual_seed(1))
    oracle = LocalOracle(
        problem, upper, problem.load(range(problem.num_tasks or 3), 0, "train"), task_map
    )
    start = oracle.init_lower()
    return oracle, {
        name: tensor + 0.1 * normal(*tensor.shape, seed=3) for name, tensor in start.items()
    }


SMALL = {"ways": 3, "queries": 2, "width": 4}
PROBLEMS = {
    "quadratic": lambda: Analytic(case="quadratic", tasks=3),
    "prototype": lambda: FewShot(**SMALL),
    "network": lambda: FewShot(**SMALL, form="network", shots=2),
}


@pytest.mark.parametrize("task_map", ["loop", "vmap"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_oracles_hessian_is_curvatures_for_all_tasks_and_for_some(name, task_map):
    oracle, at = located(PROBLEMS[name](), task_map)
    product = oracle.hessian(at)
    for seed in (4, 5):  # one graph, several products
        direction = {key: normal(*tensor.shape, seed=seed) for key, tensor in at.items()}
        want = curvature(oracle, at, direction, ("lower", 1.0)).lower_product
        torch.testing.assert_close(product(direction), want)
    rows = torch.tensor([0, 2])

    def some(stack):
        return {key: tensor[rows] for key, tensor in stack.items()}

    torch.testing.assert_close(oracle.hessian(some(at), rows)(some(direction)), some(want))
    assert oracle.hessian_products == pytest.approx(2 + 2 / 3)


def test_hessian_of_what_is_linear_is_zero():
    oracle, at = located(Analytic(case="minimax"))
    assert (oracle.hessian(at)(at)["y"] == 0).all()


def test_flat_vectors_are_the_dictionarys_order():
    oracle, at = located(PROBLEMS["network"]())
    direction = {key: normal(*tensor.shape, seed=4) for key, tensor in at.items()}
    want = tree.flatten_tasks(oracle.hessian(at)(direction))
    torch.testing.assert_close(flat(oracle.hessian(at), at)(tree.flatten_tasks(direction)), want)


# The hypergradient


@pytest.mark.parametrize("name", ["lancbio", "subbio"])
@pytest.mark.parametrize("fresh", [True, False])
def test_direction_is_the_true_hypergradient_at_convergence(name, fresh):
    """Central differences of mean_i f_i(x, argmin g_i(x, .)), lower problems solved to the end,
    through a backbone.
    """
    problem = attached(FewShot(ways=3, queries=3, width=4, fixed_tasks=None if fresh else 3))
    ids = range(3)

    def hyper_objective(upper):
        oracle = LocalOracle(problem, upper, problem.load(ids, 0, "train"), "loop", False)
        return float(
            oracle.upper(gradient_steps(oracle, oracle.init_lower(), 300, 0.2)).value.mean()
        )

    many = 300 if fresh else 20
    solver: LancBiO | SubBiO = LancBiO(subspace=20, inner_steps=many, inner_lr=0.2, upper_lr=1.0)
    if name == "subbio":
        solver = SubBiO(inner_steps=many, inner_lr=0.2, aux_lr=0.2, aux_steps=60, upper_lr=1.0)
    bench = Bench(problem, solver, 61)
    before = {name: tensor.clone() for name, tensor in bench.upper.params.items()}
    for _ in range(1 if fresh else 60):  # x is put back, so that y and v converge at one x
        metrics = bench.advance(ids).metrics
        step = tree.axpy(
            -1.0, bench.upper.params, before
        )  # upper_lr 1: minus the step is the direction
        for key, tensor in before.items():
            bench.upper.params[key].copy_(tensor)
    eps = 1e-5 / float(tree.dot(step, step).sqrt())
    slope = (
        hyper_objective(tree.axpy(eps, step, before))
        - hyper_objective(tree.axpy(-eps, step, before))
    ) / (2 * eps)
    # d/dt F(x + t d) = <grad F, d> = |d|^2 if d is the hypergradient. ReLU and max-pool kinks
    # within 1e-5 cost some digits.
    assert slope == pytest.approx(float(tree.dot(step, step)), rel=1e-4)
    assert metrics["hypergradient_norm"] == pytest.approx(float(tree.dot(step, step).sqrt()))
    assert metrics["residual"] < 1e-6


@pytest.mark.parametrize("weight", [1.0, torch.tensor([1.0, 0.0, 2.5], dtype=torch.float64)])
def test_adjoint_is_total_and_curvature_in_one(weight):
    """One double backward of f - <grad_y g, v> against the products asked for one by one."""
    problem = attached(FewShot(ways=3, queries=3, width=4))
    upper = problem.init_upper(torch.Generator().manual_seed(0))
    oracle = LocalOracle(problem, upper, problem.load(range(3), 0, "train"), "loop")
    at = oracle.init_lower()
    v = {
        name: torch.randn(
            tensor.shape, generator=torch.Generator().manual_seed(1), dtype=tensor.dtype
        )
        for name, tensor in at.items()
    }
    got = oracle.adjoint(at, v, ("lower", 1.0), weight=weight)
    f, products = (
        oracle.total(Term("upper", at, weight)),
        curvature(oracle, at, v, ("lower", weight)),
    )
    torch.testing.assert_close(got.upper, tree.axpy(-1.0, products.upper_product, f.upper))
    torch.testing.assert_close(got.residual, tree.axpy(-1.0, f.lowers[0], products.lower_product))
    torch.testing.assert_close((got.upper_value, got.values), (f.values[0], products.values))


# Costs


def test_forty_steps_take_forty_four_hessian_products(monkeypatch):
    calls, crosses = [], []
    hessian, adjoint = LocalOracle.hessian, LocalOracle.adjoint

    def counted(self, *args, **kw):
        product = hessian(self, *args, **kw)
        return Hessian(lambda direction: calls.append(1) or product(direction))

    monkeypatch.setattr(LocalOracle, "hessian", counted)
    monkeypatch.setattr(
        LocalOracle,
        "adjoint",
        lambda self, *args, **kw: crosses.append(1) or adjoint(self, *args, **kw),
    )
    bench = Bench(attached(Synthetic()), lancbio(), 40)
    metrics = [bench.advance().metrics for _ in range(40)]
    assert (len(calls), len(crosses)) == (44, 40)
    assert sum(line["hessian_products"] for line in metrics) == 44
    assert {line["gradient_evaluations"] for line in metrics} == {5 + 3}


def test_subbio_takes_three_products():
    bench = Bench(small(), SOLVERS["subbio"], 3)
    metrics = [bench.advance().metrics for _ in range(3)]
    assert {line["hessian_products"] for line in metrics} == {3}
    assert {line["gradient_evaluations"] for line in metrics} == {3 + 3}


def test_staggered_tasks_restart_at_different_steps_at_the_same_cost():
    bench = Bench(small(tasks=4), SOLVERS["lancbio_stagger"], 40, shards=1)
    products = [bench.advance().metrics["hessian_products"] for _ in range(40)]
    assert products[0] == 2  # all tasks begin
    assert products[4:] == pytest.approx([1.25] * 36)  # from then on one of the four in every step
    assert [int(kept(bench, task)["krylov"]["left"][0, 0]) for task in range(4)] == [0, 3, 2, 1]


def test_fresh_episodes_cost():
    bench = Bench(
        attached(FewShot(ways=3, queries=3, width=4)),
        LancBiO(subspace=6, inner_steps=4, inner_lr=0.2),
        1,
    )
    metrics = bench.advance(range(4)).metrics
    assert (metrics["hessian_products"], metrics["gradient_evaluations"]) == (6, 7)


# Options and guards


def test_x_stands_still_in_the_warm_up_of_an_epoch():
    problem = small(tasks=2)
    warm, still = Bench(problem, replace(SOLVERS["lancbio"], warmup_steps=2), 8), []
    for _ in range(8):
        before = warm.x()
        warm.advance()
        still.append(torch.equal(before, warm.x()))
    assert still == [True, True, False, False, True, True, False, False]


def test_warm_up_of_some_tasks_leaves_the_others_share():
    """Staggered epochs: x takes the step of the tasks that are past their warm-up, still as a mean
    over all.
    """
    problem = small(tasks=2)
    solver = replace(SOLVERS["lancbio_stagger"], warmup_steps=1)
    both, plain = (
        Bench(problem, solver, 9, shards=1),
        Bench(problem, replace(solver, warmup_steps=0, upper_lr=1e-30), 9, shards=1),
    )
    both.advance(), plain.advance()
    x0 = both.x()
    assert (x0 == 0).all()  # all tasks begin together
    both.advance(), plain.advance()
    shares = [problem._data["B"][task].T @ kept(plain, task)["krylov"]["v"][0] for task in range(2)]
    torch.testing.assert_close(both.x(), -0.1 * sum(shares) / 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"subspace": 3, "warmup_steps": 3},
        {"warmup_steps": 1, "upper_optimizer": "adam"},
        {"warmup_steps": 1, "weight_decay": 0.1},
    ],
)
def test_warm_up_that_cannot_be_is_refused(changes):
    with pytest.raises(ConfigError, match="warmup_steps"):
        LancBiO(**changes)


@pytest.mark.parametrize("name", ["lancbio", "subbio"])
def test_divergence_is_said_as_such(name):
    bench = Bench(small(), replace(SOLVERS[name], inner_lr=1e4), 200)
    with pytest.raises(DivergenceError):
        bench.finish()


@pytest.mark.parametrize("name", ["lancbio", "subbio"])
def test_lower_problem_without_curvature_moves_x_along_grad_x_f(name):
    """minimax: d2g/dy2 = 0, so no v can be found and none is made up; f = x y."""
    bench = Bench(
        attached(Analytic(case="minimax")), replace(SOLVERS[name], inner_lr=0.05, upper_lr=0.05), 2
    )
    for _ in range(2):
        x = bench.x()
        bench.advance()
        torch.testing.assert_close(bench.x(), x - 0.05 * bench.y())


@pytest.mark.parametrize("name", ["lancbio", "subbio"])
@pytest.mark.parametrize("fixed", [None, 4])
def test_episodes_learn(name, fixed):
    problem = attached(FewShot(ways=3, queries=3, width=8, fixed_tasks=fixed), dtype=torch.float32)
    bench = Bench(
        problem,
        replace(SOLVERS[name], inner_steps=5, inner_lr=0.2, upper_lr=0.01, upper_optimizer="adam"),
        25,
    )
    ids = [range(4) if fixed else range(4 * step, 4 * step + 4) for step in range(25)]
    losses = [bench.advance(tasks).metrics["upper_loss"] for tasks in ids]
    assert sum(losses[-5:]) < (0.5 if fixed else 0.85) * sum(losses[:5])
    assert sorted(bench.lower.handles) == (list(range(4)) if fixed else [])
