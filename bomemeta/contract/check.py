"""Checks that a problem keeps the contract of `core/problem.py`, on two small tasks, before a run
starts. What is wrong is said in the user's words: class, method, what was got, what was wanted,
what to do.

The check asks the problem what a worker would ask it, and compares. It leaves the global random
numbers of torch, numpy and Python as they were, and draws none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bomemeta.contract.asking import Asker, equal, first_line, location, randomness_kept, same
from bomemeta.core import tree
from bomemeta.core.problem import (
    Batch,
    Loss,
    Problem,
    SharedProblem,
    Split,
    StreamProblem,
    stream_length,
)
from bomemeta.core.task_map import map_tasks
from bomemeta.core.tree import Params
from bomemeta.errors import BomemetaError, ConfigError

REQUIRED = ("init_upper", "load", "init_lower", "upper_loss", "lower_loss")
LOSSES: tuple[Loss, ...] = ("upper", "lower")
# Relative; a closed form and autograd round differently, and a wrong closed form is far off.
CLOSED_FORM = {torch.float32: 1e-2, torch.float64: 1e-6}


def check_problem(
    problem: Problem,
    *,
    data: Any = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vmap: bool = True,
) -> None:
    """Raises ConfigError at the first thing in which the problem breaks its contract.

    A problem that is not yet attached to a run is checked as a copy, with `data`, `seed` and
    `dtype`. `vmap`: whether its losses must work under `torch.vmap` too, as they do on a GPU, with
    `task_map: vmap`, and wherever the problem has an `encode`; a SharedProblem's need not.
    """
    if isinstance(problem, type):
        raise ConfigError(
            f"check_problem: got the class {problem.__name__}; wanted an object, as in {problem.__name__}()"
        )
    if not isinstance(problem, Problem):
        raise ConfigError(
            f"check_problem: got a {type(problem).__name__}; wanted an object of a class that derives from bomemeta.Problem"
        )
    with randomness_kept(), torch.enable_grad():
        _Check(problem, vmap).run(data, seed, dtype)


def check_at_start(problem: Problem, vmap: bool) -> None:
    """`check_problem` of what a run is about to start with, unless all of it is bomemeta's own,
    which tests check instead. `vmap`: whether the run maps tasks by `torch.vmap`.
    """
    own = [type(part).__module__ for part in (problem, problem.data) if part is not None]
    if not all(module.startswith("bomemeta.") for module in own):
        check_problem(problem, vmap=vmap or problem.encodes)


class _Check(Asker):
    """One problem's check. Methods go from what is asked first to what is asked last."""

    def __init__(self, problem: Problem, vmap: bool) -> None:
        super().__init__(problem)
        self.shared = isinstance(problem, SharedProblem)
        self.vmap = vmap and not self.shared

    def run(self, data: Any, seed: int, dtype: torch.dtype) -> None:
        self.definition()
        if not self.problem.attached:
            self.problem = copy.copy(self.problem)
            self.call("attach", seed=seed, dtype=dtype, data=data)
        ids = self.task_ids()
        upper = self.upper()
        batch = self.batch(ids)
        rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(len(ids))]
        encoded = [self.encoded(upper, row) for row in rows]
        detached = [tree.detached(each) for each in encoded]
        lowers = [self.lower(*each) for each in zip(detached, rows, strict=True)]
        if self.shared and len(lowers) > 1 and not same(*lowers):
            self.wrong("init_lower", "y that depends on the block", "the same y for every block")
        for loss in LOSSES:
            self.loss(loss, detached[0], lowers[0], rows[0])
        self.graphs(upper, lowers[0], rows[0])
        stack = _stacked(lowers)
        self.projections(upper, stack)
        if self.vmap:
            self.mapped(upper, _stacked(detached), stack, batch, len(ids))
        self.closed_forms(_stacked(detached), stack, batch, len(ids))
        self.evaluation(upper, lowers[0], ids)

    def definition(self) -> None:
        kind = type(self.problem)
        missing = [name for name in REQUIRED if getattr(kind, name) is getattr(Problem, name)]
        if issubclass(kind, StreamProblem) and kind.length is StreamProblem.length:
            missing.append("length")
        if missing:
            raise ConfigError(
                f"{kind.__name__}: {', '.join(missing)} missing; a problem must define {', '.join(REQUIRED)}"
                f"{' and length' if 'length' in missing else ''}: see docs/extending.md"
            )
        lower = getattr(self.problem, "lower", None)
        if isinstance(lower, str) and lower != "per_task":
            self.wrong(
                "lower", repr(lower), "no such attribute",
                "derive the class from bomemeta.SharedProblem where all blocks share one y, from bomemeta.Problem where each task "
                "has its own",
            )  # fmt: skip

    def task_ids(self) -> list[int]:
        name = "num_blocks" if self.shared else "num_tasks"
        count = self.attribute(name)
        if callable(count):
            self.wrong(name, "a method", "a property", f"write @property above def {name}")
        whole = isinstance(count, int) and not isinstance(count, bool) and count >= 1
        if not whole and (self.shared or count is not None):
            wanted = "a whole number, 1 or more" + ("" if self.shared else ", or None")
            self.wrong(name, repr(count), wanted)
        if isinstance(self.problem, StreamProblem):
            length = stream_length(self.problem)
            if not isinstance(length, int) or length < 1:
                self.wrong("length", repr(length), "a whole number of steps, 1 or more")
        return [0] if count == 1 else [0, 1]

    def upper(self) -> Params:
        def draw() -> Any:
            return self.call("init_upper", torch.Generator().manual_seed(0))

        x = self.parameters("init_upper", "x", draw())
        if not same(x, draw()):
            self.wrong(
                "init_upper", "another x from the same generator", "every random number from `generator`",
                "pass it on, as in torch.randn(3, generator=generator)",
            )  # fmt: skip
        return tree.detached(x)

    def batch(self, ids: Sequence[int]) -> Batch:
        batch = self.loaded(ids, "train")
        if len(ids) > 1:
            alone = self.loaded(ids[1:], "train")
            apart = {name: tensor[1:] for name, tensor in batch.items()}
            if not same(apart, alone):
                self.wrong(
                    "load", f"other data for task {ids[1]} alone than for it beside task {ids[0]}",
                    "data of a task that depend on (seed, step, split, task id) alone",
                    "make them one task at a time, each from its own id",
                )  # fmt: skip
            if same({name: tensor[:1] for name, tensor in batch.items()}, alone):
                self.wrong(
                    "load", f"the same data for the tasks {ids[0]} and {ids[1]}", "data that follow from task_ids",
                    'read the ids; where all tasks are meant to be alike, give each its id too, as {"task": torch.tensor(list(task_ids))}',
                )  # fmt: skip
        if self.problem.meta_tests:
            for split in ("validation", "test"):
                if same(self.loaded(ids, split), batch):
                    self.wrong(
                        "load", f"the training tasks for split {split!r} too", "other tasks in each split",
                        f"read `split`: what x is tested on must not be what it was trained on (meta_tests is True in {self.name})",
                    )  # fmt: skip
        return batch

    def loaded(self, ids: Sequence[int], split: Split) -> Batch:
        """What `load` gives, twice; the memory of a stream beside it, as a worker adds it."""
        with self.no_randomness("load"):
            first = dict(self.tensors("load", self.call("load", ids, 0, split)))
            kept = {name: tensor.clone() for name, tensor in first.items()}
            again = self.call("load", ids, 0, split)
        for name, tensor in first.items():
            if tensor.dim() == 0 or len(tensor) != len(ids):
                self.wrong(
                    "load", f"{name} of shape {list(tensor.shape)} for {len(ids)} task(s)",
                    f"a leading task axis, [{len(ids)}, ...]", "stack the tasks' tensors with torch.stack",
                )  # fmt: skip
        if not same(kept, again):
            changed = [n for n, t in kept.items() if n not in again or not equal(t, again[n])]
            self.wrong(
                "load", f"other data when it was called again with the same task ids, step and split ({', '.join(changed)})",
                "a pure function of (self.seed, step, split, task id)",
                "take random numbers from a generator that is seeded with these, and keep nothing between calls; else a run depends on "
                "which worker loads what",
            )  # fmt: skip
        memory = self.problem.init_memory() if isinstance(self.problem, StreamProblem) else {}
        return first | {name: t.expand(len(ids), *t.shape) for name, t in memory.items()}

    def encoded(self, upper: Params, row: Batch) -> Params:
        leaves = tree.leaves(upper) if self.problem.encodes else upper
        found = self.tensors("encode", self.watched("encode", leaves, row))
        with torch.no_grad():
            again = self.call("encode", leaves, row)
        if not same(tree.detached(found), again):
            self.wrong(
                "encode", "other values when it was called again", "a pure function of its arguments",
                "torch's global generator will do (it is seeded from seed, step and task); numpy's, Python's and one of your own are not",
            )  # fmt: skip
        return found

    def lower(self, encoded: Params, row: Batch) -> Params:
        with torch.no_grad():
            y = self.parameters("init_lower", "y", self.watched("init_lower", encoded, row))
            again = self.call("init_lower", encoded, row)
        if not same(y, again):
            self.wrong(
                "init_lower", "another y when it was called again", "a pure function of its arguments",
                "take random numbers from torch.Generator().manual_seed(self.seed)",
            )  # fmt: skip
        return {name: tensor.detach().clone() for name, tensor in y.items()}

    def loss(self, which: Loss, encoded: Params, lower: Params, row: Batch) -> None:
        method = f"{which}_loss"
        with torch.no_grad():
            value = self.watched(method, encoded, lower, row)
        if not isinstance(value, Tensor):
            self.wrong(
                method, f"a {type(value).__name__}", "a tensor of shape []",
                "return the tensor itself: .item(), float() and numpy cut its gradient off",
            )  # fmt: skip
        if value.dim() > 0:
            self.wrong(
                method, f"shape {list(value.shape)}", "a scalar, shape []",
                "take .mean() or .sum(): a loss is of ONE task, without the task axis",
            )  # fmt: skip
        if value.dtype != self.problem.dtype:
            self.wrong(
                method, f"a loss in {value.dtype}", f"{self.problem.dtype}, as x and y are",
                "make what `load` gives with .to(self.dtype), but for integers",
            )  # fmt: skip
        if not value.isfinite():
            self.wrong(
                method, f"{float(value)} at the start", "a finite loss",
                "look at log, sqrt, division and norm at x of init_upper and y of init_lower",
            )  # fmt: skip
        with torch.no_grad():
            again = self.call(method, encoded, lower, row)
        if not equal(value, again):
            self.wrong(
                method, f"{float(value)} and then {float(again)} from the same arguments", "a pure function of its arguments",
                "keep nothing between calls",
            )  # fmt: skip

    def graphs(self, upper: Params, lower: Params, row: Batch) -> None:
        """Whether the losses' gradients reach y and x."""
        x, y = tree.leaves(upper), tree.leaves(lower)
        encoded = self.call("encode", x, row)
        reached = False
        for which in LOSSES:
            method = f"{which}_loss"
            value = self.call(method, encoded, y, row)
            inputs = [*y.values(), *x.values()]
            grads: Sequence[Tensor | None] = [None] * len(inputs)
            if value.requires_grad:
                grads = torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=True)
            if which == "lower" and all(grad is None for grad in grads[: len(y)]):
                self.wrong(
                    method, "a loss without a gradient in y", "a function of `lower`",
                    "use the tensors of `lower`, without .item(), .detach(), .data, numpy or torch.no_grad",
                )  # fmt: skip
            reached |= any(grad is not None for grad in grads[len(y) :])
            bad = [n for n, g in zip([*y, *x], grads, strict=True) if g is not None and not g.isfinite().all()]  # fmt: skip
            if bad:
                self.wrong(
                    method, f"a gradient in {bad[0]} that is not finite at the start", "finite numbers",
                    "look at sqrt, norm and division at 0: sqrt and norm have no derivative there",
                )  # fmt: skip
        # The first batch of a stream may have nothing of x in it.
        if not reached and not isinstance(self.problem, StreamProblem):
            self.wrong(
                "upper_loss and lower_loss", "no gradient in x from either", "x in one of them at least",
                "use `encoded` (what encode returned; x itself where there is no encode), without .item(), .detach() or numpy: else x "
                "never moves",
            )  # fmt: skip

    def projections(self, upper: Params, stack: Params) -> None:
        for method, given in (("project_upper", upper), ("project_lower", stack)):
            kept = {name: tensor.clone() for name, tensor in given.items()}
            result = self.tensors(method, self.watched(method, given))
            for name, tensor in kept.items():
                if name not in result or result[name].shape != tensor.shape:
                    got = f"shape {list(result[name].shape)}" if name in result else "nothing"
                    self.wrong(method, f"{got} for {name}", f"shape {list(tensor.shape)}, as given")

    def mapped(self, upper: Params, encoded: Params, stack: Params, batch: Batch, n: int) -> None:
        """The methods for one task under `torch.vmap`."""
        problem = self.problem

        def encode(row: Batch) -> Params:
            return problem.encode(upper, row)

        def one(method: Callable[..., Any], *given: Params) -> Params:
            results = method(encoded, *given) if not problem.encodes else method(*given)
            return {"": results} if isinstance(results, Tensor) else results

        here = (encoded,) if problem.encodes else ()
        if not problem.encodes:
            encoded = upper
        asked: list[tuple[str, Callable[..., Params], tuple[Params, ...]]] = [
            ("encode", encode, (batch,)),
            ("init_lower", lambda *a: one(problem.init_lower, *a), (*here, batch)),
            ("upper_loss", lambda *a: one(problem.upper_loss, *a), (*here, stack, batch)),
            ("lower_loss", lambda *a: one(problem.lower_loss, *a), (*here, stack, batch)),
        ]
        for method, function, stacks in asked[0 if problem.encodes else 1 :]:
            try:
                with torch.no_grad():
                    map_tasks(function, stacks, n, "vmap", lambda position: position)
            except BomemetaError:
                raise
            except Exception as error:
                raise ConfigError(
                    f"{self.name}.{method}: fails under torch.vmap{location(error)}: {first_line(error)}. Wanted plain torch operations: "
                    "no .item(), float() or bool() of a tensor, no branch on a tensor's value, no numpy"
                ) from error

    def closed_forms(self, encoded: Params, stack: Params, batch: Batch, n: int) -> None:
        """`loss_gradient`, where there is one, against autograd."""
        given = encoded if self.problem.encodes else {k: t[0] for k, t in encoded.items()}
        for which in LOSSES:
            closed = self.call("loss_gradient", which, given, stack, batch, False)
            if closed is None:
                continue
            for i in range(n):
                y = tree.leaves({name: tensor[i] for name, tensor in stack.items()})
                row = {name: tensor[i] for name, tensor in batch.items()}
                one = {k: t[i] for k, t in encoded.items()}
                value = self.call(f"{which}_loss", one, y, row)
                grads = torch.autograd.grad(value, list(y.values()), materialize_grads=True)
                pairs = [(closed.lower.get(k), g) for k, g in zip(y, grads, strict=True)]
                for got, wanted in [(closed.value, value.detach()), *pairs]:
                    if got is None or not _near(got[i], wanted, self.problem.dtype):
                        self.wrong(
                            "loss_gradient", f"for {which!r} another value or gradient than autograd takes from {which}_loss",
                            "the same", "correct the closed form, or return None",
                        )  # fmt: skip

    def evaluation(self, upper: Params, lower: Params, ids: Sequence[int]) -> None:
        tested = self.shared or self.problem.meta_tests
        batch = self.loaded(ids, "test" if tested else "train")
        row = {name: tensor[0] for name, tensor in batch.items()}
        with torch.no_grad():
            encoded = self.call("encode", upper, row)
            if self.problem.meta_tests:  # sizes may differ from training's
                lower = self.call("init_lower", encoded, row)
            metrics = self.watched("evaluate", encoded, lower, row)
            again = self.call("evaluate", encoded, lower, row)
        if not isinstance(metrics, Mapping):
            self.wrong("evaluate", f"a {type(metrics).__name__}", "a dict of names and tensors []")
        for name, value in metrics.items():
            if not isinstance(value, Tensor):
                self.wrong(
                    "evaluate", f"{name}: a {type(value).__name__}", "a tensor of shape []",
                    "return tensors; no .item()",
                )  # fmt: skip
            if value.dim() > 0:
                self.wrong(
                    "evaluate", f"{name} of shape {list(value.shape)}", "one number per task, shape []",
                    "evaluate is asked of ONE task: take a mean over its samples",
                )  # fmt: skip
        if not same(dict(metrics), again):
            self.wrong(
                "evaluate", "other values when it was called again", "a pure function of its arguments",
                "torch's global generator will do (it is seeded from seed, step and task); numpy's, Python's and one of your own are not",
            )  # fmt: skip


def _stacked(rows: Sequence[Params]) -> Params:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _near(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    if got.shape != wanted.shape:
        return False
    tolerance = CLOSED_FORM.get(dtype, 1e-2)
    return float((got - wanted).norm()) <= tolerance * (1 + float(wanted.norm()))
