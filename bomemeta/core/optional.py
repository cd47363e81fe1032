"""What a problem may define beside what every problem needs (`core/problem.py`). All of it has a default; `Problem`
derives from these classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from bomemeta.core.tree import Params

Batch = dict[str, Tensor]
Encoded = dict[str, Tensor]
Loss = Literal["upper", "lower"]


class Encoding(NamedTuple):
    """What `encode` makes of a whole stack, and its derivative."""

    encoded: Encoded  # [B, ...], without a graph
    pull_back: Callable[
        [Encoded], Params
    ]  # the gradient in x, summed over the tasks, from those in every entry of `encoded`


class LossGradient(NamedTuple):
    """One loss and its gradients, per task."""

    value: Tensor  # [B]
    lower: Params  # [B, ...]
    # [B, ...], where it was asked for; an entry that the loss does not contain may be left out
    encoded: Encoded


class ClosedForms:
    """Closed forms on a whole STACK of tasks. Each is optional: where it gives None (the default), the
    oracle takes the problem's losses, with autograd.
    """

    def encode_tasks(self, upper: Params, batch: Batch, differentiable: bool) -> Encoding | None:
        """`encode` of every task, and its derivative. `differentiable=False`: the derivative will
        not be asked for.
        """
        return None

    def loss_gradient(
        self, loss: Loss, encoded: Encoded, lower: Params, batch: Batch, in_encoded: bool
    ) -> LossGradient | None:
        """f or g with its gradient in y and, with `in_encoded`, in what `encode` returned; without
        it `encoded` of the answer is not read.
        """
        return None

    def lower_steps(
        self, encoded: Encoded, lower: Params, batch: Batch, steps: int, lr: float
    ) -> Params | None:
        """y after `steps` steps y <- project_lower(y - lr grad_y g)."""
        return None


class StartedFromUpper:
    """What solvers of MAML's family ask of a problem whose y starts from x: `init_lower` then makes y
    of `encoded`, differentiably.
    """

    lower_loss: Callable[[Encoded, Params, Batch], Tensor]  # the problem's

    @property
    def head_names(self) -> tuple[str, ...]:
        """The entries of y that are its head, for ANIL, which adapts them alone. Default: none."""
        return ()

    def adaptation(
        self, encoded: Encoded, lower: Params, batch: Batch, names: tuple[str, ...]
    ) -> Callable[[Params], Tensor]:
        """What is descended from y = `lower`, as a function of y's entries `names`; the others stay
        as they are. For one task.

        Default: `lower_loss`. A problem may leave out a term that only holds y near x, and compute
        here, once, what does not depend on these entries.
        """
        return lambda part: self.lower_loss(encoded, {**lower, **part}, batch)


class Reporting:
    """What a run shows and keeps beside `evaluate`'s metrics."""

    def classified(
        self, encoded: Encoded, lower: Params, batch: Batch
    ) -> tuple[Tensor, Tensor] | None:
        """The predicted and the true classes of one task's test samples at an adapted y, int64 `[n]`
        each: what `bomemeta report` counts. Default: None, the problem is no classification.
        """
        return None

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """What is reported, from the means over tasks or blocks of what `evaluate` gave. Default:
        these, as they are.

        Where a metric is no mean, as F1 is none, `evaluate` gives the counts that it follows from.
        """
        return dict(means)

    def reported(self, upper: Params) -> dict[str, Any]:
        """What of x is to be read under `final` in result.json, by name: plain values. Default:
        nothing beside x itself, where it is small.
        """
        return {}

    def artefacts(
        self, history: Sequence[Mapping[str, float]], metrics: Mapping[str, float]
    ) -> dict[str, bytes]:
        """Files for the run's folder, by name, that follow from the milestones' metrics and the
        result's metrics. Default: none.

        Those that end in .png are shown in TensorBoard too.
        """
        return {}

    def evaluation_variants(self) -> Mapping[str, Mapping[str, Any]]:
        """Named field changes under which meta-testing is reported too (BatchNorm policies).
        Default: none.
        """
        return {}
