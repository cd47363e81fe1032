"""The oracle of ONE lower variable whose data is spread over blocks: each question goes to every
block, and the answers are averaged.

    f = mean_i f_i(x, y),   g = mean_i g_i(x, y)      over the blocks i = 1..N

So a solver's kernels run unchanged: they see a stack of one task, on the driver, and every question
is one reduce. What a block answers is itself a kernel on its own `LocalOracle`, for which y is
repeated over its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from bomemeta.core.oracle import Adjoint, G, Gradient, Hessian, Oracle, Psi, System, Term, Total
from bomemeta.core.problem import Loss, Problem, SharedProblem
from bomemeta.core.solver import Kernel, KernelResult, LowerGroups, Sums
from bomemeta.core.tree import Params


class Ask(Protocol):
    """Runs a kernel on every block (`first`: on the first one alone), with `sent` as its lower
    groups, and returns the sums' means. `inner`: on the samples of that inner step; None: on the
    step's.
    """

    def __call__(
        self,
        kernel: Kernel,
        sent: Mapping[str, Params],
        first: bool = False,
        inner: int | None = None,
        **arguments: Any,
    ) -> Sums: ...


class ReducedOracle(Oracle):
    """Answers for one shared y as a stack of length one.

    The blocks are stateless: each Hessian product computes its gradient's graph anew, which is not
    counted as an evaluation.
    """

    def __init__(self, problem: Problem, ask: Ask) -> None:
        super().__init__(problem, 1)
        self._ask_blocks = ask
        self._inner: int | None = None

    @contextmanager
    def inner_batch(self, number: int) -> Iterator[None]:
        before = self._inner
        shared = self.problem
        own = isinstance(shared, SharedProblem) and shared.inner_batches
        self._inner = number if own else None
        try:
            yield
        finally:
            self._inner = before

    def _ask(
        self, kernel: Kernel, sent: Mapping[str, Params], first: bool = False, **arguments: Any
    ) -> Sums:
        if self._inner is not None:
            arguments["inner"] = self._inner
        return self._ask_blocks(kernel, sent, first, **arguments)

    def init_lower(self) -> Params:
        return _stacked(self._ask(start, {}, first=True)["y"])

    def gradients(self, *asked: tuple[Loss, Params]) -> list[Gradient]:
        self.gradient_evaluations += len(asked)
        sent, names = _distinct([at for _, at in asked])
        losses = [(loss, name) for (loss, _), name in zip(asked, names, strict=True)]
        sums = self._ask(gradients, sent, losses=losses)
        return [
            Gradient(sums[f"value{i}"][None], _stacked(sums[f"lower{i}"]))
            for i in range(len(asked))
        ]

    def totals(self, *sums: tuple[Term, ...]) -> list[Total]:
        terms = [term for each in sums for term in each]
        self.gradient_evaluations += len(terms)
        sent, names = _distinct([term.at for term in terms])
        rest = iter(names)
        plain = [
            [(term.loss, next(rest), _number(term.weight), term.in_y) for term in each]
            for each in sums
        ]
        means = self._ask(totals, sent, sums=plain)
        found, number = [], 0
        for i, each in enumerate(sums):
            here = range(number, number + len(each))
            number += len(each)
            values = [means[f"value{k}"][None] for k in here]
            lowers = [_stacked(means.get(f"lower{k}", {})) for k in here]
            found.append(Total(values, lowers, means[f"upper{i}"]))
        return found

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
        self.gradient_evaluations += (right != 0) + len(terms)
        self.hessian_products += 1
        plain = [(loss, _number(factor)) for loss, factor in terms]
        scale = _number(weight)
        means = self._ask(
            adjoint,
            _named([at, v]),
            terms=plain,
            weight=scale,
            right=right,
            gradient=gradient,
            residual=residual,
        )
        return Adjoint(
            means["upper_value"][None],
            [means[f"value{k}"][None] for k in range(len(terms))],
            _stacked(means.get("lower", {})),
            _stacked(means.get("residual", {})),
            means["upper"],
        )

    def hessian(self, at: Params, rows: Tensor | None = None, terms: Psi = G) -> Hessian:
        """As `Oracle.hessian`; `rows` can only be the one task there is. One reduce per product or
        projection.
        """

        def product(direction: Params) -> Params:
            self.hessian_products += 1
            return _stacked(
                self._ask(product_of, _named([at, direction]), terms=_plain(terms))["image"]
            )

        def projection(basis: list[Params]) -> Tensor:
            self.hessian_products += len(basis)
            upper: Tensor = self._ask(projected, _named([at, *basis]), terms=_plain(terms))[
                "matrix"
            ]
            matrix = upper.new_zeros(len(basis), len(basis))
            matrix[tuple(torch.triu_indices(len(basis), len(basis)))] = upper
            whole: Tensor = matrix + matrix.triu(1).mT
            return whole[None]

        return Hessian(product, projection)

    def system(self, at: Params, direction: Params | None, terms: Psi = G) -> System:
        if direction is None:
            return System(self.upper(at), {}, self.hessian(at, terms=terms))
        self.gradient_evaluations += 1
        self.hessian_products += 1
        means = self._ask(system, _named([at, direction]), terms=_plain(terms))
        right = Gradient(means["value"][None], _stacked(means["right"]))
        return System(right, _stacked(means["image"]), self.hessian(at, terms=terms))

    def evaluate(self, at: Params) -> dict[str, Tensor]:
        return {name: value[None] for name, value in self._ask(evaluate, _named([at])).items()}


# What the blocks are asked. `lower` is what was sent, repeated over the blocks of the stack; the
# sums are over these.


def start(solver: object, oracle: Oracle, lower: LowerGroups) -> KernelResult:
    """y of a run that has none yet."""
    return KernelResult({"y": _summed(oracle.init_lower())}, {})


def gradients(
    solver: object, oracle: Oracle, lower: LowerGroups, *, losses: list[tuple[Loss, str]]
) -> KernelResult:
    found = oracle.gradients(*((loss, lower[name]) for loss, name in losses))
    values = {f"value{i}": gradient.value.sum() for i, gradient in enumerate(found)}
    return KernelResult(
        values | {f"lower{i}": _summed(gradient.lower) for i, gradient in enumerate(found)}, {}
    )


def totals(
    solver: object,
    oracle: Oracle,
    lower: LowerGroups,
    *,
    sums: list[list[tuple[Loss, str, float, bool]]],
) -> KernelResult:
    answer: Sums = {}
    number = 0
    for i, terms in enumerate(sums):
        total = oracle.total(
            *(Term(loss, lower[name], weight, in_y) for loss, name, weight, in_y in terms)
        )
        answer[f"upper{i}"] = total.upper
        for value, in_y in zip(total.values, total.lowers, strict=True):
            answer[f"value{number}"] = value.sum()
            if in_y:
                answer[f"lower{number}"] = _summed(in_y)
            number += 1
    return KernelResult(answer, {})


def adjoint(
    solver: object,
    oracle: Oracle,
    lower: LowerGroups,
    *,
    terms: list[tuple[Loss, float]],
    weight: float,
    right: float,
    gradient: bool,
    residual: bool,
) -> KernelResult:
    found = oracle.adjoint(
        lower["0"],
        lower["1"],
        *terms,
        weight=weight,
        right=right,
        gradient=gradient,
        residual=residual,
    )
    answer: Sums = {"upper_value": found.upper_value.sum(), "upper": found.upper}
    if gradient:
        answer["lower"] = _summed(found.lower)
    if residual:
        answer["residual"] = _summed(found.residual)
    return KernelResult(
        answer | {f"value{k}": value.sum() for k, value in enumerate(found.values)}, {}
    )


def product_of(solver: object, oracle: Oracle, lower: LowerGroups, *, terms: Psi) -> KernelResult:
    return KernelResult({"image": _summed(oracle.hessian(lower["0"], terms=terms)(lower["1"]))}, {})


def system(solver: object, oracle: Oracle, lower: LowerGroups, *, terms: Psi) -> KernelResult:
    (value, right), image, _ = oracle.system(lower["0"], lower["1"], terms)
    return KernelResult(
        {"value": value.sum(), "right": _summed(right), "image": _summed(image)}, {}
    )


def projected(solver: object, oracle: Oracle, lower: LowerGroups, *, terms: Psi) -> KernelResult:
    at, *basis = lower.values()
    matrix = oracle.hessian(at, terms=terms).projected(basis).sum(0)
    return KernelResult({"matrix": matrix[tuple(torch.triu_indices(len(basis), len(basis)))]}, {})


def evaluate(solver: object, oracle: Oracle, lower: LowerGroups) -> KernelResult:
    return KernelResult(
        {name: value.sum() for name, value in oracle.evaluate(lower["0"]).items()}, {}
    )


# Kernels whose sums over a block are sums over its samples, so that these can be taken apart.
ADDITIVE: frozenset[Kernel] = frozenset((gradients, totals, adjoint, product_of, system, projected))


def _named(stacks: Any) -> dict[str, Params]:
    """Stacks of one under the names 0, 1, ..., without their task axis."""
    return {
        str(i): {name: tensor[0] for name, tensor in stack.items()}
        for i, stack in enumerate(stacks)
    }


def _distinct(stacks: Sequence[Params]) -> tuple[dict[str, Params], list[str]]:
    """As `_named`, but each stack once however often it is asked about; and the name of each."""
    once = list({id(stack): stack for stack in stacks}.values())
    places = {id(stack): str(place) for place, stack in enumerate(once)}
    return _named(once), [places[id(stack)] for stack in stacks]


def _stacked(params: Params) -> Params:
    return {name: tensor[None] for name, tensor in params.items()}


def _summed(stack: Params) -> Params:
    return {name: tensor.sum(0) for name, tensor in stack.items()}


def _number(weight: float | Tensor) -> float:
    return float(weight)


def _plain(terms: Psi) -> Psi:
    return tuple((loss, _number(weight)) for loss, weight in terms)
