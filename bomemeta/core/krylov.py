"""Ways to (nearly) solve A v = b, A = d2g/dy2, for a stack of B tasks at once; vectors are rows [B,
n].

A `LinearSystem` has b, A as a product, and the v to start from, which is what an update carries
from one outer step to the next:

    gradient_descent(system, steps, lr) -> v         v - lr (A v - b), so many times; from 0 a truncated Neumann series
    conjugate_gradients(system, steps) -> v          the best v of the Krylov space of so many steps
    two_dimensional(system, lr, floor) -> v          SubBiO: the best v in span{b, (I - lr A) v}
    restarted, extended, solved: Lanczos -> Lanczos  LancBiO: a basis that grows by one vector per outer step

Tasks are at different places of their epochs, so the basis has a fixed shape and its empty rows are
0: a zero row makes a zero row of the projected matrix, a Ritz value 0, and those are left out of
every solution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # u -> A u, [B, n] to [B, n]


class LinearSystem(NamedTuple):
    """A v = b at one point, and where to start."""

    right: Tensor  # b [B, n]
    product: Product
    projected: Callable[[Tensor], Tensor]  # [B, k, n] to the matrix u_i'A u_j, [B, k, k]
    start: Tensor | None = None  # v [B, n]; None: 0
    image: Tensor | None = None  # A times `start`, given with it

    def restarted(self, v: Tensor) -> LinearSystem:
        """The same system to be started from v: one product."""
        return self._replace(start=v, image=self.product(v))

    def begin(self) -> tuple[Tensor, Tensor]:
        """v and A v to start from."""
        if self.start is None or self.image is None:
            return torch.zeros_like(self.right), torch.zeros_like(self.right)
        return self.start, self.image


# What is left of a vector after it was made orthogonal to others is rounding below this many units
# of it; 100 leaves room for the sums over n numbers that the rounding comes from.
_ROUNDING_UNITS = 100


class Lanczos(NamedTuple):
    """One Lanczos process per task. Every field has a leading task axis and one more, so that it
    can be a lower group.
    """

    v: Tensor  # [B, n] the solution of the last step
    anchor: Tensor  # [B, n] v_bar: v when the epoch began
    image: Tensor  # [B, n] w = A v_bar, with the A of that time
    basis: Tensor  # [B, m, n] orthonormal rows q_1, q_2, ...; the newest is row `size`
    alpha: Tensor  # [B, m] diagonal of T
    # [B, m] beta[:, j] couples q_j and q_{j+1} (rows j - 1 and j of the basis); beta[:, 0] = 0
    beta: Tensor
    # [B, 1] steps taken in this epoch: the size of T. 0 between steps: the task was never here
    size: Tensor
    left: Tensor  # [B, 1] steps until the epoch ends. 0: restart


def lanczos(v: Tensor, subspace: int) -> Lanczos:
    """The state of tasks that were never here: all zeros but for `v`, and a restart due."""
    tasks, n = v.shape
    rows, numbers = v.new_zeros(tasks, subspace), v.new_zeros(tasks, 1)
    return Lanczos(
        v,
        torch.zeros_like(v),
        torch.zeros_like(v),
        v.new_zeros(tasks, subspace, n),
        rows,
        rows,
        numbers,
        numbers,
    )


def restarted(state: Lanczos, due: Tensor, image: Tensor, right: Tensor, length: Tensor) -> Lanczos:
    """A new epoch of `length` [B, 1] steps (at most m) where `due` [B, 1]: v_bar = v, w = `image` =
    A v, q_1 = (b - w) / |b - w|.

    Where b = w to rounding, v_bar is the solution and there is no q_1: `extended` then finds
    nothing to continue with, and ends the epoch after its first step.
    """
    residual = right - image
    known = _norm(residual) > _rounding(right) * (_norm(right) + _norm(image))
    basis = torch.cat(
        [_unit(residual, known)[:, None], torch.zeros_like(state.basis[:, 1:])], dim=1
    )
    rows, numbers = torch.zeros_like(state.alpha), torch.zeros_like(state.size)
    new = Lanczos(state.v, state.v, image, basis, rows, rows, numbers, length.to(numbers))
    masks = (due[..., None] if old.dim() == 3 else due for old in state)
    return Lanczos(
        *(torch.where(mask, fresh, old) for mask, fresh, old in zip(masks, new, state, strict=True))
    )


def newest(state: Lanczos) -> Tensor:
    """q_j, the vector whose product with A `extended` wants, [B, n]. Of no meaning where a restart
    is due.
    """
    index = (
        state.size.long()
        .clamp_max(state.basis.shape[1] - 1)[..., None]
        .expand(-1, 1, state.basis.shape[2])
    )
    return state.basis.gather(1, index)[:, 0]


def extended(state: Lanczos, image: Tensor, reorthogonalise: bool) -> Lanczos:
    """One Lanczos step in every task, `image` = A q_j: T grows by one row, the basis by q_{j+1}
    unless the epoch ends.

        u = A q_j - beta_j q_{j-1};  alpha_j = q_j'u;  omega = u - alpha_j q_j;  beta_{j+1} = |omega|;  q_{j+1} = omega / beta_{j+1}

    Source: Gao, Yang, Yuan, LancBiO, ICLR 2025. The recurrence alone loses orthogonality, all the
    sooner as A changes from step to step; `reorthogonalise` takes omega's components along the
    whole basis out. Where nothing of omega is left the space cannot grow, and the epoch ends.
    """
    here = state.size.long()
    location = torch.arange(state.alpha.shape[1], device=here.device)
    at, before, after = (location == here + shift for shift in (0, -1, 1))
    current = newest(state)
    coupling = torch.where(at, state.beta, 0).sum(1, keepdim=True)  # beta_j, 0 for q_1
    u = image - _combine(state.basis, coupling * before)
    alpha = _dot(current, u)
    omega = u - alpha * current
    if reorthogonalise:
        # Twice: what the first pass leaves of a vector that nearly lay in the space is mostly the
        # first pass's rounding.
        for _ in range(2):
            omega = omega - _combine(state.basis, _components(state.basis, omega))
    beta = _norm(omega)
    lost = beta <= _rounding(image) * _norm(image)
    new_row = after & ~lost
    return state._replace(
        basis=torch.where(new_row[..., None], _unit(omega, ~lost)[:, None], state.basis),
        alpha=torch.where(at, alpha, state.alpha),
        beta=torch.where(new_row, beta, state.beta),
        size=state.size + 1,
        left=torch.where(lost, 0, state.left - 1),
    )


def solved(state: Lanczos, right: Tensor, floor: float) -> Lanczos:
    """v = v_bar + Q T^-1 Q'(b - w) with the present b, in the `size` vectors whose row of T is
    known.

    Ritz pairs at or below `floor` times the largest are left out (v keeps v_bar's components
    there).
    """
    # The newest vector may be in the basis without a row in T.
    known = torch.arange(state.alpha.shape[1], device=right.device) < state.size
    off = torch.where(known, state.beta, 0)[:, 1:]
    matrix = torch.diag_embed(state.alpha) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    components = torch.where(known, _components(state.basis, right - state.image), 0)
    return state._replace(
        v=state.anchor + _combine(state.basis, ritz_solution(matrix, components, floor))
    )


def ritz_solution(matrix: Tensor, right: Tensor, floor: float) -> Tensor:
    """matrix^-1 right for symmetric [B, k, k] and [B, k], over the eigenvalues above `floor` times
    the largest one's size.

    In float64 on the host, whatever the problem's type: the inverse amplifies what is lost, and k
    is small. Numbers that are not finite come back as NaN, for the round to refuse.
    """
    small, wanted = (
        matrix.detach().to("cpu", torch.float64),
        right.detach().to("cpu", torch.float64),
    )
    if not (small.isfinite().all() and wanted.isfinite().all()):
        return torch.full_like(right, torch.nan)
    values, vectors = torch.linalg.eigh(small)
    kept = values > floor * values.abs().amax(1, keepdim=True)
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1), 0)
    return _combine(vectors.mT, inverse * _components(vectors.mT, wanted)).to(right)


def gradient_descent(system: LinearSystem, steps: int, lr: float) -> Tensor:
    """v after `steps` steps v - lr (A v - b): `steps` - 1 products, the first step's being known.
    From v = 0 the result is the Neumann series lr sum_{i < steps} (I - lr A)^i b.
    """
    v, image = system.begin()
    for step in range(steps):
        if step > 0:
            image = system.product(v)
        v = v - lr * (image - system.right)
    return v


def conjugate_gradients(system: LinearSystem, steps: int) -> Tensor:
    """v after `steps` steps of conjugate gradients.

    A task stops where its residual is rounding, and where a direction has no positive curvature, or
    none but rounding: A is not definite or singular, and the step would lead away from every
    solution.
    """
    v, image = system.begin()
    right, product, residual = system.right, system.product, system.right - image
    direction, square = residual, _dot(residual, residual)
    least = torch.finfo(right.dtype).eps ** 2 * _dot(right, right)
    largest = torch.zeros_like(square)  # curvature met so far, of a direction of length 1
    for _ in range(steps):
        image = product(direction)
        curvature, length = _dot(direction, image), _dot(direction, direction)
        largest = torch.maximum(
            largest, torch.where(length > 0, curvature / torch.where(length > 0, length, 1), 0)
        )
        goes = (curvature > _rounding(right) * largest * length) & (square > least)
        step = torch.where(goes, square / torch.where(goes, curvature, 1), 0)
        v = v + step * direction
        residual = residual - step * image
        before, square = square, _dot(residual, residual)
        ratio = torch.where(goes, square / torch.where(goes, before, 1), 0)
        # A task that stopped keeps a zero direction: no later step of its neighbours moves it
        # again.
        direction = torch.where(goes, residual + ratio * direction, 0)
    return v


def two_dimensional(system: LinearSystem, lr: float, floor: float) -> Tensor:
    """The minimiser of u'Au/2 - b'u over span{b, (I - lr A) v}, with two products more. At least as
    good as v - lr (A v - b).

    Source: Gao, Yang, Yuan, SubBiO, ICLR 2025. An orthonormal basis by Gram-Schmidt; a vector that
    depends on the other, or is 0, is left out (rank test), and so are Ritz pairs at or below
    `floor` times the largest.
    """
    v, image = system.begin()
    first = _unit(system.right, _norm(system.right) > 0)
    moved = v - lr * image
    second = moved
    for _ in range(2):
        second = second - _dot(first, second) * first
    second = _unit(second, _norm(second) > _rounding(moved) * _norm(moved))
    basis = torch.stack([first, second], dim=1)
    matrix = system.projected(basis)
    return _combine(
        basis, ritz_solution((matrix + matrix.mT) / 2, _components(basis, system.right), floor)
    )


def _components(basis: Tensor, vector: Tensor) -> Tensor:
    """Inner products with the rows of the basis, [B, k, n] and [B, n] to [B, k]."""
    return (basis @ vector[..., None])[..., 0]


def _combine(basis: Tensor, coefficients: Tensor) -> Tensor:
    """The sum of the rows with these coefficients, [B, k, n] and [B, k] to [B, n]."""
    return (coefficients[:, None] @ basis)[:, 0]


def _unit(vector: Tensor, where: Tensor) -> Tensor:
    """vector / |vector| per row, and 0 where not `where` [B, 1]."""
    return torch.where(where, vector / torch.where(where, _norm(vector), 1), 0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)


def _norm(vector: Tensor) -> Tensor:
    norm: Tensor = vector.norm(dim=1, keepdim=True)
    return norm


def _rounding(like: Tensor) -> float:
    return _ROUNDING_UNITS * torch.finfo(like.dtype).eps
