"""The oracle against finite differences and against itself: every problem, every way to map tasks,
float64.
"""

import pytest
import torch
from reference import curvature
from toy import attached

from bomemeta.core import tree
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.oracle import Term
from bomemeta.problems import few_shot
from bomemeta.problems.analytic import Analytic
from bomemeta.problems.few_shot import FewShot

SMALL = {"ways": 3, "queries": 2, "width": 4}
PROBLEMS = {
    "coreset": lambda: Analytic(case="coreset"),
    "minimax": lambda: Analytic(case="minimax"),
    "degenerate": lambda: Analytic(case="degenerate"),
    "quadratic": lambda: Analytic(case="quadratic", tasks=3),
    "prototype": lambda: FewShot(**SMALL),
    "prototype_inductive": lambda: FewShot(**SMALL, batch_norm="inductive", shots=2),
    "ridge": lambda: FewShot(**SMALL, head="ridge"),
    "span": lambda: FewShot(**SMALL, head="span", regularisation=0.1),
    "protonet": lambda: FewShot(**SMALL, head="protonet", feature_scale=None),
    "cosine": lambda: FewShot(**SMALL, head="cosine", shots=2),
    "r2d2": lambda: FewShot(**SMALL, head="r2d2", shots=2),
    "logistic": lambda: FewShot(**SMALL, head="logistic", neck="scale"),
    "prototype_auxiliary": lambda: FewShot(**SMALL, auxiliary_weight=0.7),
    "cosine_auxiliary": lambda: FewShot(**SMALL, head="cosine", auxiliary_weight=0.7),
    "network": lambda: FewShot(**SMALL, form="network", shots=2),
    "network_inductive": lambda: FewShot(**SMALL, form="network", batch_norm="inductive", shots=2),
}
EPS = 1e-6  # central differences in float64: truncation 1e-12, rounding 1e-10


def make(name, task_map="loop"):
    problem = attached(PROBLEMS[name]())
    tasks = problem.num_tasks or 3
    generator = torch.Generator().manual_seed(1)
    upper = problem.init_upper(generator)
    oracle = LocalOracle(problem, upper, problem.load(range(tasks), 0, "train"), task_map)
    start = oracle.init_lower()
    lower = {
        k: v + 0.1 * torch.randn(v.shape, generator=generator, dtype=v.dtype)
        for k, v in start.items()
    }
    return problem, upper, oracle, lower


def random_like(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in params.items()}


def values(problem, upper, lower, loss):
    oracle = LocalOracle(
        problem,
        upper,
        problem.load(range(len(next(iter(lower.values())))), 0, "train"),
        "loop",
        False,
    )
    return getattr(oracle, loss)(lower).value


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("loss", ["upper", "lower"])
def test_gradients_equal_finite_differences(name, loss):
    problem, upper, oracle, lower = make(name)
    weight = torch.arange(1, oracle.tasks + 1, dtype=torch.float64)
    total = oracle.total(Term(loss, lower, weight))
    direction = random_like(lower, 2)
    plus, minus = (
        values(problem, upper, tree.axpy(s * EPS, direction, lower), loss) for s in (1, -1)
    )
    numeric = (plus - minus) / (2 * EPS)
    torch.testing.assert_close(
        tree.dot_tasks(getattr(oracle, loss)(lower).lower, direction), numeric, atol=1e-7, rtol=1e-5
    )
    torch.testing.assert_close(
        tree.dot_tasks(total.lowers[0], direction), weight * numeric, atol=1e-7, rtol=1e-5
    )

    direction = random_like(upper, 3)
    plus, minus = (
        values(problem, tree.axpy(s * EPS, direction, upper), lower, loss) for s in (1, -1)
    )
    numeric = (weight * (plus - minus)).sum() / (2 * EPS)
    # max-pool and ReLU kinks within EPS cost a little of the central difference's accuracy
    torch.testing.assert_close(tree.dot(total.upper, direction), numeric, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", PROBLEMS)
def test_curvature_equals_finite_differences_of_the_gradient(name):
    problem, upper, oracle, lower = make(name)
    weight = torch.arange(1, oracle.tasks + 1, dtype=torch.float64)
    u = random_like(lower, 2)
    got = curvature(oracle, lower, u, ("upper", 0.3), ("lower", weight))
    gradient = tree.axpy(
        0.3, oracle.upper(lower).lower, tree.scaled(weight, oracle.lower(lower).lower)
    )
    torch.testing.assert_close(got.lower, gradient)

    def moved(in_x, in_y):
        """grad_y psi at the moved point."""
        at = tree.axpy(in_y, u, lower)
        there = LocalOracle(problem, tree.axpy(in_x, towards, upper), oracle.batch, "loop", False)
        return tree.axpy(0.3, there.upper(at).lower, tree.scaled(weight, there.lower(at).lower))

    towards = random_like(upper, 3)
    numeric = tree.scaled(1 / (2 * EPS), tree.axpy(-1.0, moved(0.0, -EPS), moved(0.0, EPS)))
    torch.testing.assert_close(got.lower_product, numeric, atol=1e-5, rtol=1e-4)
    # <towards, (d2 psi / dx dy) u> = d/dt <grad_y psi(x + t towards), u>
    change = tree.axpy(-1.0, moved(-EPS, 0.0), moved(EPS, 0.0))
    torch.testing.assert_close(
        tree.dot(got.upper_product, towards), tree.dot(change, u) / (2 * EPS), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    "name", [name for name in PROBLEMS if name in ("prototype", "ridge", "span")]
)
def test_closed_forms_equal_autograd(name, monkeypatch):
    _, _, oracle, lower = make(name)
    closed = oracle.upper(lower), oracle.lower(lower)
    monkeypatch.setattr(FewShot, "loss_gradient", lambda *_: None)
    for fast, plain in zip(closed, (oracle.upper(lower), oracle.lower(lower)), strict=True):
        torch.testing.assert_close(fast.value, plain.value)
        torch.testing.assert_close(fast.lower, plain.lower)


@pytest.mark.parametrize("name", PROBLEMS)
def test_vmap_equals_loop(name):
    for loss in ("upper", "lower"):
        totals = []
        for task_map in ("loop", "vmap"):
            _, _, oracle, lower = make(name, task_map)
            totals.append(oracle.total(Term(loss, lower)))
        torch.testing.assert_close(totals[0].values, totals[1].values)
        torch.testing.assert_close(totals[0].upper, totals[1].upper)
        torch.testing.assert_close(totals[0].lowers, totals[1].lowers)


@pytest.mark.parametrize("name", ["quadratic", "prototype", "network"])
def test_tasks_do_not_see_each_other(name):
    """A task's loss and gradient are the same alone and in a stack."""
    problem, upper, oracle, lower = make(name)
    stacked = oracle.lower(lower)
    for task in range(oracle.tasks):
        alone = LocalOracle(problem, upper, problem.load([task], 0, "train"), "loop")
        own = alone.lower({k: v[task : task + 1] for k, v in lower.items()})
        torch.testing.assert_close(own.value[0], stacked.value[task])
        torch.testing.assert_close(
            {k: v[0] for k, v in own.lower.items()}, {k: v[task] for k, v in stacked.lower.items()}
        )


@pytest.mark.parametrize("name", ["prototype", "prototype_inductive"])
def test_backbone_runs_once_whatever_the_number_of_inner_steps(name, monkeypatch):
    problem, upper, _, _ = make(name)
    calls = []
    backbone, passes = FewShot._backbone, few_shot.Conv4Passes
    monkeypatch.setattr(
        FewShot, "_backbone", lambda self, *args: calls.append(1) or backbone(self, *args)
    )
    monkeypatch.setattr(
        few_shot,
        "Conv4Passes",
        lambda upper, images, *rest: calls.extend(images) or passes(upper, images, *rest),
    )
    oracle = LocalOracle(problem, upper, problem.load(range(3), 0, "train"), "loop")
    lower = oracle.init_lower()
    for _ in range(10):
        lower = tree.axpy(-0.1, oracle.lower(lower).lower, lower)
    oracle.total(Term("upper", lower), Term("lower", lower, -1.0))
    assert len(calls) == 3  # once per task
