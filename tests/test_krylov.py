"""The linear-system updates against dense linear algebra, on stacks of systems. Float64, where
rounding is 1e-16 times the condition.
"""

import pytest
import torch
from toy import one_thread

from bomemeta.core import krylov

FLOOR = 1e-12


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(eigenvalues, tasks=3, seed=0):
    """Matrices [B, n, n] with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    rotation = torch.linalg.qr(normal(tasks, len(values), len(values), seed=seed)).Q
    return rotation @ torch.diag(values) @ rotation.mT


def conditioned(n, condition, tasks=3, seed=0):
    return symmetric(torch.logspace(0, 1, n, base=condition, dtype=torch.float64), tasks, seed)


def times(matrix):
    return lambda rows: (matrix @ rows[..., None])[..., 0]


def linear(matrix, right, start=None):
    image = None if start is None else times(matrix)(start)
    return krylov.LinearSystem(
        right, times(matrix), lambda basis: basis @ matrix @ basis.mT, start, image
    )


def began(matrix, right, v, subspace, length=None):
    """An epoch's start in every task."""
    state = krylov.lanczos(v, subspace)
    length = torch.full_like(state.left, subspace) if length is None else length
    return krylov.restarted(state, state.left == 0, times(matrix)(v), right, length)


def grown(state, matrix, right, reorthogonalise=True, floor=FLOOR):
    state = krylov.extended(state, times(matrix)(krylov.newest(state)), reorthogonalise)
    return krylov.solved(state, right, floor)


def plain_cg(matrix, right, start, steps):
    """Conjugate gradients on ONE system as in any textbook: a second way to the same numbers."""
    v, residual = start.clone(), right - matrix @ start
    direction = residual
    for _ in range(steps):
        step = (residual @ residual) / (direction @ matrix @ direction)
        v, new = v + step * direction, residual - step * (matrix @ direction)
        direction, residual = new + (new @ new) / (residual @ residual) * direction, new
    return v


def energy(matrix, right, v):
    """v'Av/2 - b'v per task."""
    return (v * times(matrix)(v)).sum(1) / 2 - (right * v).sum(1)


# Lanczos


@pytest.mark.parametrize("reorthogonalise", [True, False])
def test_frozen_lanczos_is_cg_restarted_at_the_anchor(reorthogonalise):
    matrix, right, anchor = conditioned(40, 100.0), normal(3, 40, seed=1), normal(3, 40, seed=2)
    state = began(matrix, right, anchor, 10)
    for steps in range(1, 11):
        state = grown(state, matrix, right, reorthogonalise)
        want = torch.stack([plain_cg(matrix[i], right[i], anchor[i], steps) for i in range(3)])
        # In exact arithmetic they are one; ten steps at condition 100 lose no more than this.
        torch.testing.assert_close(state.v, want, atol=1e-10, rtol=1e-10)
    assert (state.left == 0).all()


def test_whole_space_gives_the_dense_solution():
    matrix, right = conditioned(12, 100.0), normal(3, 12, seed=1)
    state = began(matrix, right, normal(3, 12, seed=2), 12)
    for _ in range(12):
        state = grown(state, matrix, right)
    torch.testing.assert_close(state.v, torch.linalg.solve(matrix, right), atol=1e-10, rtol=1e-10)
    basis, tridiagonal = state.basis, torch.diag_embed(state.alpha)
    tridiagonal = (
        tridiagonal
        + torch.diag_embed(state.beta[:, 1:], 1)
        + torch.diag_embed(state.beta[:, 1:], -1)
    )
    torch.testing.assert_close(
        basis @ basis.mT, torch.eye(12, dtype=torch.float64).expand(3, -1, -1), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(basis @ matrix @ basis.mT, tridiagonal, atol=1e-11, rtol=0)


def test_right_hand_side_is_the_present_one():
    """In a space that holds the whole of it, a b that moved during the epoch is answered at once
    and exactly.
    """
    matrix, right = conditioned(8, 10.0), normal(3, 8, seed=1)
    state = began(matrix, right, normal(3, 8, seed=2), 8)
    for _ in range(7):
        state = grown(state, matrix, right)
    moved = normal(3, 8, seed=5)
    torch.testing.assert_close(
        grown(state, matrix, moved).v, torch.linalg.solve(matrix, moved), atol=1e-10, rtol=1e-10
    )


def test_reorthogonalisation_keeps_a_long_epoch_right():
    """Q'(b - w) with a Q that lost its orthogonality: the plain recursion is lost where the other
    has long converged.
    """
    matrix, right = conditioned(80, 100.0), normal(3, 80, seed=1)
    last = {}
    for reorthogonalise in (True, False):
        state = began(matrix, right, normal(3, 80, seed=2), 80)
        for _ in range(80):
            state = grown(state, matrix, right, reorthogonalise)
        last[reorthogonalise] = (times(matrix)(state.v) - right).norm(dim=1)
    # Measured 1e-12 and 200 to 300.
    assert last[True].max() < 1e-9
    assert last[False].min() > 10


def test_epoch_of_one_is_the_cauchy_step():
    """sl-BAMM's step of v with the exact line search: v - |r|^2 / r'Ar r, r = A v - b."""
    matrix, right, v = conditioned(20, 100.0), normal(3, 20, seed=1), normal(3, 20, seed=2)
    residual = times(matrix)(v) - right
    eta = (residual * residual).sum(1) / (residual * times(matrix)(residual)).sum(1)
    torch.testing.assert_close(
        grown(began(matrix, right, v, 1), matrix, right).v, v - eta[:, None] * residual
    )


def test_quadratic_falls_with_every_frozen_step():
    matrix, right = conditioned(30, 1000.0), normal(3, 30, seed=1)
    state = began(matrix, right, normal(3, 30, seed=2), 15)
    values = [energy(matrix, right, state.v)]
    for _ in range(15):
        state = grown(state, matrix, right)
        values.append(energy(matrix, right, state.v))
    assert (torch.stack(values).diff(dim=0) < 0).all()


def test_stack_equals_each_task_alone_with_restarts_at_different_steps():
    """Epochs of 2, 3 and 5 steps in one stack, A and b moving: the fixed-shape basis keeps the
    tasks apart.
    """
    subspace, lengths = 5, torch.tensor([[2.0], [3.0], [5.0]], dtype=torch.float64)

    def run(tasks):
        state = krylov.lanczos(normal(3, 10, seed=2)[tasks], subspace)
        for step in range(14):
            matrix = (conditioned(10, 50.0) + 0.01 * step * conditioned(10, 5.0, seed=9))[tasks]
            right = normal(3, 10, seed=1)[tasks] + 0.02 * step * normal(3, 10, seed=3)[tasks]
            state = krylov.restarted(
                state, state.left == 0, times(matrix)(state.v), right, lengths[tasks]
            )
            state = grown(state, matrix, right)
        return state

    stack = run([0, 1, 2])
    for task in range(3):
        alone = run([task])
        for name, values in stack._asdict().items():
            torch.testing.assert_close(values[[task]], getattr(alone, name), msg=name)
    assert stack.size[:, 0].tolist() == [2, 2, 4]  # 14 steps into epochs of 2, 3 and 5


# Guards


def test_solved_system_keeps_its_solution_and_starts_anew():
    matrix, right = conditioned(8, 10.0), normal(3, 8, seed=1)
    anchor = torch.linalg.solve(matrix, right)
    anchor[1] += 1.0  # the stack's second task is not solved
    state = grown(
        began(
            matrix,
            times(matrix)(anchor).where(torch.tensor([[True], [False], [True]]), right),
            anchor,
            4,
        ),
        matrix,
        right,
    )
    torch.testing.assert_close(state.v[[0, 2]], anchor[[0, 2]], atol=1e-12, rtol=0)
    assert state.left[:, 0].tolist() == [0, 3, 0]
    moved = right + 1.0  # the next epoch has something to do again
    again = krylov.restarted(
        state, state.left == 0, times(matrix)(state.v), moved, torch.full_like(state.left, 4)
    )
    again = grown(again, matrix, moved)
    assert (energy(matrix, moved, again.v) < energy(matrix, moved, state.v)).all()


def test_space_that_cannot_grow_ends_its_epoch():
    """b - w spans three eigenvectors: the third vector makes the space invariant, and the solution
    exact.
    """
    matrix = conditioned(10, 10.0)
    right = torch.linalg.eigh(matrix).eigenvectors[:, :, [1, 4, 8]].sum(2)
    state = began(matrix, right, torch.zeros_like(right), 6)
    for _ in range(3):
        assert (state.left > 0).all()
        state = grown(state, matrix, right)
    assert (state.left == 0).all()
    torch.testing.assert_close(state.v, torch.linalg.solve(matrix, right), atol=1e-12, rtol=1e-10)


def test_singular_direction_is_left_out():
    """A v = b has no solution where b leaves A's range; v stays bounded, and solves what can be
    solved.
    """
    matrix = symmetric([0.0, 1.0, 2.0, 3.0, 4.0])
    right = normal(3, 5, seed=1)
    state = began(matrix, right, torch.zeros_like(right), 5)
    for _ in range(5):
        state = grown(state, matrix, right, floor=1e-6)
    torch.testing.assert_close(
        state.v, times(torch.linalg.pinv(matrix, rtol=1e-9))(right), atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize("smallest", [-0.5, -4.0])
def test_indefinite_matrix_gives_the_solution_of_its_positive_part(smallest):
    """Along a negative eigenvalue the stationary point is a saddle: v keeps the anchor's component
    there.
    """
    matrix, right, anchor = (
        symmetric([smallest, 1.0, 2.0, 3.0]),
        normal(3, 4, seed=1),
        normal(3, 4, seed=2),
    )
    state = began(matrix, right, anchor, 4)
    for _ in range(4):
        state = grown(state, matrix, right, floor=1e-6)
    values, vectors = torch.linalg.eigh(matrix)
    got, start, wanted = (
        (vectors.mT @ rows[..., None])[..., 0] for rows in (state.v, anchor, right)
    )
    torch.testing.assert_close(got, torch.where(values > 0, wanted / values, start))


def test_negative_definite_matrix_keeps_the_anchor():
    matrix, right, anchor = -conditioned(6, 10.0), normal(3, 6, seed=1), normal(3, 6, seed=2)
    state = grown(began(matrix, right, anchor, 3), matrix, right)
    torch.testing.assert_close(state.v, anchor)
    assert (krylov.conjugate_gradients(linear(matrix, right, anchor), 4) == anchor).all()


def test_numbers_that_are_not_finite_come_through():
    """A run that diverges is stopped by the round's check, which must see it; eigh would raise an
    error of its own.
    """
    matrix, right = conditioned(6, 10.0), normal(3, 6, seed=1)
    right[0, 0] = torch.inf
    assert (
        not grown(began(matrix, right, torch.zeros_like(right), 3), matrix, right)
        .v.isfinite()
        .all()
    )


def test_float32_agrees_to_its_rounding():
    matrix, right, v = conditioned(30, 100.0), normal(3, 30, seed=1), normal(3, 30, seed=2)
    states = []
    for dtype in (torch.float64, torch.float32):
        state = began(matrix.to(dtype), right.to(dtype), v.to(dtype), 10)
        for _ in range(10):
            state = grown(state, matrix.to(dtype), right.to(dtype))
        assert {values.dtype for values in state} == {dtype}
        states.append(state.v.double())
    # eps 1e-7 times condition 100, and a little
    torch.testing.assert_close(states[0], states[1], atol=1e-4, rtol=1e-4)


# Conjugate gradients and the plane


def test_cg_equals_the_textbook_and_then_the_dense_solution():
    matrix, right, start = conditioned(12, 30.0), normal(3, 12, seed=1), normal(3, 12, seed=2)
    for steps in (0, 1, 5):
        want = torch.stack([plain_cg(matrix[i], right[i], start[i], steps) for i in range(3)])
        torch.testing.assert_close(
            krylov.conjugate_gradients(linear(matrix, right, start), steps), want
        )
    # 12 steps end it; the others are there to show that a solved task stays where it is
    solution = krylov.conjugate_gradients(linear(matrix, right), 40)
    torch.testing.assert_close(solution, torch.linalg.solve(matrix, right), atol=1e-10, rtol=1e-10)


def test_cg_stops_where_a_singular_system_has_nothing_left_but_its_null_space():
    """b has a part that A cannot reach: the steps in A's range are taken, and none after the next
    direction is all null space.
    """
    matrix, right = (
        torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)).expand(3, 4, 4),
        normal(3, 4, seed=1),
    )
    one, many = (krylov.conjugate_gradients(linear(matrix, right), steps) for steps in (1, 20))
    torch.testing.assert_close(many, one)


def test_cg_of_a_zero_right_hand_side_is_zero():
    matrix, right = conditioned(6, 10.0), normal(3, 6, seed=1)
    right[1] = 0
    v = krylov.conjugate_gradients(linear(matrix, right), 6)
    assert (v[1] == 0).all()
    torch.testing.assert_close(
        v[[0, 2]], torch.linalg.solve(matrix, right)[[0, 2]], atol=1e-10, rtol=1e-10
    )


def test_cg_counts_its_products():
    calls = []
    matrix, right = conditioned(6, 10.0), normal(3, 6, seed=1)

    def product(rows):
        calls.append(1)
        return times(matrix)(rows)

    system = linear(matrix, right)._replace(product=product)
    krylov.conjugate_gradients(system, 4)
    assert len(calls) == 4
    krylov.conjugate_gradients(system.restarted(right), 4)
    assert len(calls) == 9
    krylov.gradient_descent(system, 4, 0.1)
    assert len(calls) == 12
    krylov.gradient_descent(system.restarted(right), 4, 0.1)
    assert len(calls) == 16


def test_gradient_descent_from_zero_is_the_neumann_series():
    matrix, right, v = conditioned(6, 10.0), normal(3, 6, seed=1), normal(3, 6, seed=2)
    kept = torch.eye(6, dtype=torch.float64) - 0.05 * matrix
    series = 0.05 * sum(
        (torch.linalg.matrix_power(kept, i) @ right[..., None])[..., 0] for i in range(7)
    )
    torch.testing.assert_close(krylov.gradient_descent(linear(matrix, right), 7, 0.05), series)
    warm = series + (torch.linalg.matrix_power(kept, 7) @ v[..., None])[..., 0]
    torch.testing.assert_close(krylov.gradient_descent(linear(matrix, right, v), 7, 0.05), warm)


@pytest.mark.parametrize("seed", range(5))
def test_plane_is_as_good_as_a_gradient_step_and_as_staying(seed):
    matrix, right, v = (
        conditioned(20, 100.0, seed=seed),
        normal(3, 20, seed=seed + 10),
        normal(3, 20, seed=seed + 20),
    )
    lr = 0.01  # 1 / (the largest eigenvalue)
    got = krylov.two_dimensional(linear(matrix, right, v), lr, FLOOR)
    stepped = v - lr * (times(matrix)(v) - right)
    assert (energy(matrix, right, got) <= energy(matrix, right, stepped)).all()
    assert (energy(matrix, right, got) < energy(matrix, right, v)).all()
    # The minimiser: no slope along either vector of the plane.
    slope = times(matrix)(got) - right
    for direction in (right, v - lr * times(matrix)(v)):
        assert (
            (slope * direction).sum(1).abs()
            < 1e-10 * slope.norm(dim=1) * direction.norm(dim=1) + 1e-10
        ).all()


def test_plane_that_is_a_line_or_a_point():
    """The rank test: v = 0, v along b for A = I, b = 0, and both 0."""
    eye = torch.eye(6, dtype=torch.float64).expand(4, -1, -1)
    right, v = normal(4, 6, seed=1), normal(4, 6, seed=2)
    v[0], v[1], right[2] = 0, 3 * right[1], 0
    right[3], v[3] = 0, 0
    torch.testing.assert_close(krylov.two_dimensional(linear(eye, right, v), 0.5, FLOOR), right)
    matrix = conditioned(6, 10.0, tasks=4)
    got = krylov.two_dimensional(linear(matrix, right), 0.1, FLOOR)
    scale = (right * right).sum(1) / (right * times(matrix)(right)).sum(1)
    torch.testing.assert_close(got[:2], (scale[:, None] * right)[:2])
    assert (got[2:] == 0).all()
