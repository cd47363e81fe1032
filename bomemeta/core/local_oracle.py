"""The oracle of a stack of tasks in this process: what a worker computes with. Two facts make it
cheap:

* a task's loss depends on its own y_i alone, so ONE backward pass of the summed loss gives every
  grad_{y_i} and the summed grad_x;
* x enters the losses only through `problem.encode`, so the inner loops work on the encoded data
  (cached features) and grad_x is one pull-back through `encode`, however many inner steps there
  were.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bomemeta.core import tree
from bomemeta.core.oracle import (
    Adjoint,
    G,
    Gradient,
    Hessian,
    Oracle,
    Psi,
    System,
    Term,
    Total,
    Unrolled,
)
from bomemeta.core.problem import (
    Batch,
    Encoded,
    Loss,
    LossGradient,
    Problem,
    SharedProblem,
    StreamProblem,
)
from bomemeta.core.randomness import Draws
from bomemeta.core.spans import ENCODE, INNER_LOOP, LOSSES, PULL_BACK, SECOND_ORDER, span
from bomemeta.core.task_map import TaskMap, map_tasks, rows_of
from bomemeta.core.tree import Params


class LocalOracle(Oracle):
    """Answers for a stack of tasks in this process. `differentiable=False` encodes without a graph:
    cheaper, and nothing in x is then available. `draws`: what random numbers of losses that draw
    some follow from (None: tasks 0, 1, ... of step 0).

    `compute_dtype`: what `encode`, the losses and their derivatives are computed in, by torch's
    autocast; x, y, what `encode` returned and all answers keep the problem's type. Closed forms in y
    do too.
    """

    def __init__(
        self,
        problem: Problem,
        upper: Params,
        batch: Batch,
        task_map: TaskMap,
        differentiable: bool = True,
        compute_dtype: torch.dtype | None = None,
        draws: Draws | None = None,
    ) -> None:
        super().__init__(problem, len(next(iter(batch.values()))))
        self.batch = batch
        # What encode and the losses are computed in, and what their answers are in.
        self._types = None if compute_dtype is None else (compute_dtype, problem.dtype)
        self._draws = draws or Draws(problem.seed, 0, "train", range(self.tasks))
        # What follows an encode is small by design (heads on features): vmap on every device.
        # Blocks of a shared problem are few and large.
        self._loss_map: TaskMap = (
            "loop"
            if isinstance(problem, SharedProblem)
            else "vmap"
            if problem.encodes
            else task_map
        )
        # Without an encode of its own x enters the losses whole: it is shared by the tasks and not
        # stacked.
        self._encodes = problem.encodes
        self._leaves = tree.leaves(upper) if differentiable else tree.detached(upper)
        self.x = self._leaves  # for kernels that differentiate by themselves
        with span(ENCODE), torch.set_grad_enabled(differentiable):
            # A closed form goes through the tasks one after the other, which is what `loop` asks
            # for.
            self._encoding = (
                problem.encode_tasks(self._leaves, batch, differentiable)
                if task_map == "loop" and compute_dtype is None
                else None
            )
            if self._encoding is not None:
                self._graph: Encoded = {}
            elif self._encodes:
                self._graph = map_tasks(
                    lambda data: problem.encode(self._leaves, data),
                    (batch,),
                    self.tasks,
                    task_map,
                    self._seeds("encode"),
                    self._types,
                )
            else:
                self._graph = self._leaves
        self.encoded: Encoded = (
            tree.detached(self._graph) if self._encoding is None else self._encoding.encoded
        )

    def init_lower(self) -> Params:
        with torch.no_grad():
            return tree.detached(
                self._over_tasks("init_lower", self.problem.init_lower, self.encoded, lowered=False)
            )

    def gradients(self, *asked: tuple[Loss, Params]) -> list[Gradient]:
        with span(INNER_LOOP):
            return [self._gradient(loss, at) for loss, at in asked]

    def descended(self, start: Params, steps: int, lr: float) -> Params:
        with span(INNER_LOOP):
            closed = self.problem.lower_steps(self.encoded, start, self.batch, steps, lr)
            if closed is None:
                return super().descended(start, steps, lr)
            self.gradient_evaluations += steps
            return closed

    def totals(self, *sums: tuple[Term, ...]) -> list[Total]:
        with span(LOSSES):
            return [self._total(terms) for terms in sums]

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
        with span(SECOND_ORDER):
            return self._adjoint(at, v, terms, weight, right, gradient, residual)

    def _adjoint(
        self,
        at: Params,
        v: Params,
        terms: Psi,
        weight: float | Tensor,
        right: float,
        gradient: bool,
        residual: bool,
    ) -> Adjoint:
        self.gradient_evaluations += (right != 0) + len(terms)
        self.hessian_products += 1
        encoded = self._encoded_leaves()
        leaf = tree.leaves(at)
        losses: list[Loss] = ["upper"] if right != 0 else []
        by_loss = {
            loss: self._values(loss, encoded, leaf)
            for loss in dict.fromkeys([*losses, *(loss for loss, _ in terms)])
        }
        psi = torch.stack([(by_loss[loss] * factor).sum() for loss, factor in terms]).sum()
        grads = torch.autograd.grad(
            psi, list(leaf.values()), create_graph=True, materialize_grads=True
        )
        weighted = tree.scaled(weight, v)
        scalar = -torch.stack(
            [(grad * weighted[name]).sum() for name, grad in zip(leaf, grads, strict=True)]
        ).sum()
        if right != 0:
            scalar = scalar + (by_loss["upper"] * weight).sum() * right
        in_y = list(leaf.values()) if residual else []
        products = torch.autograd.grad(scalar, [*in_y, *encoded.values()], materialize_grads=True)
        return Adjoint(
            by_loss["upper"].detach() if right != 0 else torch.zeros_like(by_loss[terms[0][0]]),
            [by_loss[loss].detach() for loss, _ in terms],
            {name: grad.detach() for name, grad in zip(leaf, grads, strict=True)}
            if gradient
            else {},
            {name: -product for name, product in zip(leaf, products, strict=False)}
            if residual
            else {},
            self._in_x(products[len(in_y) :]),
        )

    def hessian(self, at: Params, rows: Tensor | None = None, terms: Psi = G) -> Hessian:
        """As `Oracle.hessian`. The graph of grad_y psi is made once, here; each product is one
        backward pass through it, without a pull-back through `encode`.
        """
        encoded = self.encoded if rows is None or not self._encodes else rows_of(self.encoded, rows)
        leaf = tree.leaves(at)
        value = torch.stack(
            [(self._values(loss, encoded, leaf, rows) * weight).sum() for loss, weight in terms]
        ).sum()
        grads = torch.autograd.grad(
            value, list(leaf.values()), create_graph=True, materialize_grads=True
        )
        # What is linear in y has a gradient without a graph, and no second derivative.
        curved = {name: grad for name, grad in zip(leaf, grads, strict=True) if grad.requires_grad}
        share = 1.0 if rows is None else len(rows) / self.tasks

        def product(direction: Params) -> Params:
            self.hessian_products += share
            if not curved:
                return tree.zeros_like(direction)
            along = [direction[name] for name in curved]
            with span(SECOND_ORDER):
                products = torch.autograd.grad(
                    list(curved.values()),
                    list(leaf.values()),
                    along,
                    retain_graph=True,
                    materialize_grads=True,
                )
            return dict(zip(leaf, products, strict=True))

        return Hessian(product)

    def system(self, at: Params, direction: Params | None, terms: Psi = G) -> System:
        hessian = self.hessian(at, terms=terms)
        return System(self.upper(at), {} if direction is None else hessian(direction), hessian)

    def unrolled(self, start: Params, steps: int, lr: float) -> Unrolled:
        """As `Oracle.unrolled`, by one backward pass through the graph of all steps: ONE pull-back,
        and memory that grows with `steps`.
        """
        encoded, at = self._encoded_leaves(), tree.leaves(start)
        value = torch.zeros(self.tasks)
        for _ in range(steps):
            value = self._values("lower", encoded, at)
            grads = torch.autograd.grad(
                value.sum(), list(at.values()), create_graph=True, materialize_grads=True
            )
            moved = tree.axpy(-lr, dict(zip(at, grads, strict=True)), at)
            # The projection's own derivative is taken as the identity's, as where it is inactive.
            inside = self.project_lower(tree.detached(moved))
            at = {name: tensor + (inside[name] - tensor.detach()) for name, tensor in moved.items()}
        f = self._values("upper", encoded, at)
        end = self.project_lower(
            tree.detached(at)
        )  # the difference above may have rounded past the edge
        upper = self._in_x(
            torch.autograd.grad(f.sum(), list(encoded.values()), materialize_grads=True)
        )
        self.gradient_evaluations += steps + 1
        self.hessian_products += steps
        return Unrolled(end, f.detach(), value.detach(), upper)

    def update_memory(self, at: Params) -> Params:
        """The problem's new memory, summed over the blocks of the stack."""
        assert isinstance(self.problem, StreamProblem), "no other has memory"
        with torch.no_grad():
            found = self._over_tasks("update_memory", self.problem.update_memory, self.encoded, at)
        return {name: share.sum(0) for name, share in found.items()}

    def evaluate(self, at: Params) -> dict[str, Tensor]:
        with torch.no_grad():
            return self._over_tasks("evaluate", self.problem.evaluate, self.encoded, at)

    def _gradient(self, loss: Loss, at: Params) -> Gradient:
        self.gradient_evaluations += 1
        closed = self.problem.loss_gradient(loss, self.encoded, at, self.batch, False)
        if closed is not None:
            return Gradient(closed.value, closed.lower)
        at = tree.leaves(at)
        value = self._values(loss, self.encoded, at)
        grads = torch.autograd.grad(value.sum(), list(at.values()), materialize_grads=True)
        return Gradient(value.detach(), dict(zip(at, grads, strict=True)))

    def _total(self, terms: tuple[Term, ...]) -> Total:
        self.gradient_evaluations += len(terms)
        closed = [
            self.problem.loss_gradient(term.loss, self.encoded, term.at, self.batch, True)
            for term in terms
        ]
        found = [gradient for gradient in closed if gradient is not None]
        if len(found) == len(terms):
            return self._closed_total(terms, found)
        encoded = self._encoded_leaves()
        ats = [tree.leaves(term.at) if term.in_y else term.at for term in terms]
        values = [self._values(term.loss, encoded, at) for term, at in zip(terms, ats, strict=True)]
        weighted = torch.stack(
            [(value * term.weight).sum() for value, term in zip(values, terms, strict=True)]
        ).sum()
        in_y = [list(at.values()) if term.in_y else [] for term, at in zip(terms, ats, strict=True)]
        inputs = [*encoded.values(), *(tensor for tensors in in_y for tensor in tensors)]
        # Where no gradient in y is wanted and the loss has no x in it, there is nothing to
        # differentiate.
        grads = (
            torch.autograd.grad(weighted, inputs, materialize_grads=True)
            if weighted.requires_grad
            else tuple(torch.zeros_like(tensor) for tensor in inputs)
        )
        rest = iter(grads[len(encoded) :])
        lowers = [
            dict(zip(at, [next(rest) for _ in tensors], strict=False))
            for at, tensors in zip(ats, in_y, strict=True)
        ]
        return Total(
            [value.detach() for value in values], lowers, self._in_x(grads[: len(encoded)])
        )

    def _closed_total(self, terms: tuple[Term, ...], found: list[LossGradient]) -> Total:
        """The total of closed forms: the weights enter here, so there is one pull-back."""
        in_encoded = tree.zeros_like(self._encoded_leaves())
        for term, gradient in zip(terms, found, strict=True):
            for name, grad in tree.scaled(term.weight, gradient.encoded).items():
                in_encoded[name] += grad
        lowers = [
            tree.scaled(term.weight, g.lower) if term.in_y else {}
            for term, g in zip(terms, found, strict=True)
        ]
        return Total(
            [gradient.value for gradient in found], lowers, self._in_x(tuple(in_encoded.values()))
        )

    def _encoded_leaves(self) -> Encoded:
        """What gradients in x are taken in first: what `encode` returned, or x itself."""
        return tree.leaves(self.encoded) if self._encodes else self._leaves

    def _values(
        self, loss: Loss, encoded: Encoded, at: Params, rows: Tensor | None = None
    ) -> Tensor:
        function = self.problem.upper_loss if loss == "upper" else self.problem.lower_loss
        return self._over_tasks(
            loss, lambda e, y, b: {"loss": function(e, y, b)}, encoded, at, rows=rows
        )["loss"]

    def _over_tasks(
        self,
        name: str,
        function: Callable[..., Params],
        encoded: Encoded,
        *stacks: Params,
        lowered: bool = True,
        rows: Tensor | None = None,
    ) -> Params:
        """`function(encoded, *stacks, batch)` of each task of these rows of the stack (None: of all);
        results stacked. `lowered`: in `compute_dtype`.
        """
        batch = self.batch if rows is None else rows_of(self.batch, rows)
        tasks, seeds = len(next(iter(batch.values()))), self._seeds(name, rows)
        types = self._types if lowered else None
        if self._encodes:
            return map_tasks(
                function, (encoded, *stacks, batch), tasks, self._loss_map, seeds, types
            )
        whole, given = (lambda *rest: function(encoded, *rest)), (*stacks, batch)
        return map_tasks(whole, given, tasks, self._loss_map, seeds, types)

    def over_tasks(self, function: Callable[..., Params], *stacks: Params) -> Params:
        """`function(encoded, *stacks, batch)` of each task of the stack; results stacked."""
        return self._over_tasks("kernel", function, self.encoded, *stacks)

    def in_upper(self, stack: Encoded) -> Params:
        """The gradient in x, summed over the tasks, from each task's gradient in what `encode`
        returned (in x itself, where there is no `encode`).
        """
        if self._encodes:
            return self._in_x(tuple(stack[name] for name in self.encoded))
        return {name: rows.sum(0) for name, rows in stack.items()}

    def _seeds(self, name: str, rows: Tensor | None = None) -> Callable[[int], int]:
        """Of a task by its position among `rows`. The same all through a step: one function of x and y."""
        return lambda position: self._draws.seed_of(
            name, position if rows is None else int(rows[position])
        )

    def _in_x(self, cotangent: tuple[Tensor, ...]) -> Params:
        """The gradient in x from that in `_encoded_leaves`."""
        with span(PULL_BACK):
            return self._pulled_back(cotangent)

    def _pulled_back(self, cotangent: tuple[Tensor, ...]) -> Params:
        if not self._encodes:
            return dict(zip(self._leaves, cotangent, strict=True))
        if self._encoding is not None:
            found = self._encoding.pull_back(dict(zip(self.encoded, cotangent, strict=True)))
            return {
                name: found[name] if name in found else torch.zeros_like(leaf)
                for name, leaf in self._leaves.items()
            }
        # Encoded entries that do not depend on x (and x-entries that reach no loss) are legitimate:
        # their share is zero.
        pairs = [
            (out, grad)
            for out, grad in zip(self._graph.values(), cotangent, strict=True)
            if out.requires_grad
        ]
        grads = torch.autograd.grad(
            [out for out, _ in pairs],
            list(self._leaves.values()),
            [grad for _, grad in pairs],
            retain_graph=True,
            materialize_grads=True,
        )
        return dict(zip(self._leaves, grads, strict=True))
