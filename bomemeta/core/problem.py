"""What a bilevel problem is:  min_x mean_i f_i(x, y_i)  subject to  y_i in argmin_y g_i(x, y).

Three base classes, from the general to the special:

    Problem          one y_i per task
    SharedProblem    ONE y; the "tasks" i are blocks of its data: f = mean_i f_i(x, y), g = mean_i g_i(x, y)
    StreamProblem    a SharedProblem whose data arrives in an order and ends (continual learning)

The fields of a problem are the keys of the config's `problem:` section. Losses are written for ONE
task in plain PyTorch; the oracle maps them over a stack of tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bomemeta.core.arguments import Recorded
from bomemeta.core.optional import (
    Batch,
    ClosedForms,
    Encoded,
    Encoding,
    Loss,
    LossGradient,
    Reporting,
    StartedFromUpper,
)
from bomemeta.core.tree import Params
from bomemeta.errors import ConfigError

__all__ = [
    "Batch",
    "Encoded",
    "Encoding",
    "Loss",
    "LossGradient",
    "Problem",
    "SharedProblem",
    "Split",
    "StreamProblem",
    "must_define",
]

Split = Literal["train", "validation", "test"]


# Names that a problem may have had before November 2026, and what to write instead.
_RENAMED = {
    "pool": "`num_tasks` (of a SharedProblem `num_blocks`)",
    "upper_gradient": "`loss_gradient(loss, encoded, lower, batch, in_encoded)`, one closed form for both losses",
    "lower_gradient": "`loss_gradient(loss, encoded, lower, batch, in_encoded)`, one closed form for both losses",
    "remembers": "`memory_due` of a StreamProblem",
    "remember": "`update_memory` of a StreamProblem",
    "retrospect": "`final_metrics` of a StreamProblem",
}


# What is asked of a special kind of problem alone.
_BELONGS = dict.fromkeys(
    ("length", "init_memory", "memory_due", "update_memory", "milestone", "final_metrics"),
    "StreamProblem",
) | {"num_blocks": "SharedProblem"}


class Problem(ClosedForms, StartedFromUpper, Reporting, Recorded):
    """Base class of all problems. A subclass must define `init_upper`, `load`, `init_lower`,
    `upper_loss` and `lower_loss`; what else there is has a default. What few problems need is in
    `core/optional.py`: closed forms, what MAML's family asks, and what a run reports.

    Raises ConfigError, where a subclass is defined, for names that mean nothing any more.
    """

    needs_data: ClassVar[bool] = False  # whether the config must have a `data:` section
    meta_tests: ClassVar[bool] = False  # whether `load` knows validation and test tasks too

    seed: int = 0
    dtype: torch.dtype = torch.float32
    data: Any = None  # the config's data set, where `needs_data`

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        where = f"class {cls.__name__} ({cls.__module__})"
        kinds = {base.__name__ for base in cls.__mro__}
        shared = "SharedProblem" in kinds
        kind = cls.__dict__.get("lower")
        if isinstance(kind, str) and (shared or kind != "per_task"):
            raise ConfigError(
                f"{where}: got lower = {kind!r}; whether there is one y for all data is now said by the base class. Take the "
                f"line out, and derive {cls.__name__} from bomemeta.SharedProblem (one y; `num_tasks` is then called "
                "`num_blocks`) or from bomemeta.Problem (a y for each task)"
            )
        # A field or constant of such a name is the user's own; a method would wait in vain.
        methods = {
            name
            for name, value in cls.__dict__.items()
            if isinstance(value, property | FunctionType)
        }
        for name in sorted(methods & _RENAMED.keys()):
            raise ConfigError(f"{where}: {name} is not asked for any more; define {_RENAMED[name]}")
        if shared and "num_tasks" in methods and cls.__name__ != "SharedProblem":
            raise ConfigError(
                f"{where}: num_tasks of a SharedProblem is called num_blocks; rename it"
            )
        for name in sorted(methods & _BELONGS.keys()):
            if _BELONGS[name] not in kinds:
                raise ConfigError(
                    f"{where}: {name} is asked of a {_BELONGS[name]} alone; derive {cls.__name__} from "
                    f"bomemeta.{_BELONGS[name]}, or give {name} another name"
                )

    def attach(self, *, seed: int, dtype: torch.dtype, data: Any = None) -> None:
        """Gives the problem what belongs to the run and not to its own section, then calls `setup`.
        Done once in every process.
        """
        self.seed, self.dtype, self.data = seed, dtype, data
        self.setup()

    @property
    def attached(self) -> bool:
        """Whether the problem belongs to a run and can be asked for tasks."""
        return "dtype" in vars(self)

    def setup(self) -> None:
        """Builds what follows from the fields (a network's skeleton, constant matrices). Default:
        nothing.
        """

    def check_data(self) -> dict[str, Any]:
        """Looks at what the data set gives, before a run. Returns a digest of it, as JSON values:
        checkpoints carry it, and a resumed run compares. Raises DataError where the data is not
        what the losses take it for. Asked on the driver alone. Default: the data set is not looked
        at.
        """
        return {}

    @property
    def num_tasks(self) -> int | None:
        """N: there are the tasks 0..N-1 and their lower variables persist from step to step. None:
        every step draws fresh tasks.
        """
        return None

    def init_upper(self, generator: torch.Generator) -> Params:
        """x at step 0; every random number from `generator`."""
        raise must_define(self, "init_upper")

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        """The data of these tasks, stacked: every tensor `[B, ...]`. A pure function of (seed,
        step, split, task id).
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
        """y of a task that has none yet. For one task; not differentiated."""
        raise must_define(self, "init_lower")

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        """f_i, shape [], for one task."""
        raise must_define(self, "upper_loss")

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        """g_i, shape [], for one task."""
        raise must_define(self, "lower_loss")

    def project_upper(self, upper: Params) -> Params:
        """The nearest admissible x. Default: no constraint."""
        return upper

    def project_lower(self, lower: Params) -> Params:
        """The nearest admissible y, on a stack. Default: no constraint."""
        return lower

    def evaluate(self, encoded: Encoded, lower: Params, batch: Batch) -> dict[str, Tensor]:
        """Metrics of one task at an adapted y, each of shape [] (accuracy, ...). Default:
        f alone, as `loss`.
        """
        return {"loss": self.upper_loss(encoded, lower, batch)}


class SharedProblem(Problem):
    """Base class of problems with one y for all data: f = mean_i f_i(x, y), g = mean_i g_i(x, y)
    over the blocks i = 0..num_blocks-1 of the data, which take the place of tasks.

    y persists from step to step. `load` is asked in every round, so what does not change should be
    kept; split `train` is for f and g, `test` for `evaluate`. `init_lower` is asked of the first
    block and must not depend on it.
    """

    @property
    def num_blocks(self) -> int:
        """The number of blocks that the data is cut into. Default: 1."""
        return 1

    @property
    def num_tasks(self) -> int:
        """The blocks, for code that is written once for tasks and blocks."""
        return self.num_blocks

    # Whether `load` draws other samples for every step of training.
    minibatches: bool = False
    # Whether every inner step of a step has samples of its own; without, they see the step's.
    inner_batches: bool = False

    def load_inner(self, task_ids: Sequence[int], step: int, inner: int) -> Batch:
        """As `load` for training, the samples of inner step `inner` of this step, counted from 0;
        asked for where `inner_batches`.
        """
        raise must_define(self, "load_inner")

    def micro_batches(self, batch: Batch, size: int) -> list[Batch]:
        """A stack of blocks in parts of at most `size` samples a block, whose f and g add up to the
        whole's; asked for by the config's `micro_batch`.
        """
        raise must_define(self, "micro_batches")


class StreamProblem(SharedProblem):
    """Base class of problems whose data arrives in an order: a step's batch is what
    `load(blocks, step, "train")` gives, and the stream ends after `length` steps.
    """

    @property
    def length(self) -> int:
        """How many steps there are; the config may then name none."""
        raise must_define(self, "length")

    def stages(self) -> Sequence[StreamProblem]:
        """The problem as it was before each addition to its stream, in order, itself last: a run goes
        through them one after the other, and x, y and memory grow from one to the next (docs/continual.md).
        Default: it has no additions.
        """
        return [self]

    def appending(self, path: str, tasks: int | None) -> StreamProblem:
        """This problem with the tasks of one more data file at the end of its stream. `tasks`: how
        many; None: what the data suggests. Default: raises ConfigError.
        """
        raise ConfigError(f"problem {type(self).__name__} takes no more data; `continual` does")

    # The memory of the stream from step to step, beside y and its data: soft targets, stored
    # logits ...

    def init_memory(self) -> Params:
        """Memory at step 0: tensors that the driver holds and every block's batch carries under
        their names. Default: none.
        """
        return {}

    def memory_due(self, step: int) -> bool:
        """Whether memory changes after this step. Default: never."""
        return False

    @property
    def memory_before(self) -> bool:
        """Whether `update_memory` gets the y with which the step began. Default: no, the one that it left."""
        return False

    def update_memory(self, encoded: Encoded, lower: Params, batch: Batch) -> Params:
        """One block's share of the memory after the step, at the x and y that the step left. The
        blocks' shares are summed, so each entry is to come from one block and be 0 in all others.
        """
        raise must_define(self, "update_memory")

    def milestone(self, step: int) -> bool:
        """Whether `evaluate` is asked after this step and its metrics kept: the end of a task of a
        stream. Default: never.
        """
        return False

    def final_metrics(self, history: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The final metrics that follow from the milestones', in order; among the result's metrics.
        Default: nothing.
        """
        return {}


def stream_length(problem: Problem) -> int | None:
    """How many steps the problem's data lasts; None: it does not end."""
    return problem.length if isinstance(problem, StreamProblem) else None


def start_memory(problem: Problem) -> Params:
    """The memory of the problem at step 0; empty where it is no stream."""
    return problem.init_memory() if isinstance(problem, StreamProblem) else {}


def must_define(owner: object, method: str) -> Exception:
    """What a base class raises for a method that it leaves to its subclasses."""
    return TypeError(f"{type(owner).__name__} must define {method}(); see docs/extending.md")
