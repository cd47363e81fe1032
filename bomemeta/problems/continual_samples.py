"""Which samples a step of a continual run looks at, cut over blocks: index arrays that follow from
(seed, step) alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bomemeta.core.problem import Batch
from bomemeta.data.streams import Stream
from bomemeta.problems.continual_memory import NONE, Memory, Policy, Rows

# Second numbers of the keys of what is drawn from the config's seed, beside those of
# bomemeta/data/streams.py.
MEMORY, REPLAY, ORDER, NETWORK = range(16, 20)

# Whose notes a step writes: a task's episodic memory at its end, a batch's samples that stay in
# memory, a task's first samples.
Notes = Literal["none", "task", "batch", "fisher"]


@dataclass(frozen=True, kw_only=True)
class StreamSizes:
    """How a stream is walked through."""

    seed: int
    batch: int
    rounds: int
    memory: Policy
    capacity: int  # per task; of the whole stream with `pooled`
    pooled: bool  # one memory for all tasks, replayed as it was before the batch
    semantic: int  # of these, for f alone; 0: f is measured on the replay
    replay: int
    replay_weight: float | None  # of its cross-entropy in g; None: it is not in g
    notes_weight: float  # of what holds its logits to the notes
    notes: Notes
    fisher_samples: int
    own_classes: bool  # an incoming sample is judged among its batch's classes alone
    shuffled: bool  # all tasks at once
    blocks: int


class Samples:
    """The batches of a stream."""

    def __init__(
        self, stream: Stream, allowed: Tensor, plan: StreamSizes, dtype: torch.dtype
    ) -> None:
        self._stream, self._allowed, self._plan, self._dtype = stream, allowed, plan, dtype
        starts = stream.train.starts
        key = np.random.SeedSequence((plan.seed, MEMORY))
        owners = (0, starts[-1]) if plan.pooled else starts
        self.memory = Memory(owners, plan.capacity, plan.semantic, plan.memory, key)
        self._order = (
            self._draw(ORDER).permutation(starts[-1]) if plan.shuffled else np.arange(starts[-1])
        )
        tasks = [(0, starts[-1])] if plan.shuffled else list(itertools.pairwise(starts))
        # First and last position in `_order` of every incoming batch; a task's last batch may be
        # smaller.
        self._batches = [
            (i, min(i + plan.batch, last))
            for first, last in tasks
            for i in range(first, last, plan.batch)
        ]
        self._ends = {last for _, last in tasks}

    @property
    def steps(self) -> int:
        return len(self._batches) * self._plan.rounds

    @property
    def noted(self) -> int:
        """Slots that notes are kept for, of all tasks."""
        owners = 1 if self._plan.pooled else len(self._allowed)
        return owners * (self._plan.capacity - self._plan.semantic)

    def ends_task(self, step: int) -> bool:
        batch, round_ = divmod(step, self._plan.rounds)
        return round_ == self._plan.rounds - 1 and self._batches[batch][1] in self._ends

    def writes_notes(self, step: int) -> bool:
        batch, round_ = divmod(step, self._plan.rounds)
        if self._plan.notes != "batch":
            return self._plan.notes != "none" and self.ends_task(step)
        first, last = self._batches[batch]
        return round_ == self._plan.rounds - 1 and bool(
            (self.memory.slots[first:last] != NONE).any()
        )

    def of_step(self, ids: tuple[int, ...], step: int) -> Batch:
        """`g_*`, `f_*` and, where notes are written, `kept_*`: inputs, labels, tasks and columns of
        these blocks.
        """
        plan, train = self._plan, self._stream.train
        first, last = self._batches[step // plan.rounds]
        task = int(train.tasks[self._order[first]])
        if plan.pooled:
            earlier = self.memory.content(0 if plan.shuffled else first).ravel().copy()
        content = self.memory.content(0 if plan.shuffled else last)
        if not plan.pooled:
            earlier = content[:task, plan.semantic :].ravel()
        incoming = self.memory.trained(first, last) if plan.semantic else self._order[first:last]
        # Where logits are held to notes, labels are those of a second draw (DER++).
        replayed, slots = self._replay(earlier, step)
        again = self._replay(earlier, step, 1)[0] if plan.notes == "batch" else None
        found = self._cut("g", ids, *self._lower(incoming, replayed, again, slots))
        if again is not None:
            replayed = again
        judged = content[: task + 1, : plan.semantic].ravel() if plan.semantic else replayed
        judged = judged[judged != NONE]
        found |= self._cut(
            "f", ids, judged, {"weight": np.full(len(judged), 1 / max(len(judged), 1))}
        )
        if self.writes_notes(step):
            found |= self._kept(ids, content, task, first, last)
        return found | {"allowed": self._allowed.expand(len(ids), -1, -1)}

    def _lower(
        self, incoming: Rows, replayed: Rows, again: Rows | None, slots: Rows
    ) -> tuple[Rows, dict[str, NDArray[Any]]]:
        """The samples of g and their columns: the incoming ones, the replayed ones whose slots are
        given, and a second draw where there is one, which then has the labels' weight alone.
        """
        plan, train = self._plan, self._stream.train
        n, m = len(incoming), len(replayed) if plan.replay_weight is not None else 0
        second = again[:m] if again is not None else replayed[:0]
        rows = np.concatenate([incoming, replayed[:m], second])
        kind = np.repeat([0, 1, 2], [n, m, len(second)])
        classes = self._allowed[train.tasks[torch.from_numpy(rows)]].sum(1).numpy()
        labelled = (plan.replay_weight or 0.0) / max(m, 1)
        columns: dict[str, NDArray[Any]] = {
            "weight": np.choose(
                kind, [1 / max(n, 1), 0.0 if again is not None else labelled, labelled]
            ),
            # a mean over samples and classes, as torch's losses have it
            "notes_weight": np.where(kind == 1, plan.notes_weight / (max(m, 1) * classes), 0.0),
            "slots": np.where(
                kind == 1, np.resize(np.r_[np.zeros(n, np.int64), slots[:m]], len(rows)), 0
            ),
        }
        if plan.own_classes:
            allowed = self._allowed[train.tasks[torch.from_numpy(rows)]].numpy()
            present = np.zeros(allowed.shape[1], dtype=bool)
            present[train.examples.labels[torch.from_numpy(incoming)].numpy()] = True
            columns["allowed"] = np.where((kind == 0)[:, None], allowed & present, allowed)
        return rows, columns

    def tested(self, ids: tuple[int, ...]) -> Batch:
        """These blocks' test samples of every task, as stored: `[B, tasks, m, ...]`."""
        part = self._stream.test
        starts = np.asarray(part.starts)
        counts = np.diff(starts)[None, :, None]
        number = np.asarray(ids)[:, None, None] + self._plan.blocks * np.arange(
            -(-counts.max() // self._plan.blocks)
        )
        real = number < counts
        rows = torch.from_numpy(np.where(real, number, 0) + starts[None, :-1, None])
        return {
            "test_inputs": part.examples.inputs[rows],
            "test_labels": part.examples.labels[rows],
            "test_weight": torch.from_numpy(np.where(real, self._plan.blocks / counts, 0.0)).to(
                self._dtype
            ),
            "allowed": self._allowed.expand(len(ids), -1, -1),
        }

    def _draw(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence((self._plan.seed, *key))))

    def _replay(self, earlier: Rows, step: int, *draw: int) -> tuple[Rows, Rows]:
        """Samples drawn without repetition from these slots, and which slots they are."""
        slots = np.flatnonzero(earlier != NONE)
        if len(slots) > self._plan.replay:
            slots = np.sort(
                self._draw(REPLAY, step, *draw).choice(slots, self._plan.replay, replace=False)
            )
        return earlier[slots], slots

    def _kept(self, ids: tuple[int, ...], content: Rows, task: int, first: int, last: int) -> Batch:
        """The samples whose notes are written after this step, and in which slots; `stale` are the
        slots that get new ones.
        """
        owner = 0 if self._plan.pooled else task
        mine = content[owner, self._plan.semantic :]
        here = np.flatnonzero(mine >= first if self._plan.notes == "batch" else mine != NONE)
        rows, slots = mine[here], owner * len(mine) + here
        weight = 1.0
        stale = torch.zeros(self.noted, dtype=torch.bool)
        stale[torch.from_numpy(slots)] = True
        if self._plan.notes == "fisher":
            begin = self._stream.train.starts[task]
            rows = np.arange(begin, min(begin + self._plan.fisher_samples, last))
            slots, weight = np.zeros_like(rows), 1 / len(rows)
        found = self._cut("kept", ids, rows, {"weight": np.full(len(rows), weight), "slots": slots})
        return found | {"block": torch.tensor(ids), "stale": stale.expand(len(ids), -1)}

    def _cut(
        self, name: str, ids: tuple[int, ...], rows: Rows, columns: Mapping[str, NDArray[Any]]
    ) -> Batch:
        """These samples and their columns, sample i in block i % blocks; a shorter block is filled
        with the first one, at weights of 0.

        Weights become those of sums whose mean over the blocks is the whole. Nothing where there
        are no samples.
        """
        if len(rows) == 0:
            return {}
        blocks = self._plan.blocks
        number = np.asarray(ids)[:, None] + blocks * np.arange(-(-len(rows) // blocks))
        real = number < len(rows)
        number = np.where(real, number, 0)
        chosen, train = torch.from_numpy(rows[number]), self._stream.train
        found = {
            f"{name}_inputs": train.examples.rows(chosen, self._dtype),
            f"{name}_labels": train.examples.labels[chosen],
            f"{name}_tasks": train.tasks[chosen],
        }
        for column, values in columns.items():
            if values.dtype.kind == "f":
                found[f"{name}_{column}"] = torch.from_numpy(values[number] * real * blocks).to(
                    self._dtype
                )
            else:
                found[f"{name}_{column}"] = torch.from_numpy(values[number])
        return found
