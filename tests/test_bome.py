"""BOME against closed forms, against the paper's step written out plainly, and against its own
identities.
"""

import pytest
import torch
from toy import Bench, attached, one_thread

from bomemeta.core import tree
from bomemeta.problems.analytic import Analytic
from bomemeta.problems.few_shot import FewShot
from bomemeta.solvers.bome import BOME


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def paper_step(problem, x, y, *, steps, alpha, xi, eta, phi):
    """One joint step of the paper's algorithm box on ONE task by plain autograd: a second way to
    the same numbers.
    """
    batch = {k: v[0] for k, v in problem.load([0], 0, "train").items()}

    def losses(x, y):
        return problem.upper_loss({"x": x}, {"y": y}, batch), problem.lower_loss(
            {"x": x}, {"y": y}, batch
        )

    solved = y.clone()
    for _ in range(steps):
        solved = solved.detach().requires_grad_()
        solved = solved - alpha * torch.autograd.grad(losses(x, solved)[1], solved)[0]
    x, y, solved = x.clone().requires_grad_(), y.clone().requires_grad_(), solved.detach()
    f, g = losses(x, y)
    gap = g - losses(x, solved)[1]
    grad_f = torch.cat(
        [
            v.reshape(-1)
            for v in torch.autograd.grad(f, (x, y), materialize_grads=True, allow_unused=True)
        ]
    )
    grad_q = torch.cat([v.reshape(-1) for v in torch.autograd.grad(gap, (x, y))])
    rate = eta * grad_q @ grad_q if phi == "grad_norm" else eta * gap.detach().clamp_min(0)
    multiplier = ((rate - grad_f @ grad_q) / (grad_q @ grad_q)).clamp_min(0)
    moved = torch.cat([x, y]).detach() - xi * (grad_f + multiplier * grad_q)
    return moved[: len(x)], moved[len(x) :], multiplier


@pytest.mark.parametrize("phi", ["grad_norm", "gap"])
@pytest.mark.parametrize("case", ["coreset", "quadratic"])
def test_step_is_the_papers(case, phi):
    problem = attached(Analytic(case=case))
    bench = Bench(
        problem, BOME(inner_steps=3, inner_lr=0.05, lower_lr=0.05, upper_lr=0.05, phi=phi), 20
    )
    bench.advance()
    for _ in range(5):
        x, y = bench.x(), bench.y()
        metrics = bench.advance().metrics
        want_x, want_y, multiplier = paper_step(
            problem, x, y, steps=3, alpha=0.05, xi=0.05, eta=0.5, phi=phi
        )
        torch.testing.assert_close(bench.x(), want_x)
        torch.testing.assert_close(bench.y(), want_y)
        assert metrics["multiplier"] == pytest.approx(float(multiplier))


def test_momentum_moves_x_and_y_like_torchs_sgd():
    problem = attached(Analytic(case="quadratic"))
    plain = BOME(inner_steps=3, lower_lr=0.05, upper_lr=0.05)
    heavy = BOME(
        inner_steps=3,
        lower_lr=0.05,
        upper_lr=0.05,
        upper_optimizer="momentum",
        momentum=0.9,
        lower_momentum=0.9,
    )
    a, b = Bench(problem, plain, 9), Bench(problem, heavy, 9)
    a.advance(), b.advance()
    x1, y1 = b.x(), b.y()
    torch.testing.assert_close((a.x(), a.y()), (x1, y1))  # no velocity yet: the first steps agree
    x0 = torch.cat(list(problem.init_upper(torch.Generator().manual_seed(0)).values()))
    a.advance(), b.advance()
    # v2 = 0.9 v1 + d2 and both took d2 from the same point
    torch.testing.assert_close(b.x() - a.x(), 0.9 * (x1 - x0))
    torch.testing.assert_close(b.y() - a.y(), 0.9 * y1)  # y0 = 0


# lambda's ceiling bounds how near a constant step comes; cosine steps reach the solution to the
# tolerances below.
@pytest.mark.parametrize(
    "start",
    [
        [0.0, 3.0],
        *(
            pytest.param(start, marks=pytest.mark.slow(reason="10 s each, as the first start"))
            for start in ([-3.0, 1.0], [3.5, -1.0])
        ),
    ],
    ids=str,
)
def test_coreset_reaches_the_solution(start):
    problem = attached(Analytic(case="coreset", start=start))
    solver = BOME(
        inner_steps=10,
        inner_lr=0.05,
        lower_lr=0.05,
        upper_lr=0.3,
        lower_schedule="cosine",
        upper_schedule="cosine",
    )
    bench = Bench(problem, solver, 1500)
    metrics = bench.finish()
    weights = torch.softmax(bench.x(), 0)
    torch.testing.assert_close(
        bench.y(), torch.tensor([1.8, 0.4], dtype=torch.float64), atol=0.03, rtol=0
    )
    assert metrics["upper_loss"] == pytest.approx(0.72, abs=0.01)
    torch.testing.assert_close(
        weights[[1, 3]], torch.tensor([0.8, 0.2], dtype=torch.float64), atol=0.01, rtol=0
    )


def test_minimax_reaches_the_origin():
    bench = Bench(
        attached(Analytic(case="minimax")),
        BOME(inner_steps=10, inner_lr=0.05, lower_lr=0.05, upper_lr=0.05),
        900,
    )
    bench.finish()
    assert bench.x().abs().max() < 1e-6
    assert bench.y().abs().max() < 1e-6


@pytest.mark.parametrize(("inner_steps", "eta"), [(1, 0.5), (1, 1.0), (5, 0.2)])
def test_degenerate_reaches_machine_precision(inner_steps, eta):
    solver = BOME(inner_steps=inner_steps, inner_lr=0.5, lower_lr=0.5, upper_lr=0.5, eta=eta)
    bench = Bench(attached(Analytic(case="degenerate")), solver, 800)
    bench.finish()
    # 1e-12: a few hundred roundings at 1
    torch.testing.assert_close(
        torch.cat([bench.x(), bench.y()]), torch.ones(3, dtype=torch.float64), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("barrier", ["global", "per_task"])
def test_quadratic_reaches_the_truncated_solution(barrier):
    """Finite T: the limit is the stationary point of the T-term Neumann hypergradient, not x*. Both
    are known.
    """
    problem = attached(Analytic(case="quadratic", tasks=3, condition=4.0))
    solver = BOME(
        inner_steps=2,
        inner_lr=0.5,
        lower_lr=0.1,
        upper_lr=0.1,
        barrier=barrier,
        lower_schedule="cosine",
        upper_schedule="cosine",
        diagnose_every=0,
    )
    bench = Bench(problem, solver, 600)
    bench.finish()
    truncated, exact = problem.solution((2, 0.5)), problem.solution()
    error = (bench.x() - truncated).norm()
    assert (
        error < 0.1 * (truncated - exact).norm()
    )  # it is the truncated point that is reached, and clearly not the exact one


@pytest.mark.parametrize("barrier", ["global", "per_task"])
@pytest.mark.parametrize("phi", ["grad_norm", "gap"])
def test_repeating_every_task_changes_nothing(barrier, phi):
    problem = attached(Analytic(case="quadratic", tasks=2))
    twice = attached(Analytic(case="quadratic", tasks=4))
    twice._data = {
        name: tensor.repeat(2, *[1] * (tensor.dim() - 1)) for name, tensor in problem._data.items()
    }
    solver = BOME(inner_steps=4, barrier=barrier, phi=phi)
    a, b = Bench(problem, solver, 30), Bench(twice, solver, 30)
    last_a, last_b = a.finish(), b.finish()
    torch.testing.assert_close(a.x(), b.x())
    torch.testing.assert_close((a.y(0), a.y(1)), (b.y(2), b.y(3)))
    assert last_a["multiplier"] == pytest.approx(last_b["multiplier"])
    assert last_a["upper_loss"] == pytest.approx(last_b["upper_loss"])


def test_number_of_shards_changes_rounding_only():
    problem = attached(Analytic(case="quadratic", tasks=5))
    a, b = (Bench(problem, BOME(inner_steps=4), 30, shards=shards) for shards in (1, 3))
    a.finish(), b.finish()
    torch.testing.assert_close(a.x(), b.x())


@pytest.mark.parametrize("inner_steps", [1, 4, 9])
def test_cost_is_inner_steps_plus_three(inner_steps):
    bench = Bench(attached(Analytic(case="quadratic")), BOME(inner_steps=inner_steps), 1)
    assert bench.advance().metrics["gradient_evaluations"] == inner_steps + 3


def test_per_task_and_global_agree_on_one_task_without_an_upper_block():
    """With one task and grad_x q = 0 the two barriers are the same number."""
    problem = attached(Analytic(case="quadratic"))
    problem._data["B"] = torch.zeros_like(problem._data["B"])
    a, b = (
        Bench(problem, BOME(inner_steps=4, barrier=barrier), 20)
        for barrier in ("global", "per_task")
    )
    a.finish(), b.finish()
    torch.testing.assert_close((a.x(), a.y()), (b.x(), b.y()))


def test_pool_larger_than_a_step_keeps_the_others_states():
    problem = attached(Analytic(case="quadratic", tasks=4))
    bench = Bench(problem, BOME(inner_steps=2), 3)
    bench.advance([0, 1])
    first = bench.lower
    bench.lower = first
    result = bench.advance([1, 3])  # 1 has a state, 3 has none: it starts at init_lower
    assert set(result.lower.handles) == {1, 3}
    fresh = Bench(problem, BOME(inner_steps=2), 3)
    fresh.upper.params["x"].copy_(problem.init_upper(torch.Generator().manual_seed(0))["x"])
    assert not torch.equal(torch.tensor(result.lower.handles[1]), torch.tensor(first.handles[1]))


@pytest.mark.parametrize("barrier", ["global", "per_task"])
@pytest.mark.parametrize("phi", ["grad_norm", "gap"])
@pytest.mark.parametrize("head", ["prototype", "ridge", "span"])
def test_fresh_episodes_learn(barrier, phi, head):
    problem = attached(FewShot(ways=3, queries=3, width=8, head=head), dtype=torch.float32)
    inner_lr = (
        0.002 if head == "span" else 0.2
    )  # the span head's curvature goes with the square of the support's Gram matrix
    solver = BOME(
        inner_steps=3, inner_lr=inner_lr, lower_lr=inner_lr, adapt_steps=3, barrier_steps=3, barrier=barrier, phi=phi, upper_lr=0.01,
        upper_optimizer="adam", diagnose_every=5,
    )  # fmt: skip
    bench = Bench(problem, solver, 25)
    losses = [
        bench.advance(range(4 * step, 4 * step + 4)).metrics["upper_loss"] for step in range(25)
    ]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert bench.lower.handles == {}  # nothing of a fresh task stays


@pytest.mark.parametrize("barrier", ["global", "per_task"])
def test_fixed_episodes_keep_their_heads(barrier):
    problem = attached(FewShot(ways=3, queries=3, width=8, fixed_tasks=4), dtype=torch.float32)
    solver = BOME(
        inner_steps=3,
        inner_lr=0.2,
        lower_lr=0.2,
        upper_lr=0.01,
        upper_optimizer="adam",
        barrier=barrier,
    )
    bench = Bench(problem, solver, 25)
    losses = [bench.advance().metrics["upper_loss"] for _ in range(25)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert sorted(bench.lower.handles) == [0, 1, 2, 3]


def test_network_form_learns():
    problem = attached(
        FewShot(ways=3, queries=3, width=8, form="network", regularisation=3.0), dtype=torch.float32
    )
    # The lower problem of this form must nearly be solved before q says anything about x: with 3
    # steps instead of 20 it unlearns.
    solver = BOME(
        inner_steps=10,
        inner_lr=0.1,
        lower_lr=0.1,
        adapt_steps=20,
        upper_lr=0.01,
        upper_optimizer="adam",
    )
    bench = Bench(problem, solver, 15)
    losses = [
        bench.advance(range(4 * step, 4 * step + 4)).metrics["upper_loss"] for step in range(15)
    ]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_direction_of_fresh_episodes_approaches_the_true_hypergradient():
    """Independent oracle: central differences of mean_i f_i(x, argmin g_i(x, .)) along a direction,
    lower problems solved to the end.
    """
    problem = attached(FewShot(ways=3, queries=3, width=4))
    ids = range(3)

    def hyper_objective(upper):
        from bomemeta.core.inner import gradient_steps
        from bomemeta.core.local_oracle import LocalOracle

        oracle = LocalOracle(problem, upper, problem.load(ids, 0, "train"), "loop", False)
        return float(
            oracle.upper(gradient_steps(oracle, oracle.init_lower(), 300, 0.2)).value.mean()
        )

    # eta and many barrier steps bring y near argmin f/lambda + g with a large lambda, where grad_x
    # q is the implicit gradient
    solver = BOME(
        inner_steps=200, inner_lr=0.2, lower_lr=0.02, adapt_steps=200, barrier_steps=200, scale_barrier_steps=False, upper_lr=1.0,
        barrier="per_task",
    )  # fmt: skip
    bench = Bench(problem, solver, 1)
    before = {name: tensor.clone() for name, tensor in bench.upper.params.items()}
    bench.advance(ids)
    step = tree.axpy(
        -1.0, bench.upper.params, before
    )  # upper_lr 1: minus the step is the direction
    eps = 1e-5 / float(tree.dot(step, step).sqrt())
    slope = (
        hyper_objective(tree.axpy(eps, step, before))
        - hyper_objective(tree.axpy(-eps, step, before))
    ) / (2 * eps)
    # d/dt F(x + t d) = <grad F, d> = |d|^2 if d is the hypergradient
    assert slope == pytest.approx(float(tree.dot(step, step)), rel=0.1)
