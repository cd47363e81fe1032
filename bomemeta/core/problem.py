"""What a bilevel problem is:  min_x mean_i f_i(x, y_i)  subject to  y_i in argmin_y g_i(x, y).

Where the lower problem is shared there is one y, and the "tasks" i are blocks of its data:  f =
mean_i f_i(x, y), g = mean_i g_i(x, y).

A problem is a dataclass: its fields are the keys of the config's `problem:` section. Losses are
written for ONE task in plain PyTorch; the oracle maps them over a stack of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from bomemeta.core.tree import Params

Batch = dict[str, Tensor]
Encoded = dict[str, Tensor]
Split = Literal["train", "validation", "test"]
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
    encoded: Encoded  # [B, ...]; an entry that the loss does not contain may be left out


class Problem:
    """Base class of all problems. A subclass must define `init_upper`, `load`, `init_lower`,
    `upper_loss` and `lower_loss`.
    """

    lower: ClassVar[Literal["per_task", "shared"]] = "per_task"
    needs_data: ClassVar[bool] = False  # whether the config must have a `data:` section
    meta_tests: ClassVar[bool] = False  # whether `load` knows validation and test tasks too

    seed: int = 0
    dtype: torch.dtype = torch.float32
    data: Any = None  # the config's data set, where `needs_data`

    def attach(self, *, seed: int, dtype: torch.dtype, data: Any = None) -> None:
        """Gives the problem what belongs to the run and not to its own section, then calls `setup`.
        Done once in every process.
        """
        self.seed, self.dtype, self.data = seed, dtype, data
        self.setup()

    def setup(self) -> None:
        """Builds what follows from the fields (a network's skeleton, constant matrices). Default:
        nothing.
        """

    @property
    def num_tasks(self) -> int | None:
        """N: there are the tasks 0..N-1 and their lower variables persist from step to step. None:
        every step draws fresh tasks.

        Shared: the number of blocks; y persists in any case.
        """
        return None

    @property
    def length(self) -> int | None:
        """How many steps there are, for a problem that is a stream and ends by itself; the config
        may then name none. None: no end.
        """
        return None

    def init_upper(self, generator: torch.Generator) -> Params:
        """x at step 0; every random number from `generator`."""
        raise must_define(self, "init_upper")

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        """The data of these tasks, stacked: every tensor `[B, ...]`. A pure function of (seed,
        step, split, task id).

        Shared: asked for in every round, so what does not change should be kept; split `test` is
        asked for `evaluate`.
        """
        raise must_define(self, "load")

    def encode(self, upper: Params, batch: Batch) -> Encoded:
        """The part of the losses through which x enters and which does not depend on y (a
        backbone's features, sample weights).

        For one task. Everything that `upper_loss` and `lower_loss` need of x must be in what it
        returns. Default: x itself.
        """
        return upper

    @property
    def encodes(self) -> bool:
        """Whether `encode` does anything. Where it does not, a stack's tasks share x instead of
        each having a copy.
        """
        return type(self).encode is not Problem.encode

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        """y of a task that has none yet. For one task; not differentiated. Shared: the first block
        is asked.
        """
        raise must_define(self, "init_lower")

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        """f_i, shape [], for one task."""
        raise must_define(self, "upper_loss")

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        """g_i, shape [], for one task."""
        raise must_define(self, "lower_loss")

    # Closed forms on a whole STACK. Each is optional: where it gives None (the default), the oracle
    # takes what is above, with autograd.

    def encode_tasks(self, upper: Params, batch: Batch, differentiable: bool) -> Encoding | None:
        """`encode` of every task, and its derivative. `differentiable=False`: the derivative will
        not be asked for.
        """
        return None

    def loss_gradient(
        self, loss: Loss, encoded: Encoded, lower: Params, batch: Batch
    ) -> LossGradient | None:
        """f or g with its gradients in y and in what `encode` returned."""
        return None

    def lower_steps(
        self, encoded: Encoded, lower: Params, batch: Batch, steps: int, lr: float
    ) -> Params | None:
        """y after `steps` steps y <- project_lower(y - lr grad_y g)."""
        return None

    def upper_gradient(
        self, encoded: Encoded, lower: Params, batch: Batch
    ) -> tuple[Tensor, Params] | None:
        """(f [B], grad_y f [B, ...])."""
        return None

    def lower_gradient(
        self, encoded: Encoded, lower: Params, batch: Batch
    ) -> tuple[Tensor, Params] | None:
        """(g [B], grad_y g [B, ...])."""
        return None

    # What a shared problem remembers from step to step beside y and its data: soft targets, stored
    # logits ...

    def init_memory(self) -> Params:
        """Memory at step 0: tensors that the driver holds and every block's batch carries under
        their names. Default: none.
        """
        return {}

    def memory_due(self, step: int) -> bool:
        """Whether memory changes after this step. Default: never."""
        return False

    def update_memory(self, encoded: Encoded, lower: Params, batch: Batch) -> Params:
        """One block's share of the memory after the step, at the x and y that the step left. The
        blocks' shares are summed, so each entry is to come from one block and be 0 in all others.
        """
        raise must_define(self, "update_memory")

    def milestone(self, step: int) -> bool:
        """Whether `evaluate` is asked after this step and its figures kept: the end of a task of a
        stream. Default: never.
        """
        return False

    def final_metrics(self, history: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """What the figures of all milestones, in order, come to; among the result's metrics.
        Default: nothing.
        """
        return {}

    def artefacts(
        self, history: Sequence[Mapping[str, float]], metrics: Mapping[str, float]
    ) -> dict[str, bytes]:
        """Files for the run's folder, by name, that follow from the milestones' figures and the
        result's metrics. Default: none.

        Those that end in .png are shown in TensorBoard too.
        """
        return {}

    def project_upper(self, upper: Params) -> Params:
        """The nearest admissible x. Default: no constraint."""
        return upper

    def project_lower(self, lower: Params) -> Params:
        """The nearest admissible y, on a stack. Default: no constraint."""
        return lower

    def evaluate(self, encoded: Encoded, lower: Params, batch: Batch) -> dict[str, Tensor]:
        """Figures of merit of one task at an adapted y, each of shape [] (accuracy, ...). Default:
        f alone, as `loss`.
        """
        return {"loss": self.upper_loss(encoded, lower, batch)}

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """What is reported, from the means over tasks or blocks of what `evaluate` gave. Default:
        these, as they are.

        Where a figure is no mean, as F1 is none, `evaluate` gives the counts that it follows from.
        """
        return dict(means)

    def evaluation_variants(self) -> Mapping[str, Mapping[str, Any]]:
        """Named field changes under which meta-testing is reported too (BatchNorm policies).
        Default: none.
        """
        return {}


def must_define(owner: object, method: str) -> Exception:
    """What a base class raises for a method that it leaves to its subclasses."""
    return TypeError(f"{type(owner).__name__} must define {method}(); see docs/extending.md")
