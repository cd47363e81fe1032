"""Continual learning: one network learns a stream of tasks in one pass, with a small memory of each
(Pham et al., CTN, ICLR 2021).

    y = the base network,  x = the controller that modulates it by the task (`method: plain`: none)

    g = CE(incoming batch) + [t > 0] (CE(replay) + distillation KL(soft targets || softmax(z / temperature)))     objective: ctn
    f = CE(semantic memory of the tasks 0..t)

Step k is round k % rounds on incoming batch k // rounds. Everything that a step reads follows from
(seed, k), but for what earlier networks said (soft targets, stored logits, Fisher information):
that is the problem's memory, which the driver keeps.

The samples of a step are cut over blocks, sample i to block i % blocks, each weighted so that the
plain mean over the blocks is f or g.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bomemeta.core.problem import Batch, Encoded, Split, StreamProblem
from bomemeta.core.tree import Params
from bomemeta.data.digest import digest_of_rows
from bomemeta.data.labelled import GREY_LEVELS
from bomemeta.data.pictures import picture_of
from bomemeta.data.streams import Kind, Rotation, StreamSpec
from bomemeta.limits import check_bytes
from bomemeta.nets.controller import (
    Mlp,
    Network,
    ReducedResNet18,
    controller_films,
    controller_initial,
    films_of,
)
from bomemeta.problems import continual_report as report
from bomemeta.problems.continual_appended import AppendedData, tasks_in, whole_stream
from bomemeta.problems.continual_losses import (
    cross_entropies,
    distilled,
    fisher_share,
    masked,
    nothing_of,
    rows_share,
)
from bomemeta.problems.continual_memory import Policy
from bomemeta.problems.continual_plan import NOTES, Objective, check, sizes_of
from bomemeta.problems.continual_samples import NETWORK, Samples
from bomemeta.registry import problems

TEST_ROWS = 500  # that are judged at once

Size = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]


@problems.register("continual")
@dataclass(kw_only=True)
class Continual(StreamProblem):
    """An online stream of tasks made of the config's data set, with a memory of `memory_per_task`
    samples of each, or of `memory_total` of the whole stream.

    stream:    permuted, rotated, split (bomemeta.data.streams) protocol:  task_incremental    the
    task of a sample is known, and only that task's classes come into question
               class_incremental   neither in training nor in testing
    objective: ctn       g and f as above: of a task's memory `semantic_per_task` are for f alone
    and the others for g
               finetune  g = CE(batch), no remedy; with solver agem, which takes its memory from f, A-GEM
               er        g = CE(batch) + CE(replay)
               er_ace    the same; of the incoming batch only its own classes come into question
               derpp     g = CE(batch) + der_alpha MSE(replay, its logits when it came) + der_beta CE(another replay)
               ewc       g = CE(batch) + ewc_weight / 2 sum_i F_i (y_i - y*_i)^2, F summed over the tasks, y* the last task's end
               joint     g = CE(batch), batches drawn from all tasks at once: what a stream can at best come to
    For all but ctn f = CE(replay). `replay` samples are drawn at every step: from the memory of earlier tasks
    or, with `memory_total`, from all that is in memory before the batch.
    """

    needs_data = True

    stream: Kind = "permuted"
    rotation: Rotation = "even"  # stream: rotated
    tasks: Annotated[int, Field(ge=2)] = 5
    samples_per_task: Annotated[int, Field(ge=2)] | None = 1000  # None: all there are
    test_samples_per_task: Size | None = 1000
    classes_per_task: Size | None = (
        None  # stream: split; None: the data set's classes in equal groups
    )
    shuffle_classes: bool = False  # stream: split
    protocol: Literal["task_incremental", "class_incremental"] = "task_incremental"
    network: Literal["mlp", "resnet18"] = "mlp"
    hidden: Size = 256  # mlp
    layers: Size = 2  # mlp
    filters: Annotated[int, Field(ge=4, multiple_of=4)] = 20  # resnet18
    method: Literal["ctn", "plain"] = "ctn"
    embedding: Size = 16  # method: ctn
    objective: Objective = "ctn"
    batch: Size = 10
    rounds: Annotated[int, Field(ge=1, le=10_000)] = 2
    memory: Policy = "reservoir"
    memory_per_task: Count = 50
    memory_total: Size | None = None  # one memory of so many slots, in its place; not for ctn
    semantic_per_task: Size = 10  # objective: ctn
    replay: Size = 64
    temperature: Annotated[float, Field(gt=0)] = 5.0
    distillation: Weight = 100.0
    der_alpha: Weight = 0.5
    der_beta: Weight = 0.5
    ewc_weight: Weight = 100.0
    fisher_samples: Size = 200  # of each task, objective: ewc
    blocks: Size = 1
    appended: list[AppendedData] = field(default_factory=list)  # `bomemeta extend`

    @property
    def num_blocks(self) -> int:
        return self.blocks

    @property
    def length(self) -> int:
        return self._samples.steps

    def setup(self) -> None:
        check(self)
        spec = StreamSpec(
            kind=self.stream,
            rotation=self.rotation,
            tasks=self.tasks,
            samples=self.samples_per_task,
            test_samples=self.test_samples_per_task,
            classes_per_task=self.classes_per_task,
            shuffle_classes=self.shuffle_classes,
            seed=self.seed,
        )
        stream, self._digest, self.class_names = whole_stream(self.data, spec, self.appended)
        self._tasks, self._classes = stream.allowed.shape
        self._network = self._build_network()
        known = self.protocol == "task_incremental"
        self.allowed = stream.allowed if known else torch.ones_like(stream.allowed)
        self._samples = Samples(stream, self.allowed, sizes_of(self), self.dtype)
        self._loaded: dict[tuple[int, ...], Batch] = {}  # of the step that was last asked for
        self._loaded_step = -1
        self._tests: dict[tuple[int, ...], Batch] = {}

    def check_data(self) -> dict[str, Any]:
        return digest_of_rows(self.data) | self._digest

    def stages(self) -> Sequence[Continual]:
        return [replace(self, appended=self.appended[:k]) for k in range(len(self.appended) + 1)]

    def appending(self, path: str, tasks: int | None) -> Continual:
        if tasks is None:
            each = self.classes_per_task or self.data.classes // self.tasks
            tasks = tasks_in(path, self.stream, each)
        return replace(self, appended=[*self.appended, AppendedData(path=path, tasks=tasks)])

    def _build_network(self) -> Network:
        classes = self._classes
        if self.network == "mlp":
            size = self.layers * self.hidden * (self.hidden + 1) * self.dtype.itemsize
            check_bytes("problem.layers", f"{self.layers} layers of {self.hidden} units", size)
            return Mlp(
                inputs=self.data.features, hidden=self.hidden, layers=self.layers, classes=classes
            )
        picture = picture_of(self.data, "problem.network: resnet18")
        return ReducedResNet18(
            channels=picture.channels,
            height=picture.height,
            width=picture.width,
            filters=self.filters,
            classes=classes,
            channels_last=picture.channels_last,
        )

    # x and y

    def init_upper(self, generator: torch.Generator) -> Params:
        if self.method == "plain":
            return {"unused": torch.zeros(1, dtype=self.dtype)}
        start = controller_initial(self._tasks, self.embedding, self._network.modulated, generator)
        return {name: tensor.to(self.dtype) for name, tensor in start.items()}

    def encode(self, upper: Params, batch: Batch) -> Encoded:
        """gamma and beta of every task; the losses take each sample's."""
        return controller_films(upper) if self.method == "ctn" else upper

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        return {
            name: tensor.to(next(iter(encoded.values())).device)
            for name, tensor in self._start().items()
        }

    def _start(self) -> Params:
        seeds = np.random.SeedSequence((self.seed, NETWORK)).generate_state(1, np.uint64)
        start = self._network.initial(torch.Generator().manual_seed(int(seeds[0]) >> 1))
        return {name: tensor.to(self.dtype) for name, tensor in start.items()}

    # The samples of a step

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        ids = tuple(task_ids)
        if split == "test":
            if ids not in self._tests:
                self._tests[ids] = self._samples.tested(ids)
            return self._tests[ids]
        step = min(step, self.length - 1)  # a run that has ended is looked at once more
        if step != self._loaded_step:
            self._loaded, self._loaded_step = {}, step
        if ids not in self._loaded:
            self._loaded[ids] = self._samples.of_step(ids, step)
        return self._loaded[ids]

    # The losses

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        if "g_inputs" not in batch:
            return nothing_of(lower)
        logits = self.logits(encoded, lower, batch["g_inputs"], batch["g_tasks"])
        allowed = batch["g_allowed"] if "g_allowed" in batch else batch["allowed"][batch["g_tasks"]]
        loss = (batch["g_weight"] * cross_entropies(logits, batch["g_labels"], allowed)).sum()
        if self.objective in NOTES:
            notes = batch[NOTES[self.objective]][batch["g_slots"]]
            temperature = self.temperature if self.objective == "ctn" else None
            loss = (
                loss
                + (batch["g_notes_weight"] * distilled(logits, notes, allowed, temperature)).sum()
            )
        if self.objective == "ewc":
            pulls = [
                (batch[f"fisher.{name}"] * (tensor - batch[f"anchor.{name}"]) ** 2).sum()
                for name, tensor in lower.items()
            ]
            loss = loss + self.ewc_weight / 2 * torch.stack(pulls).sum()
        return loss

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        if "f_inputs" not in batch:  # the first task has no earlier ones to be replayed
            return nothing_of(lower)
        logits = self.logits(encoded, lower, batch["f_inputs"], batch["f_tasks"])
        return (
            batch["f_weight"]
            * cross_entropies(logits, batch["f_labels"], batch["allowed"][batch["f_tasks"]])
        ).sum()

    def logits(self, encoded: Encoded, lower: Params, inputs: Tensor, tasks: Tensor) -> Tensor:
        return self._network.logits(
            lower, inputs, films_of(encoded, tasks) if self.method == "ctn" else []
        )

    # What is remembered of earlier networks

    def init_memory(self) -> Params:
        if self.objective in NOTES:
            return {
                NOTES[self.objective]: torch.zeros(
                    self._samples.noted, self._classes, dtype=self.dtype
                )
            }
        if self.objective == "ewc":
            zeros = {name: torch.zeros_like(tensor) for name, tensor in self._start().items()}
            return {
                f"{what}.{name}": tensor
                for what in ("fisher", "anchor")
                for name, tensor in zeros.items()
            }
        return {}

    @property
    def memory_before(self) -> bool:
        return self.objective == "derpp"

    def memory_due(self, step: int) -> bool:
        return self._samples.writes_notes(step)

    def update_memory(self, encoded: Encoded, lower: Params, batch: Batch) -> Params:
        tasks, allowed = batch["kept_tasks"], batch["allowed"][batch["kept_tasks"]]
        weight = batch["kept_weight"] / self.blocks  # of a sum: 1, ewc 1 / n; of filling 0
        if self.objective == "ewc":

            def loss(y: Params, inputs: Tensor, label: Tensor, task: Tensor, row: Tensor) -> Tensor:
                logits = self.logits(encoded, y, inputs[None], task[None])
                return cross_entropies(logits, label[None], row[None])[0]

            samples = (batch["kept_inputs"], batch["kept_labels"], tasks, allowed)
            return fisher_share(loss, lower, samples, weight, batch)
        logits = self.logits(encoded, lower, batch["kept_inputs"], tasks)
        name = NOTES[self.objective]
        if self.objective == "ctn":
            logits = masked(logits / self.temperature, allowed).softmax(1)
        return {name: rows_share(batch[name], logits, weight, batch, self.blocks)}

    # What it came to

    def evaluate(self, encoded: Encoded, lower: Params, batch: Batch) -> dict[str, Tensor]:
        """The accuracy on every task, also on those that have not come yet."""
        metrics = {}
        for t in range(self._tasks):
            hits = self._predicted(encoded, lower, batch, t) == batch["test_labels"][t]
            metrics[report.metric_name(t)] = (batch["test_weight"][t] * hits).sum()
        return metrics

    def classified(self, encoded: Encoded, lower: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        found = torch.stack([self._predicted(encoded, lower, batch, t) for t in range(self._tasks)])
        real = batch["test_weight"] > 0  # filling is no sample
        return found[real], batch["test_labels"][real]

    def _predicted(self, encoded: Encoded, lower: Params, batch: Batch, task: int) -> Tensor:
        """The classes of a task's test samples, int64 [m]."""
        like, found = next(iter(lower.values())), []
        for inputs in torch.split(batch["test_inputs"][task], TEST_ROWS):
            floats = inputs.to(like.dtype)
            if inputs.dtype == torch.uint8:
                floats = floats / GREY_LEVELS
            tasks = torch.full((len(inputs),), task, device=inputs.device)
            logits = self.logits(encoded, lower, floats, tasks)
            found.append(masked(logits, batch["allowed"][task]).argmax(1))
        return torch.cat(found)

    def milestone(self, step: int) -> bool:
        return self._samples.ends_task(step)

    def final_metrics(self, history: Sequence[Mapping[str, float]]) -> dict[str, float]:
        if not history:
            return {}
        matrix = report.matrix_of(history)
        if self.objective == "joint":
            return {"acc": float(matrix[-1].mean())}
        return report.scores(matrix, (1 / self.allowed.sum(1)).tolist())

    def artefacts(
        self, history: Sequence[Mapping[str, float]], metrics: Mapping[str, float]
    ) -> dict[str, bytes]:
        if not history:
            return {}
        matrix = report.matrix_of(history)
        about = {
            "protocol": self.protocol, "stream": self.stream, "tasks": self._tasks, "method": self.method, "objective": self.objective,
            "seed": self.seed, **self.final_metrics(history),
        }  # fmt: skip
        title = f"{self.stream}, {self.protocol.replace('_', '-')}: {self.method}, {self.objective}"
        files = {"accuracy_matrix.json": report.matrix_file(matrix, about)}
        if self.objective == "joint":
            return files
        return files | {
            "accuracy_matrix.png": report.heat_map(matrix, title),
            "accuracy_curve.png": report.curve(matrix, title),
        }
