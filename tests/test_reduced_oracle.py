"""One shared lower problem, its data spread over blocks: the same solvers, and the same answers as
for one task.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quadratics import SharedSynthetic, kept, shared, small
from toy import Bench, one_thread

from benchmarks.two_layers import TwoLayers
from bomemeta.core import tree
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.oracle import Oracle, Term
from bomemeta.core.reduced_oracle import ReducedOracle
from bomemeta.core.solver import take_step
from bomemeta.live_bytes import LiveBytes
from bomemeta.solvers.aid_cg import AidCG
from bomemeta.solvers.aid_neumann import AidNeumann
from bomemeta.solvers.amigo_cg import AmigoCG
from bomemeta.solvers.amigo_gd import AmigoGD
from bomemeta.solvers.bome import BOME
from bomemeta.solvers.f2sa import F2SA
from bomemeta.solvers.itd import ITD
from bomemeta.solvers.lancbio import LancBiO
from bomemeta.solvers.sl_bamm import SLBAMM
from bomemeta.solvers.soba import SOBA
from bomemeta.solvers.stocbio import StocBiO
from bomemeta.solvers.subbio import SubBiO
from bomemeta.solvers.vpbgd import VPBGD

X, Y = 4, 12  # numbers in x and y of quadratics.shared
FLOAT = 8  # bytes

SOLVERS = {
    "bome": BOME(inner_steps=5, inner_lr=0.1, lower_lr=0.1, upper_lr=0.1),
    "bome_gap": BOME(
        inner_steps=5, inner_lr=0.1, lower_lr=0.1, upper_lr=0.1, phi="gap", lower_momentum=0.9
    ),
    "bome_per_task": BOME(
        inner_steps=5,
        inner_lr=0.1,
        lower_lr=0.1,
        upper_lr=0.1,
        barrier="per_task",
        diagnose_every=0,
    ),
    "sl_bamm": SLBAMM(schedule="constant", mu=0.1, lower_lr=0.1, upper_lr=0.05),
    "sl_bamm_cauchy": SLBAMM(
        schedule="constant", mu=0.1, lower_lr=0.1, upper_lr=0.05, aux_step="cauchy"
    ),
    "sl_bamm_gauss": SLBAMM(
        schedule="constant",
        mu=0.1,
        lower_lr=0.1,
        upper_lr=0.05,
        order="gauss_seidel",
        aux_step="cauchy",
    ),
    "lancbio": LancBiO(subspace=4, inner_steps=3, inner_lr=0.1, upper_lr=0.1),
    "subbio": SubBiO(inner_steps=3, inner_lr=0.1, aux_lr=0.1, upper_lr=0.1),
    "itd": ITD(inner_steps=5, inner_lr=0.1, upper_lr=0.1),
    "aid_cg": AidCG(inner_steps=3, inner_lr=0.1, aux_steps=4, upper_lr=0.1),
    "aid_neumann": AidNeumann(inner_steps=3, inner_lr=0.1, aux_steps=4, aux_lr=0.1, upper_lr=0.1),
    "stocbio": StocBiO(inner_steps=3, inner_lr=0.1, aux_steps=4, aux_lr=0.1, upper_lr=0.1),
    "amigo_gd": AmigoGD(inner_steps=3, inner_lr=0.1, aux_steps=4, aux_lr=0.1, upper_lr=0.1),
    "amigo_cg": AmigoCG(inner_steps=3, inner_lr=0.1, aux_steps=4, upper_lr=0.1),
    "soba": SOBA(inner_lr=0.1, aux_lr=0.1, upper_lr=0.05),
    "f2sa": F2SA(inner_steps=2, inner_lr=0.1, lower_lr=0.02, penalty=2.0, upper_lr=0.05),
    "vpbgd": VPBGD(inner_steps=2, inner_lr=0.1, lower_lr=0.01, penalty=5.0, upper_lr=0.02),
}


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracles(blocks: int) -> tuple[Oracle, LocalOracle, SharedSynthetic]:
    """The reduced oracle of a problem, and a local one of the same blocks with y repeated, which
    answers for each block.
    """
    problem = shared(blocks)
    x = {"x": normal(X, seed=1)}
    local = LocalOracle(problem, x, problem.load(range(blocks), 0, "train"), "loop")

    def ask(kernel, sent, first=False, **arguments):
        ids = [0] if first else range(blocks)
        oracle = LocalOracle(problem, x, problem.load(ids, 0, "train"), "loop")
        groups = {name: repeated(stack, len(ids)) for name, stack in sent.items()}
        sums = kernel(None, oracle, groups, **arguments).sums
        return {
            name: value / len(ids)
            if isinstance(value, torch.Tensor)
            else tree.scaled(1 / len(ids), value)
            for name, value in sums.items()
        }

    return ReducedOracle(problem, ask), local, problem


def repeated(params, blocks):
    return {name: tensor.expand(blocks, *tensor.shape) for name, tensor in params.items()}


# The questions


@pytest.mark.parametrize("blocks", [1, 3])
def test_gradients_and_totals_are_means_over_the_blocks(blocks):
    reduced, local, _ = oracles(blocks)
    y, z = {"y": normal(1, Y, seed=2)}, {"y": normal(1, Y, seed=3)}
    rows_y, rows_z = (repeated({"y": stack["y"][0]}, blocks) for stack in (y, z))
    for asked, there in (
        (reduced.lower(y), local.lower(rows_y)),
        (reduced.upper(z), local.upper(rows_z)),
    ):
        torch.testing.assert_close(asked.value, there.value.mean()[None])
        torch.testing.assert_close(asked.lower["y"], there.lower["y"].mean(0)[None])
    got = reduced.totals(
        (Term("upper", y),),
        (Term("lower", y, torch.tensor([0.7])), Term("lower", z, -2.0, in_y=False)),
    )
    want = local.totals(
        (Term("upper", rows_y),),
        (Term("lower", rows_y, 0.7), Term("lower", rows_z, -2.0, in_y=False)),
    )
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.upper["x"], theirs.upper["x"] / blocks)
        for value, other in zip(mine.values, theirs.values, strict=True):
            torch.testing.assert_close(value, other.mean()[None])
    torch.testing.assert_close(got[1].lowers[0]["y"], want[1].lowers[0]["y"].mean(0)[None])
    assert got[1].lowers[1] == {} == want[1].lowers[1]
    assert reduced.gradient_evaluations == 2 + 3


@pytest.mark.parametrize("blocks", [1, 3])
def test_second_order_answers_are_means_over_the_blocks(blocks):
    reduced, _, problem = oracles(blocks)
    a, b, c, t = (tensor.mean(0) for tensor in problem._data.values())
    x, y, v, w = normal(X, seed=1), normal(Y, seed=2), normal(Y, seed=3), normal(Y, seed=4)
    stack = [{"y": each[None]} for each in (y, v, w)]
    found = reduced.adjoint(stack[0], stack[1], ("lower", 1.0))
    torch.testing.assert_close(found.lower["y"][0], a @ y - b @ x - c)
    torch.testing.assert_close(found.residual["y"][0], a @ v - (y - t))
    torch.testing.assert_close(found.upper["x"], problem.rho * x + b.mT @ v)
    without = reduced.adjoint(
        stack[0], stack[1], ("lower", 1.0), right=0.0, gradient=False, residual=False
    )
    torch.testing.assert_close(without.upper["x"], b.mT @ v)
    assert without.lower == {} == without.residual
    system = reduced.system(stack[0], stack[1])
    torch.testing.assert_close(system.right.lower["y"][0], y - t)
    torch.testing.assert_close(system.image["y"][0], a @ v)
    torch.testing.assert_close(system.hessian(stack[2])["y"][0], a @ w)
    basis = torch.stack([y, v, w])
    torch.testing.assert_close(system.hessian.projected(stack)[0], basis @ a @ basis.mT)
    assert reduced.hessian_products == 2 + 1 + 1 + 3


def test_y_starts_as_the_first_block_has_it():
    reduced, local, _ = oracles(3)
    assert torch.equal(reduced.init_lower()["y"], local.init_lower()["y"][:1])


def test_metrics_are_means_over_the_blocks():
    reduced, local, _ = oracles(3)
    y = {"y": normal(1, Y, seed=2)}
    want = local.evaluate(repeated({"y": y["y"][0]}, 3))
    torch.testing.assert_close(reduced.evaluate(y)["loss"], want["loss"].mean()[None])


@pytest.mark.parametrize("blocks", [1, 3])
def test_unrolled_backwards_by_products_equals_autograd_through_the_steps(blocks):
    """Two ways to the same gradient: the recursion over kept points on the reduced oracle,
    autograd's graph on the mean problem.
    """
    reduced, _, problem = oracles(blocks)
    a, b, c, t = (tensor.mean(0) for tensor in problem._data.values())
    x, y = normal(X, seed=1).requires_grad_(), normal(Y, seed=2)
    got = reduced.unrolled({"y": y[None]}, 6, 0.05)
    for _ in range(6):
        y = y - 0.05 * (a @ y - b @ x - c)
    loss = ((y - t) ** 2).sum() / 2 + problem.rho / 2 * (x**2).sum()
    torch.testing.assert_close(got.upper["x"], torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(got.at["y"][0], y.detach())


# Whole solvers


@pytest.mark.parametrize("name", SOLVERS)
def test_one_block_is_one_task(name):
    one, block = (Bench(problem, SOLVERS[name], 6) for problem in (small(), shared()))
    for _ in range(6):
        apart, together = one.advance(), block.advance()
        for key in set(apart.metrics) - {"gradient_evaluations", "hessian_products"}:
            assert together.metrics[key] == pytest.approx(
                apart.metrics[key], rel=1e-9, abs=1e-12
            ), key
    torch.testing.assert_close(block.x(), one.x(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(block.y(), one.y(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_costs_are_those_of_one_task(name):
    one, block = (Bench(problem, SOLVERS[name], 3) for problem in (small(), shared(2)))
    for _ in range(3):
        apart, together = one.advance([0]).metrics, block.advance().metrics
    # On the way back the blocks compute the gradient's graph of each of the kept points again.
    again = SOLVERS[name].inner_steps if name == "itd" else 0
    assert together["gradient_evaluations"] == apart["gradient_evaluations"] + again
    assert together.get("hessian_products") == apart.get("hessian_products")


SOLVED = {  # changes, steps, the relative error of x that these were measured to end well below
    "lancbio": ({"upper_lr": 0.5}, 72, 5e-3),
    "subbio": ({"upper_lr": 0.5}, 72, 5e-3),
    "aid_cg": ({"upper_lr": 0.5, "aux_steps": 12}, 70, 1e-2),
    "amigo_cg": ({"upper_lr": 0.5}, 72, 5e-3),
    "amigo_gd": ({"upper_lr": 0.5}, 72, 5e-3),
    "soba": ({"upper_lr": 0.1}, 360, 5e-3),
    "sl_bamm": ({"upper_lr": 0.1, "mu": 0.0}, 360, 5e-3),
    "itd": ({"upper_lr": 1.5, "inner_steps": 40}, 15, 3e-2),
}


@pytest.mark.parametrize("name", SOLVED)
def test_shared_quadratic_is_solved(name):
    changes, steps, error = SOLVED[name]
    problem = shared(2)
    bench = Bench(problem, replace(SOLVERS[name], **changes), steps)
    bench.finish()
    assert problem.error(bench) < error


def test_lower_state_is_one_and_in_the_layout_of_the_groups():
    bench = Bench(shared(3), SOLVERS["lancbio"], 5)
    bench.finish()
    assert list(bench.lower.handles) == [0]
    assert kept(bench)["krylov"]["basis"].shape == (1, 4, Y)


# Traffic: rounds per outer step as in the table of docs/architecture.md; numbers sent to the driver
# by each shard


SHARDS = 2
M = SOLVERS["lancbio"].subspace
TRAFFIC = {  # rounds, numbers beside losses, losses
    "bome": (5 + 1, 5 * Y + 2 * (X + Y), 5 + 3),
    "sl_bamm": (1, 2 * Y + X, 3),
    "sl_bamm_cauchy": (2, 2 * Y + X, 3 + 1),
    "lancbio": (3 + 1 + 1, 3 * Y + 2 * Y + X, 3 + 1 + 2),
    "subbio": (3 + 1 + 1 + 1, 3 * Y + 2 * Y + X, 3 + 1 + 3 + 2),
    "aid_cg": (3 + 4 + 1 + 1, 3 * Y + Y + 4 * Y + X, 3 + 1 + 2),
    "amigo_cg": (3 + (4 + 1) + 1, 3 * Y + 2 * Y + 4 * Y + X, 3 + 1 + 2),
    "amigo_gd": (3 + 4 + 1, 3 * Y + 2 * Y + 3 * Y + X, 3 + 1 + 2),
    "soba": (1, 2 * Y + X, 2),
    "f2sa": (2 + 1, 2 * 3 * Y + (X + 2 * Y), 2 * 3 + 3),
    "vpbgd": (2 + 1, 2 * Y + (X + 2 * Y), 2 + 3),
}


@pytest.mark.parametrize("name", TRAFFIC)
def test_reduces_and_numbers_sent(name):
    solver = SOLVERS[name]
    if hasattr(solver, "residual_every"):
        solver = replace(solver, residual_every=0)
    bench = Bench(shared(3), solver, 100, shards=SHARDS)
    bench.advance()  # the first step asks for y besides, and starts LancBiO's first epoch
    rounds, vectors, losses = TRAFFIC[name]
    for step in range(1, 9):
        run = bench.run(range(3))
        result = take_step(bench.solver, bench.upper, bench.lower, run)
        bench.lower = result.lower
        bench.step += 1
        restart = name == "lancbio" and step % M == 0  # one round more for A v_bar
        assert run.traffic.reduces == rounds + restart
        assert run.traffic.bytes_reduced == FLOAT * SHARDS * (
            vectors + losses + (Y if restart else 0)
        )


@pytest.mark.parametrize("every", [1, 3])
def test_the_residual_costs_y_numbers_in_the_last_round(every):
    bench = Bench(shared(2), replace(SOLVERS["amigo_gd"], residual_every=every), 100, shards=1)
    bench.advance()
    plain = FLOAT * sum(TRAFFIC["amigo_gd"][1:])
    for step in range(1, 5):
        run = bench.run(range(2))
        result = take_step(bench.solver, bench.upper, bench.lower, run)
        bench.lower, bench.step = result.lower, step + 1
        measured = step % every == 0
        assert ("residual" in result.metrics) == measured
        assert run.traffic.bytes_reduced == plain + (FLOAT * Y if measured else 0)


class Counted:
    """A step's rounds, with the names of their kernels."""

    def __init__(self, rounds):
        self._rounds, self.kernels = rounds, []

    def __getattr__(self, name):
        return getattr(self._rounds, name)

    def __call__(self, kernel, *arguments, **more):
        self.kernels.append(kernel.__name__)
        return self._rounds(kernel, *arguments, **more)


def test_one_y_is_measured_and_moved_by_one_kernel():
    bench = Bench(shared(2), SOLVERS["bome"], 2)
    rounds = Counted(bench.run(range(2)))
    take_step(bench.solver, bench.upper, bench.lower, rounds)
    assert rounds.kernels == ["measure_and_move"]


def test_bytes_of_a_step_with_a_large_y():
    problem = TwoLayers(numbers=200_000, batch=4)
    problem.attach(seed=0, dtype=torch.float32, data=None)
    bench = Bench(problem, replace(SOLVERS["bome"], inner_lr=1e-3, lower_lr=1e-3), 3)
    bench.advance()
    (y,) = bench.lower.handles.values()
    with LiveBytes() as live:
        bench.advance()
    # In one process: y, y_T, both again as sent and as received, and two gradients as they come out, are
    # packed and taken apart. 14 where y is sent once for f and once for g.
    assert live.peak < 12.5 * y.nbytes
