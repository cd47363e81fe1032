"""The dynamic barrier against the paper's formulas, and its behaviour where lambda is unbounded."""

import pytest
import torch

from bomemeta.core.barrier import barrier, control, stationarity

SHAPES = [(), (6,)]


def drawn(
    shape: tuple[int, ...], seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A gap and vectors f, q (last axis) with their inner products."""
    generator = torch.Generator().manual_seed(seed)
    f, q = (torch.randn(*shape, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return torch.rand(shape, generator=generator, dtype=torch.float64), f, q, (f * q).sum(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("phi", ["grad_norm", "gap"])
@pytest.mark.parametrize("seed", range(5))
def test_multiplier_is_the_papers(shape, phi, seed):
    gap, _, q, inner = drawn(shape, seed)
    sq_norm = (q * q).sum(-1)
    rate = 0.5 * sq_norm if phi == "grad_norm" else 0.5 * gap
    result = barrier(phi, 0.5, gap, inner, sq_norm)
    torch.testing.assert_close(result.multiplier, ((rate - inner) / sq_norm).clamp_min(0))
    torch.testing.assert_close(result.weights(), result.multiplier)


@pytest.mark.parametrize("seed", range(5))
def test_active_barrier_is_a_projection_plus_eta_grad_q(seed):
    gap, f, q, inner = drawn((), seed)
    sq_norm = q @ q
    if inner >= 0.5 * sq_norm:  # the barrier would rest; against -grad f it must push
        f, inner = -f, -inner
    weight = barrier("grad_norm", 0.5, gap, inner, sq_norm).weights()
    assert weight > 0
    projected = f - (inner / sq_norm) * q
    torch.testing.assert_close(f + weight * q, projected + 0.5 * q)
    # First-order decrease of q per unit step is exactly phi.
    torch.testing.assert_close((f + weight * q) @ q, control("grad_norm", 0.5, gap, sq_norm))


def test_step_stays_bounded_where_the_multiplier_does_not():
    f = torch.tensor([3.0, -4.0], dtype=torch.float64)
    for size in (1e-3, 1e-9, 1e-150):
        q = torch.tensor([-size, size], dtype=torch.float64)
        result = barrier("grad_norm", 0.5, torch.tensor(0.0), f @ q, q @ q)
        assert result.multiplier > 1 / size
        assert (f + result.weights() * q).norm() <= f.norm() + 0.5 * q.norm()


def test_no_force_where_grad_q_is_zero():
    zero = torch.zeros(3, dtype=torch.float64)
    result = barrier("gap", 0.5, torch.ones(3, dtype=torch.float64), zero, zero)
    assert (result.multiplier == 0).all()
    assert (result.weights() == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_stationarity_is_the_least_norm_over_multipliers(seed):
    """|grad f + c grad q|^2 minimised over c >= 0 on a fine grid, an independent way to the same
    number.
    """
    gap, f, q, inner = drawn((), seed)
    k = stationarity(f @ f, gap, inner, q @ q)
    grid = torch.linspace(0, 20, 200_001, dtype=torch.float64)[:, None]
    # the grid's spacing of 1e-4 bounds the error by |q|^2 * 1e-8
    torch.testing.assert_close(k.gradient, ((f + grid * q) ** 2).sum(1).min(), atol=1e-6, rtol=0)
    assert k.gap == gap
