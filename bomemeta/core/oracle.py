"""What a solver may ask about its problem at a fixed x. The mathematics of every solver is written
against `Oracle`:

`core/local_oracle.py`    answers for a stack of tasks in this process `core/reduced_oracle.py`
answers for one shared lower problem by asking the blocks that its data is spread over
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from bomemeta.core import tree
from bomemeta.core.problem import Loss, Problem
from bomemeta.core.tree import Params

Psi = tuple[tuple[Loss, float | Tensor], ...]  # a weighted sum of the two losses
G: Psi = (("lower", 1.0),)


class Gradient(NamedTuple):
    """One loss and its gradient in y, per task."""

    value: Tensor  # [B]
    lower: Params  # [B, ...]


class Term(NamedTuple):
    """`weight * loss(x, at)` as a summand; `weight` is a number or one number per task [B]."""

    loss: Loss
    at: Params  # y stack
    weight: float | Tensor = 1.0
    in_y: bool = True  # whether its gradient in y is wanted


class Total(NamedTuple):
    """The gradient of a sum of terms."""

    values: list[Tensor]  # per term, [B], without its weight
    lowers: list[Params]  # per term, grad_y of the weighted term [B, ...]; empty where not wanted
    upper: Params  # grad_x of the whole sum, summed over tasks


class Hessian:
    """A = d2 psi / dy2 at one y, for a stack of tasks: `hessian(direction)` is A times a stack of
    directions.
    """

    def __init__(
        self,
        product: Callable[[Params], Params],
        projected: Callable[[list[Params]], Tensor] | None = None,
    ) -> None:
        self._product, self._projected = product, projected

    def __call__(self, direction: Params) -> Params:
        return self._product(direction)

    def projected(self, basis: list[Params]) -> Tensor:
        """The matrix u_i'A u_j of the stacks u_1..u_k, [B, k, k]: k products, and k (k + 1) / 2
        numbers to send where y is shared.
        """
        if self._projected is not None:
            return self._projected(basis)
        images = [self._product(vector) for vector in basis]
        return torch.stack(
            [torch.stack([tree.dot_tasks(u, image) for image in images], 1) for u in basis], 1
        )


class System(NamedTuple):
    """A v = b, A = d2 psi / dy2 and b = grad_y f, at one y."""

    right: Gradient  # f and b
    image: Params  # A times what was asked; empty where nothing was
    hessian: Hessian


class Unrolled(NamedTuple):
    """T gradient steps on g and the gradient of f at their end, through the steps. A start's
    dependence on x is not followed.
    """

    at: Params  # y_T [B, ...]
    upper_value: Tensor  # f at y_T, [B]
    lower_value: Tensor  # g at the last point but y_T, [B]
    upper: Params  # d f(x, y_T(x)) / dx, summed over tasks


class Adjoint(NamedTuple):
    """The system (d2 psi / dy2) v = right * grad_y f at one y and one v, and the hypergradient that
    v makes.
    """

    upper_value: Tensor  # f, [B]
    values: list[Tensor]  # per term of psi, [B], without its weight
    lower: Params  # grad_y psi [B, ...]; empty where not wanted
    residual: Params  # (d2 psi / dy2) v - right * grad_y f [B, ...]; empty where not wanted
    upper: Params  # right * grad_x f - (d2 psi / dx dy) v, summed over tasks


class Oracle(ABC):
    """All questions about a stack of `tasks` tasks at one x; a shared lower problem is a stack of
    one.

    `gradient_evaluations` counts evaluations of a gradient of f or g, `hessian_products` those of
    second-order products, per task (a product for one half of the tasks counts 1/2). One question
    is one reduce where the lower problem is shared: what `gradients`, `totals` and `system` are
    asked together is answered together.
    """

    def __init__(self, problem: Problem, tasks: int) -> None:
        self.problem = problem
        self.tasks = tasks
        self.gradient_evaluations = 0
        self.hessian_products = 0.0

    @contextmanager
    def inner_batch(self, number: int) -> Iterator[None]:
        """Inside, what is asked is answered on the samples of inner step `number`, counted from 0,
        where the problem draws such (`SharedProblem.inner_batches`). Elsewhere all questions of a
        step are about the step's one batch.
        """
        yield

    @abstractmethod
    def init_lower(self) -> Params:
        """y of tasks that have none yet, [B, ...]."""

    @abstractmethod
    def gradients(self, *asked: tuple[Loss, Params]) -> list[Gradient]:
        """Losses and their gradients in y, each at its own y stack: the inner loops, without a
        pull-back through `encode`.
        """

    @abstractmethod
    def totals(self, *sums: tuple[Term, ...]) -> list[Total]:
        """For each sum of terms its gradient in every y and in x, with one pull-back through
        `encode` per sum.
        """

    @abstractmethod
    def adjoint(
        self,
        at: Params,
        v: Params,
        *terms: tuple[Loss, float | Tensor],
        weight: float | Tensor = 1.0,
        right: float = 1.0,
        gradient: bool = True,
        residual: bool = True,
    ) -> Adjoint:
        """The adjoint system of psi = sum of `(loss, weight)` terms at y = `at`, and the
        hypergradient at v.

        right * f - <grad_y psi, v> is a scalar whose gradient in y is minus the residual and whose
        gradient in x is the hypergradient: one double backward and ONE pull-back give both.
        `weight`, one number or one per task, multiplies that scalar: a task's part of the
        hypergradient, and its residual. `right` 0 leaves f out; `gradient`: grad_y psi is wanted,
        `residual`: the residual is.
        """

    @abstractmethod
    def hessian(self, at: Params, rows: Tensor | None = None, terms: Psi = G) -> Hessian:
        """(d2 psi / dy2) at y = `at`: solvers of linear systems take many products at one y.

        psi is the sum of the `(loss, weight)` terms, g if none are given. `rows`: numbers of the
        tasks that are meant, where `at` and the directions have only these.
        """

    @abstractmethod
    def system(self, at: Params, direction: Params | None, terms: Psi = G) -> System:
        """The system whose solution makes the hypergradient: b, and A times `direction` if one is
        given, in one question.
        """

    @abstractmethod
    def evaluate(self, at: Params) -> dict[str, Tensor]:
        """The problem's metrics per task, each [B]."""

    def lower(self, at: Params) -> Gradient:
        """g and grad_y g per task. The inner loop: costs one gradient of the loss on the encoded
        data.
        """
        return self.gradients(("lower", at))[0]

    def upper(self, at: Params) -> Gradient:
        """f and grad_y f per task."""
        return self.gradients(("upper", at))[0]

    def total(self, *terms: Term) -> Total:
        """The gradient of the sum of the terms in every y and in x."""
        return self.totals(terms)[0]

    def descended(self, start: Params, steps: int, lr: float) -> Params:
        """y after `steps` projected gradient steps of size `lr` on g from `start`, each task its
        own, each step on its own inner batch.
        """
        at = start
        for number in range(steps):
            with self.inner_batch(number):
                at = self.project_lower(tree.axpy(-lr, self.lower(at).lower, at))
        return at

    def unrolled(self, start: Params, steps: int, lr: float) -> Unrolled:
        """`steps` gradient steps of size `lr` on g from `start`, and the gradient of f through
        them, by the recursion

            l = grad_y f(y_T),  dx = grad_x f(y_T);    for t = T-1..0, at y_t:    dx -= lr (d2g/dxdy) l,  l -= lr (d2g/dy2) l

        with the points of the trajectory kept and everything at them computed anew, on the samples
        that the step had. Projections are taken as inactive.
        """
        points, value = [start], torch.zeros(self.tasks)
        for number in range(steps):
            with self.inner_batch(number):
                g = self.lower(points[-1])
            value = g.value
            points.append(self.project_lower(tree.axpy(-lr, g.lower, points[-1])))
        f = self.total(Term("upper", points[-1]))
        back, direction = f.lowers[0], f.upper
        for number in reversed(range(steps)):
            with self.inner_batch(number):
                step = self.adjoint(points[number], back, *G, right=0.0)
            direction = tree.axpy(lr, step.upper, direction)
            back = tree.axpy(-lr, step.residual, back)
        return Unrolled(points[-1], f.values[0], value, direction)

    def project_lower(self, lower: Params) -> Params:
        return self.problem.project_lower(lower)
