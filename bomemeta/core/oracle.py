"""What a solver may ask about its problem at a fixed x. The mathematics of every solver is written against this.

`LocalOracle` answers for a stack of tasks in this process. Two facts make it cheap:

* a task's loss depends on its own y_i alone, so ONE backward pass of the summed loss gives every grad_{y_i} and the summed grad_x;
* x enters the losses only through `problem.encode`, so the inner loops work on the encoded data (cached features) and grad_x is one
  pull-back through `encode`, however many inner steps there were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bomemeta.core import tree
from bomemeta.core.problem import Batch, BilevelProblem, Encoded
from bomemeta.core.tree import Params

TaskMap = Literal["loop", "vmap"]


class Gradient(NamedTuple):
    """One loss and its gradient in y, per task."""

    value: Tensor  # [B]
    lower: Params  # [B, ...]


class Term(NamedTuple):
    """`weight * loss(x, at)` as a summand; `weight` is a number or one number per task [B]."""

    loss: Literal["upper", "lower"]
    at: Params  # y stack
    weight: float | Tensor = 1.0


class Total(NamedTuple):
    """The gradient of a sum of terms."""

    values: list[Tensor]  # per term, [B], without its weight
    lowers: list[Params]  # per term, grad_y of the weighted term [B, ...]
    upper: Params  # grad_x of the whole sum, summed over tasks


class Adjoint(NamedTuple):
    """The system (d2 psi / dy2) v = grad_y f at one y and one v, and the hypergradient that v makes."""

    upper_value: Tensor  # f, [B]
    values: list[Tensor]  # per term of psi, [B], without its weight
    lower: Params  # grad_y psi [B, ...]
    residual: Params  # (d2 psi / dy2) v - grad_y f [B, ...]
    upper: Params  # grad_x f - (d2 psi / dx dy) v, summed over tasks


class LocalOracle:
    """All questions about a stack of tasks at one x.

    `differentiable=False` encodes without a graph: cheaper, and `total` is then not available.
    `gradient_evaluations` counts evaluations of a gradient of f or g, `hessian_products` those of second-order products, per task
    (a product for one half of the tasks counts 1/2).
    """

    def __init__(
        self, problem: BilevelProblem, upper: Params, batch: Batch, task_map: TaskMap, differentiable: bool = True
    ) -> None:
        self.problem = problem
        self.batch = batch
        self.tasks = len(next(iter(batch.values())))
        self.gradient_evaluations = 0
        self.hessian_products = 0.0
        self._task_map = task_map
        # Without an encode of its own x enters the losses whole: it is shared by the tasks and not stacked.
        self._encodes = problem.encodes
        self._leaves = tree.leaves(upper) if differentiable else tree.detached(upper)
        with torch.set_grad_enabled(differentiable):
            self._graph: Encoded = (
                map_tasks(lambda data: problem.encode(self._leaves, data), (batch,), self.tasks, task_map)
                if self._encodes
                else self._leaves
            )
        self.encoded: Encoded = tree.detached(self._graph)

    def init_lower(self) -> Params:
        """y of tasks that have none yet, [B, ...]."""
        with torch.no_grad():
            return tree.detached(self._over_tasks(self.problem.init_lower, self.encoded))

    def lower(self, at: Params) -> Gradient:
        """g and grad_y g per task. The inner loop: costs one gradient of the loss on the encoded data."""
        closed = self.problem.lower_gradient(self.encoded, at, self.batch)
        return self._count(Gradient(*closed) if closed is not None else self._gradient("lower", at))

    def upper(self, at: Params) -> Gradient:
        """f and grad_y f per task."""
        closed = self.problem.upper_gradient(self.encoded, at, self.batch)
        return self._count(Gradient(*closed) if closed is not None else self._gradient("upper", at))

    def total(self, *terms: Term) -> Total:
        """The gradient of the sum of the terms in every y and in x, with one pull-back through `encode`."""
        self.gradient_evaluations += len(terms)
        encoded = tree.leaves(self.encoded) if self._encodes else self._leaves
        ats = [tree.leaves(term.at) for term in terms]
        values = [self._values(term.loss, encoded, at) for term, at in zip(terms, ats, strict=True)]
        weighted = torch.stack([(value * term.weight).sum() for value, term in zip(values, terms, strict=True)]).sum()
        inputs = [*encoded.values(), *(tensor for at in ats for tensor in at.values())]
        grads = torch.autograd.grad(weighted, inputs, materialize_grads=True)
        cotangent = grads[: len(encoded)]
        rest = iter(grads[len(encoded) :])
        lowers = [{name: next(rest) for name in at} for at in ats]
        upper = self._pull_back(cotangent) if self._encodes else dict(zip(self._leaves, cotangent, strict=True))
        return Total([value.detach() for value in values], lowers, upper)

    def adjoint(
        self, at: Params, v: Params, *terms: tuple[Literal["upper", "lower"], float | Tensor], weight: float | Tensor = 1.0
    ) -> Adjoint:
        """The adjoint system of psi = sum of `(loss, weight)` terms at y = `at`, and the hypergradient at v.

        f - <grad_y psi, v> is a scalar whose gradient in y is minus the residual and whose gradient in x is the hypergradient: one double
        backward and ONE pull-back give both. `weight`, one number or one per task, multiplies
        that scalar: a task's part of the hypergradient, and its residual.
        """
        self.gradient_evaluations += 1 + len(terms)
        self.hessian_products += 1
        encoded = tree.leaves(self.encoded) if self._encodes else self._leaves
        leaf = tree.leaves(at)
        by_loss = {loss: self._values(loss, encoded, leaf) for loss in dict.fromkeys(["upper", *(loss for loss, _ in terms)])}
        psi = torch.stack([(by_loss[loss] * factor).sum() for loss, factor in terms]).sum()
        grads = torch.autograd.grad(psi, list(leaf.values()), create_graph=True, materialize_grads=True)
        weighted = tree.scaled(weight, v)
        along = torch.stack([(grad * weighted[name]).sum() for name, grad in zip(leaf, grads, strict=True)]).sum()
        products = torch.autograd.grad(
            (by_loss["upper"] * weight).sum() - along, [*leaf.values(), *encoded.values()], materialize_grads=True
        )
        cotangent = products[len(leaf) :]
        return Adjoint(
            by_loss["upper"].detach(),
            [by_loss[loss].detach() for loss, _ in terms],
            {name: grad.detach() for name, grad in zip(leaf, grads, strict=True)},
            {name: -product for name, product in zip(leaf, products, strict=False)},
            self._pull_back(cotangent) if self._encodes else dict(zip(self._leaves, cotangent, strict=True)),
        )

    def hessian(
        self,
        at: Params,
        rows: Tensor | None = None,
        terms: Sequence[tuple[Literal["upper", "lower"], float]] = (("lower", 1.0),),
    ) -> Callable[[Params], Params]:
        """(d2 psi / dy2) at y = `at` as a function of the direction: solvers of linear systems take many products at one y.

        psi is the sum of the `(loss, weight)` terms, g if none are given. The graph of grad_y psi is made once, here; each product is one
        backward pass through it, without a pull-back through `encode`.
        `rows`: numbers of the tasks that are meant, where `at` and the directions have only these.
        """
        batch = self.batch if rows is None else _rows(self.batch, rows)
        encoded = self.encoded if rows is None or not self._encodes else _rows(self.encoded, rows)
        leaf = tree.leaves(at)
        value = torch.stack([weight * self._values(loss, encoded, leaf, batch).sum() for loss, weight in terms]).sum()
        grads = torch.autograd.grad(value, list(leaf.values()), create_graph=True, materialize_grads=True)
        # What is linear in y has a gradient without a graph, and no second derivative.
        curved = {name: grad for name, grad in zip(leaf, grads, strict=True) if grad.requires_grad}
        share = 1.0 if rows is None else len(rows) / self.tasks

        def product(direction: Params) -> Params:
            self.hessian_products += share
            if not curved:
                return tree.zeros_like(direction)
            along = [direction[name] for name in curved]
            products = torch.autograd.grad(
                list(curved.values()), list(leaf.values()), along, retain_graph=True, materialize_grads=True
            )
            return dict(zip(leaf, products, strict=True))

        return product

    def project_lower(self, lower: Params) -> Params:
        return self.problem.project_lower(lower)

    def evaluate(self, at: Params) -> dict[str, Tensor]:
        """The problem's figures of merit per task, each [B]."""
        with torch.no_grad():
            return self._over_tasks(self.problem.evaluate, self.encoded, at)

    def _count(self, gradient: Gradient) -> Gradient:
        self.gradient_evaluations += 1
        return gradient

    def _gradient(self, loss: Literal["upper", "lower"], at: Params) -> Gradient:
        at = tree.leaves(at)
        value = self._values(loss, self.encoded, at)
        grads = torch.autograd.grad(value.sum(), list(at.values()), materialize_grads=True)
        return Gradient(value.detach(), dict(zip(at, grads, strict=True)))

    def _values(self, loss: Literal["upper", "lower"], encoded: Encoded, at: Params, batch: Batch | None = None) -> Tensor:
        function = self.problem.upper_loss if loss == "upper" else self.problem.lower_loss
        return self._over_tasks(lambda e, y, data: {"loss": function(e, y, data)}, encoded, at, batch=batch)["loss"]

    def _over_tasks(self, function: Callable[..., Params], encoded: Encoded, *stacks: Params, batch: Batch | None = None) -> Params:
        """`function` of each task of `batch`; None: of every task of the stack."""
        batch = self.batch if batch is None else batch
        tasks = len(next(iter(batch.values())))
        if self._encodes:
            # What follows an encode is small by design (heads on features): vmap on every device.
            return map_tasks(function, (encoded, *stacks, batch), tasks, "vmap")
        return map_tasks(lambda *rest: function(encoded, *rest), (*stacks, batch), tasks, self._task_map)

    def _pull_back(self, cotangent: tuple[Tensor, ...]) -> Params:
        # Encoded entries that do not depend on x (and x-entries that reach no loss) are legitimate: their share is zero.
        pairs = [(out, grad) for out, grad in zip(self._graph.values(), cotangent, strict=True) if out.requires_grad]
        grads = torch.autograd.grad(
            [out for out, _ in pairs],
            list(self._leaves.values()),
            [grad for _, grad in pairs],
            retain_graph=True,
            materialize_grads=True,
        )
        return dict(zip(self._leaves, grads, strict=True))


def map_tasks(function: Callable[..., Params], stacks: tuple[Params, ...], tasks: int, how: TaskMap) -> Params:
    """`function` of each task's slice of the stacks; results stacked.

    `loop` keeps each task's work inside the CPU's cache, `vmap` is one wide call. Both treat the tasks apart (BatchNorm statistics).
    """
    if how == "vmap":
        return torch.vmap(function)(*stacks)
    results = [function(*({name: tensor[i] for name, tensor in stack.items()} for stack in stacks)) for i in range(tasks)]
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def _rows(stack: Params, rows: Tensor) -> Params:
    return {name: tensor[rows] for name, tensor in stack.items()}
