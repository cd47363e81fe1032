"""What MAML and its kin share: few-shot baselines that adapt a network to each episode with
learn2learn's algorithms.

    y_i = x after `inner_steps` gradient steps of size `inner_lr` on CE(support_i; y)
    x  <- x - upper_lr mean_i d_i,    d_i = grad_x CE(queries_i; y_i(x)) or what the algorithm puts in its place

x is a whole network, `problem.form: network` of few_shot, and both losses are the plain
cross-entropy: the proximal term of that problem's lower loss, and so `problem.regularisation`,
plays no part. BatchNorm statistics are the problem's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, cast, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bomemeta.core import tree
from bomemeta.core.implicit import move_upper
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.oracle import Oracle
from bomemeta.core.problem import Batch, Problem, SharedProblem
from bomemeta.core.solver import KernelResult, LowerGroups, LowerStates, Run, StepResult
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.errors import ConfigError
from bomemeta.l2l import learn2learn
from bomemeta.solvers.upper_options import UpperOptions

Positive = Annotated[float, Field(gt=0)]
Steps = Annotated[int, Field(ge=1)]


@runtime_checkable
class NetworkProblem(Protocol):
    """What a problem must offer: its network in two parts, for one task. The parameters are entries
    of x, or of y in their place.
    """

    head_names: ClassVar[
        tuple[str, ...]
    ]  # the entries that `logits` reads; the others are the backbone's

    def support_features(self, params: Params, batch: Batch) -> Tensor: ...

    def query_features(self, params: Params, batch: Batch) -> Tensor: ...

    def logits(self, params: Params, features: Tensor) -> Tensor: ...


class Network(nn.Module):
    """Parameters and what they compute, in the form that learn2learn's algorithms clone and update
    (out of place).
    """

    def __init__(self, adapted: Params, fixed: Params, logits: Callable[[Params], Tensor]) -> None:
        super().__init__()
        self._names, self._fixed, self._logits = tuple(adapted), fixed, logits
        self.entries = nn.ParameterList(adapted.values())

    def params(self) -> Params:
        """All of them, as they are after the updates so far."""
        return {**self._fixed, **dict(zip(self._names, self.entries, strict=True))}

    def forward(self) -> Tensor:
        return self._logits(self.params())


class Direction(NamedTuple):
    """One task's part of a step."""

    upper: Params  # d_i
    upper_loss: Tensor  # CE of the queries at y_i
    lower_loss: Tensor  # CE of the support set at y_i


@dataclass(frozen=True, kw_only=True)
class LearnerOptions(UpperOptions):
    """A solver that adapts a network to each fresh task through learn2learn and moves x by what
    that says.

    Tasks are done one after the other, whatever `task_map` says. As it stands here it is MAML; the
    others change `learner` or `direction`.
    """

    inner_steps: Steps = 5
    inner_lr: Positive = 0.1

    second_order: ClassVar[bool] = (
        True  # whether d_i follows the dependence of the inner gradients on x
    )
    query_gradients: ClassVar[int] = 1  # per task

    def check(self, problem: Problem) -> None:
        name = type(self).__name__
        if isinstance(problem, SharedProblem):
            raise ConfigError(
                f"problem.name: {type(problem).__name__} has one lower variable for all tasks; solver {name} adapts a network to each "
                "task: use problem few_shot"
            )
        if not isinstance(problem, NetworkProblem):
            raise ConfigError(
                f"problem.name: {type(problem).__name__} offers no network; solver {name} adapts one to each task: use problem few_shot"
            )
        if problem.encodes:
            raise ConfigError(
                f"problem.form: solver {name} adapts a whole network that starts at x, and x is not one here: "
                "set problem.form=network"
            )
        if problem.num_tasks is not None:
            raise ConfigError(
                f"problem.fixed_tasks: got {problem.num_tasks} tasks whose y persist; solver {name} adapts from x anew in every step: "
                "take it out"
            )

    def step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        sums, lower = run(episodes, self, upper.params, lower)
        return StepResult(lower, move_upper(upper, sums, run))

    def adapt(self, oracle: Oracle, steps: int | None, start: Params | None = None) -> Params:
        """y of every task; evaluation differentiates it no further, so the steps are taken without
        a graph of their own.
        """
        here = cast(LocalOracle, oracle)  # `check` refused what is not asked on a worker
        steps = self.inner_steps if steps is None else steps
        x = _parameters(here.x)
        with torch.enable_grad():
            each = [
                self.adapted(here, x, task, steps, follow=False).params() for task in _tasks(here)
            ]
        return {name: torch.stack([params[name].detach() for params in each]) for name in each[0]}

    def adapted(self, oracle: LocalOracle, x: Params, task: Batch, steps: int, follow: bool) -> Any:
        """The learner after `steps` steps on one task's support set."""
        learner = self.learner(cast(NetworkProblem, oracle.problem), x, task, follow)
        for _ in range(steps):
            learner.adapt(functional.cross_entropy(learner(), task["support_labels"]))
        return learner

    def learner(self, problem: NetworkProblem, x: Params, task: Batch, follow: bool) -> Any:
        """A clone by learn2learn with `Network.params` whose call gives the support set's logits.

        `follow`: whether y is to be differentiated in x; without, only its value matters.
        """
        network = Network(
            x, {}, lambda params: problem.logits(params, problem.support_features(params, task))
        )
        return (
            learn2learn()
            .algorithms.MAML(network, self.inner_lr, first_order=not (follow and self.second_order))
            .clone()
        )

    def direction(self, oracle: LocalOracle, x: Params, task: Batch) -> Direction:
        """One task's d_i: the gradient in x of the queries' loss after adaptation."""
        learner = self.adapted(oracle, x, task, self.inner_steps, follow=True)
        loss = query_loss(oracle, learner.params(), task)
        grads = torch.autograd.grad(loss, list(x.values()), materialize_grads=True)
        return Direction(
            dict(zip(x, grads, strict=True)), loss.detach(), support_loss(learner, task)
        )


def episodes(
    solver: LearnerOptions, oracle: LocalOracle, lower: LowerGroups | None
) -> KernelResult:
    """Kernel for fresh tasks: adapt to each, add up the directions."""
    x = _parameters(oracle.x)
    parts = [solver.direction(oracle, x, task) for task in _tasks(oracle)]
    total = parts[0].upper
    for part in parts[1:]:
        total = tree.axpy(1.0, part.upper, total)
    products = solver.inner_steps if solver.second_order else 0
    sums = {
        "direction": total,
        "upper_loss": torch.stack([part.upper_loss for part in parts]).sum(),
        "lower_loss": torch.stack([part.lower_loss for part in parts]).sum(),
        "gradient_evaluations": torch.tensor(
            float((solver.inner_steps + solver.query_gradients) * oracle.tasks)
        ),
        "hessian_products": torch.tensor(float(products * oracle.tasks)),
    }
    return KernelResult(sums, {})


def query_loss(oracle: LocalOracle, params: Params, task: Batch) -> Tensor:
    """CE of one task's queries under a whole network."""
    problem = cast(NetworkProblem, oracle.problem)
    return functional.cross_entropy(
        problem.logits(params, problem.query_features(params, task)), task["query_labels"]
    )


def support_loss(learner: Any, task: Batch) -> Tensor:
    """CE of one task's support set as the learner is now: a figure for the log."""
    with torch.no_grad():
        return functional.cross_entropy(learner(), task["support_labels"])


def _parameters(x: Params) -> Params:
    # nn.Parameter is what learn2learn's modules hold; leaves of their own, since x may have come
    # without a graph.
    return {name: nn.Parameter(tensor.detach()) for name, tensor in x.items()}


def _tasks(oracle: LocalOracle) -> list[Batch]:
    return [{name: tensor[i] for name, tensor in oracle.batch.items()} for i in range(oracle.tasks)]
