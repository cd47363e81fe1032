"""Continual learning: losses against the equations on uncut samples, what is in memory and when,
baselines, figures, what is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from toy import Bench, Toy, one_thread

import bomemeta
from bomemeta.core import tree
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.oracle import Term
from bomemeta.core.solver import take_step
from bomemeta.core.tree import Params
from bomemeta.data.labelled import Examples
from bomemeta.distributed.joint import step_run
from bomemeta.distributed.packing import PackedTasks, unpack_tasks
from bomemeta.distributed.rounds import SharedRun
from bomemeta.errors import ConfigError
from bomemeta.nets import controller
from bomemeta.problems import continual_report as report
from bomemeta.problems.continual import Continual
from bomemeta.problems.continual_memory import NONE, Memory
from bomemeta.problems.few_shot import FewShot
from bomemeta.registry import solvers
from bomemeta.solvers.agem import projected

CLASSES, FEATURES = 6, 9
SMALL: dict[str, Any] = {
    "tasks": 3, "samples_per_task": 11, "test_samples_per_task": 7, "hidden": 5, "embedding": 3, "batch": 4, "memory_per_task": 5,
    "semantic_per_task": 2, "replay": 6, "fisher_samples": 5,
}  # fmt: skip
STEPS = 3 * 3 * 2  # 11 samples in batches of 4, two rounds each


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Rows:
    """Rows around a centre for each class."""

    def __init__(self, features: int = FEATURES, classes: int = CLASSES) -> None:
        self.features, self.classes = features, classes

    def prepare(self) -> None:
        pass

    def examples(self, part: str) -> Examples:
        count, seed = (90, 0) if part == "train" else (60, 1)
        labels = torch.arange(count) % self.classes
        noise = torch.randn(
            count, self.features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        return Examples(
            2 * torch.eye(self.classes, self.features, dtype=torch.float64)[labels] + noise, labels
        )


def attached(data: Any = None, seed: int = 0, **fields: Any) -> Continual:
    problem = Continual(**(SMALL | fields))
    problem.attach(seed=seed, dtype=torch.float64, data=data or Rows())
    return problem


def assert_tight(got: Any, wanted: Any) -> None:
    # Float64 sums in another order differ by about 1e-15 of their size; KL's weight of 100 and a
    # division by 5 are in there.
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def perturbed(params: Params, seed: int = 9) -> Params:
    """Near the start, but nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: t + 0.1 * torch.randn(t.shape, generator=generator, dtype=t.dtype)
        for name, t in params.items()
    }


def some_x(problem: Continual) -> Params:
    return perturbed(problem.init_upper(torch.Generator().manual_seed(2)))


def some_y(problem: Continual) -> Params:
    return perturbed(problem._start())


def some_memory(problem: Continual) -> Params:
    generator = torch.Generator().manual_seed(5)
    memory = {
        name: torch.rand(t.shape, generator=generator, dtype=t.dtype)
        for name, t in problem.init_memory().items()
    }
    if "soft_targets" in memory:
        # Probabilities of the classes that a slot's task has.
        each = len(memory["soft_targets"]) // problem.tasks
        memory["soft_targets"] *= problem.allowed.repeat_interleave(each, 0)
        memory["soft_targets"] /= memory["soft_targets"].sum(1, keepdim=True)
    return memory


def repeated(params: Params, blocks: int) -> Params:
    return {name: tensor.expand(blocks, *tensor.shape) for name, tensor in params.items()}


def oracle_at(
    problem: Continual, step: int, x: Params, memory: Params, split: Any = "train"
) -> LocalOracle:
    batch = problem.load(range(problem.blocks), step, split) | repeated(memory, problem.blocks)
    return LocalOracle(problem, x, batch, "loop")


class Walk(Bench):
    """A bench that keeps the problem's memory and history as a run does."""

    def __init__(self, problem: Continual, name: str, **fields: Any) -> None:
        super().__init__(problem, solvers.get(name)(**fields), problem.length)
        self.memory = problem.init_memory()

    def y_params(self) -> Params:
        rows = torch.tensor(self.lower.handles[0])[None]
        return {
            name: t[0]
            for name, t in unpack_tasks(PackedTasks(self.lower.layout, rows))["y"].items()
        }

    def walk(self, until: int) -> Params:
        while self.step < until:
            run = step_run(
                self.problem, self.transport, range(self.problem.num_tasks or 1), self.shards, step=self.step, steps=self.steps,
                memory=self.memory,
            )  # fmt: skip
            assert isinstance(run, SharedRun)
            before = self.lower
            self.lower, _ = take_step(self.solver, self.upper, self.lower, run)
            if self.problem.memory_due(self.step):
                seen = before if self.problem.memory_before else self.lower
                self.memory = run.update_memory(self.solver, self.upper.params, seen)
            self.step += 1
        return self.memory


# The networks


def test_sizes_of_the_published_networks() -> None:
    problem = attached(
        Rows(784, 10),
        tasks=20,
        hidden=256,
        embedding=16,
        samples_per_task=2,
        test_samples_per_task=1,
    )
    x = problem.init_upper(torch.Generator())
    assert sum(t.numel() for t in x.values()) == 17_728
    assert sum(t.numel() for t in problem._start().values()) == 269_322


def test_film_by_hand() -> None:
    problem = attached(hidden=2, layers=1)
    x, y = some_x(problem), some_y(problem)
    inputs = torch.randn(
        3, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    tasks = torch.tensor([2, 0, 2])
    got = problem.logits(problem.encode(x, {}), y, inputs, tasks)
    for row, t, logits in zip(inputs, tasks, got, strict=True):
        both = x["film0.weight"] @ x["embedding"][t] + x["film0.bias"]
        gamma, beta = both[:2] / both[:2].norm(), both[2:] / both[2:].norm()
        h = y["layer0.weight"] @ row + y["layer0.bias"]
        out = (gamma * h + beta).clamp(min=0) + h.clamp(min=0)
        assert_tight(logits, y["head.weight"] @ out + y["head.bias"])
    plain = attached(hidden=2, layers=1, method="plain")
    h = inputs @ y["layer0.weight"].T + y["layer0.bias"]
    assert_tight(
        plain.logits({}, y, inputs, tasks), h.clamp(min=0) @ y["head.weight"].T + y["head.bias"]
    )


def test_a_film_of_zero_stays_zero_and_smooth() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    out = controller.unit(rows)
    assert_tight(out.detach(), torch.tensor([[0, 0], [0.6, 0.8]], dtype=torch.float64))
    (grad,) = torch.autograd.grad((out**2 + out).sum(), rows, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), rows)
    assert grad.isfinite().all()
    assert second.isfinite().all()


def test_resnet_judges_each_image_by_itself() -> None:
    class Images(Rows):
        image_shape = (3, 8, 8)

    problem = attached(Images(192, CLASSES), network="resnet18", filters=4)
    x, y = some_x(problem), some_y(problem)
    assert x["film0.weight"].shape == (2 * 8 * 4, 3)  # the last stage alone
    inputs = problem.load([0], 0, "train")["g_inputs"][0]
    tasks = torch.arange(len(inputs)) % 3
    films = problem.encode(x, {})
    together = problem.logits(films, y, inputs, tasks)
    for i in range(len(inputs)):
        assert_tight(problem.logits(films, y, inputs[i : i + 1], tasks[i : i + 1])[0], together[i])
    assert not torch.allclose(problem.logits(films, y, inputs, (tasks + 1) % 3), together)


# Memory


@pytest.mark.parametrize(("policy", "semantic"), [("reservoir", 2), ("reservoir", 0), ("ring", 2)])
def test_memory_is_the_naive_one(policy: Any, semantic: int) -> None:
    starts, capacity = (0, 40, 43, 90), 6
    seed = np.random.SeedSequence((1, 2))
    memory = Memory(starts, capacity, semantic, policy, seed)
    # The same draws, one sample at a time, into plain lists by order of arrival.
    draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence((1, 2))))
    wanted: list[dict[int, int]] = [{}, {}, {}]
    for t in range(3):
        drawn = (
            draw.integers(0, np.arange(starts[t + 1] - starts[t]) + 1)
            if policy == "reservoir"
            else None
        )
        for i, row in enumerate(range(starts[t], starts[t + 1])):
            location = i if i < capacity else (int(drawn[i]) if drawn is not None else i % capacity)
            if location < capacity:
                wanted[t][location] = row
            content = memory.content(row + 1)
            assert [sorted(kept[kept != NONE].tolist()) for kept in content] == [
                sorted(kept.values()) for kept in wanted
            ]
    assert (
        memory.writes == (memory.slots != NONE).sum()
    )  # one write for a sample that stays, none for others
    assert sorted(memory.content(0).ravel().tolist()) == [NONE] * 18
    assert (
        memory.content(90) == Memory(starts, capacity, semantic, policy, seed).content(90)
    ).all()


def test_both_kinds_of_memory_fill_together() -> None:
    memory = Memory((0, 100), 50, 10, "reservoir", np.random.SeedSequence(0))
    for n in (1, 5, 10, 30, 50):
        content = memory.content(n)[0]
        assert (content[:10] != NONE).sum() == -(-n // 5)
        assert (content != NONE).sum() == n


@pytest.mark.parametrize("policy", ["reservoir", "ring"])
def test_g_never_has_what_f_is_measured_on(policy: Any) -> None:
    problem = attached(memory=policy, samples_per_task=30, batch=3)
    memory, seen = problem._samples.memory, []
    for first in range(0, 90, 3):
        incoming = memory.trained(first, first + 3)
        semantic = memory.content(first + 3)[:, :2]
        assert set(incoming.tolist()).isdisjoint(semantic.ravel().tolist())
        seen += incoming.tolist()
    # Late, but not lost: all but what is semantic at the end came once.
    assert sorted(seen + memory.content(90)[:, :2].ravel().tolist()) == list(range(90))


def test_replay_is_of_earlier_tasks_and_semantic_memory_of_all() -> None:
    problem = attached()
    for step in (STEPS - 1, 0, 8):  # back and forth
        task = step // 6
        batch = problem.load([0], step, "train")
        new = batch["g_notes_weight"][0] == 0
        assert set(batch["g_tasks"][0][new].tolist()) <= {task}
        assert set(batch["g_tasks"][0][~new].tolist()) == set(range(task))
        assert len(batch["g_tasks"][0][~new]) == min(6, 3 * task)
        assert set(batch["f_tasks"][0].tolist()) == set(range(task + 1))
        again = attached().load([0], step, "train")
        assert all(torch.equal(batch[name], again[name]) for name in again)
    assert problem.load([0], 8, "train") is problem.load([0], 8, "train")


# The losses


@pytest.mark.parametrize(
    "fields",
    [{}, {"stream": "split"}, {"objective": "derpp", "method": "plain"}, {"objective": "ewc"}],
    ids=str,
)
@pytest.mark.parametrize("step", [0, 9])
def test_blocks_change_nothing(fields: dict[str, Any], step: int) -> None:
    found = []
    for blocks in (1, 3):
        problem = attached(blocks=blocks, **fields)
        oracle = oracle_at(problem, step, some_x(problem), some_memory(problem))
        y = repeated(some_y(problem), blocks)
        for loss in ("upper", "lower"):
            total = oracle.total(Term(loss, y))  # type: ignore[arg-type]
            found.append(
                (
                    total.values[0].mean(),
                    tree.scaled(1 / blocks, total.upper),
                    {k: v.mean(0) for k, v in total.lowers[0].items()},
                )
            )
    assert_tight(found[2:], found[:2])
    assert all(f.isfinite() for f, _, _ in found)


def reference_logits(
    problem: Continual, x: Params, y: Params, inputs: torch.Tensor, tasks: torch.Tensor
) -> torch.Tensor:
    logits = problem.logits(problem.encode(x, {}), y, inputs, tasks)
    return logits.masked_fill(~problem.allowed[tasks], -torch.inf)


def test_ctn_losses_are_the_equations() -> None:
    problem = attached(stream="split")
    x, y, memory = some_x(problem), some_y(problem), some_memory(problem)
    step = 9  # second task, its second batch
    batch = {name: t[0] for name, t in problem.load([0], step, "train").items()}
    oracle = oracle_at(problem, step, x, memory)
    new = batch["g_notes_weight"] == 0
    logits = reference_logits(problem, x, y, batch["g_inputs"], batch["g_tasks"])
    labels = batch["g_labels"]
    loss = functional.cross_entropy(logits[new], labels[new]) + functional.cross_entropy(
        logits[~new], labels[~new]
    )
    # CTN's KLDivLoss is torch's default, a mean over samples and classes: here three, and the two
    # of their task.
    within = problem.allowed[batch["g_tasks"]][~new]
    soft = memory["soft_targets"][batch["g_slots"]][~new]
    cold = (logits[~new][within] / 5).reshape(-1, 2).log_softmax(1)
    loss = loss + 100 * functional.kl_div(cold, soft[within].reshape(-1, 2), reduction="sum") / (
        3 * 2
    )
    assert_tight(oracle.lower(repeated(y, 1)).value[0], loss)

    judged = reference_logits(problem, x, y, batch["f_inputs"], batch["f_tasks"])
    assert_tight(
        oracle.upper(repeated(y, 1)).value[0], functional.cross_entropy(judged, batch["f_labels"])
    )


def test_first_task_has_neither_replay_nor_for_the_baselines_an_f() -> None:
    problem = attached(objective="er", method="plain")
    oracle = oracle_at(problem, 0, some_x(problem), {})
    f = oracle.upper(repeated(some_y(problem), 1))
    assert f.value.item() == 0
    assert all((grad == 0).all() for grad in f.lower.values())
    batch = problem.load([0], 0, "train")
    assert batch["g_inputs"].shape[1] == 4


def test_replay_baselines_by_hand() -> None:
    for objective, beta, alpha in (
        ("er", 1.0, 0.0),
        ("derpp", 0.25, 0.75),
        ("finetune", None, 0.0),
    ):
        problem = attached(
            objective=objective, method="plain", der_alpha=0.75, der_beta=0.25, replay=3
        )
        x, y, memory = some_x(problem), some_y(problem), some_memory(problem)
        oracle = oracle_at(problem, 9, x, memory)
        batch = {name: t[0] for name, t in oracle.batch.items()}
        logits = problem.logits({}, y, batch["g_inputs"], batch["g_tasks"])
        loss = functional.cross_entropy(logits[:4], batch["g_labels"][:4])
        # DER++: the first draw is held to its logits, the second to its labels.
        m = (len(logits) - 4) // (2 if alpha > 0 else 1)
        if beta is None:
            assert len(logits) == 4
        else:
            loss = loss + beta * functional.cross_entropy(logits[-m:], batch["g_labels"][-m:])
        if alpha > 0:
            assert not torch.equal(batch["g_inputs"][4 : 4 + m], batch["g_inputs"][4 + m :])
            loss = loss + alpha * functional.mse_loss(
                logits[4 : 4 + m], memory["logits"][batch["g_slots"][4 : 4 + m]]
            )
        assert_tight(oracle.lower(repeated(y, 1)).value[0], loss)
        again = problem.logits({}, y, batch["f_inputs"], batch["f_tasks"])
        assert_tight(
            oracle.upper(repeated(y, 1)).value[0],
            functional.cross_entropy(again, batch["f_labels"]),
        )


def test_protocols_differ_in_the_classes_that_are_in_question() -> None:
    known = attached(stream="split", method="plain", objective="finetune")
    unknown = attached(
        stream="split", method="plain", objective="finetune", protocol="class_incremental"
    )
    y = some_y(known)
    y["head.bias"][0] += 100.0  # class 0 is always the likeliest
    accuracies = []
    for problem in (known, unknown):
        metrics = oracle_at(problem, 0, some_x(problem), {}, "test").evaluate(repeated(y, 1))
        accuracies.append([float(metrics[f"accuracy_task_0{t}"]) for t in range(3)])
    assert accuracies[0][0] == accuracies[1][0]
    assert min(accuracies[0][1:]) > 0
    assert accuracies[1][1:] == [0, 0]
    losses = [
        float(oracle_at(p, 7, some_x(p), {}).lower(repeated(y, 1)).value) for p in (known, unknown)
    ]
    assert losses[0] < 10 < losses[1]


# What is remembered


@pytest.mark.parametrize("blocks", [1, 3])
def test_soft_targets_are_written_once_at_the_end_of_their_task(blocks: int) -> None:
    problem = attached(blocks=blocks)
    assert [step for step in range(STEPS) if problem.memory_due(step)] == [5, 11, 17]
    walk = Walk(problem, "bome", inner_steps=2, inner_lr=0.05, lower_lr=0.05, upper_lr=0.1)
    assert (walk.walk(5)["soft_targets"] == 0).all()
    x, y = None, None
    written = walk.walk(6)["soft_targets"]
    x, y = walk.upper.params, walk.y_params()
    rows = problem._samples.memory.content(11)[0, 2:]
    train = problem._samples._stream.train
    chosen = torch.from_numpy(rows)
    logits = reference_logits(
        problem, x, y, train.examples.rows(chosen, torch.float64), train.tasks[chosen]
    )
    assert_tight(written[:3], (logits / 5).softmax(1))
    assert (written[3:] == 0).all()
    later = walk.walk(STEPS)["soft_targets"]
    assert torch.equal(later[:3], written[:3])
    assert_tight(later.sum(1), torch.ones(9, dtype=torch.float64))


def test_er_ace_judges_what_comes_among_its_own_classes() -> None:
    problem = attached(
        objective="er_ace", method="plain", stream="split", protocol="class_incremental"
    )
    plain = attached(objective="er", method="plain", stream="split", protocol="class_incremental")
    y = tree.leaves(some_y(problem))
    for step in (9, STEPS - 1):
        batch = {name: t[0] for name, t in problem.load([0], step, "train").items()}
        new = (
            torch.arange(len(batch["g_labels"])) < 4
            if step == 9
            else torch.arange(len(batch["g_labels"])) < 3
        )
        present = batch["g_labels"][new].unique()
        logits = problem.logits({}, y, batch["g_inputs"], batch["g_tasks"])
        absent = torch.ones(CLASSES, dtype=torch.bool)
        absent[present] = False
        own = logits[new].masked_fill(absent, -torch.inf)
        incoming = functional.cross_entropy(own, batch["g_labels"][new])
        loss = incoming + functional.cross_entropy(logits[~new], batch["g_labels"][~new])
        assert_tight(
            oracle_at(problem, step, {}, {}).lower(repeated(tree.detached(y), 1)).value[0],
            loss.detach(),
        )
        # What is absent is neither raised nor lowered by what comes.
        (bias,) = torch.autograd.grad(incoming, [y["head.bias"]])
        assert (bias[absent] == 0).all()
        others = plain.load([0], step, "train")
        assert all(torch.equal(others[name][0], batch[name]) for name in ("g_inputs", "g_weight"))


@pytest.mark.parametrize("objective", ["er", "derpp"])
def test_one_memory_of_the_whole_stream(objective: Any) -> None:
    problem = attached(objective=objective, method="plain", memory_total=7, replay=4, rounds=1)
    memory = problem._samples.memory
    naive = Memory((0, 33), 7, 0, "reservoir", np.random.SeedSequence((0, 16)))
    assert (memory.slots == naive.slots).all()
    train = problem._samples._stream.train
    for step, first in ((3, 11), (8, 30), (0, 0)):  # three batches a task
        batch = {name: t[0] for name, t in problem.load([0], step, "train").items()}
        kept = naive.content(first)[0]
        kept = kept[kept != NONE]
        there = train.examples.inputs[torch.from_numpy(kept)].tolist()
        n = 4 if step % 3 < 2 else 3
        drawn = batch["g_inputs"][n:].tolist()
        assert len(drawn) == min(4, len(kept)) * (2 if objective == "derpp" else 1)
        assert all(row in there for row in drawn)
    # The present task's earlier batches are among what is replayed.
    tasks = [t for s in (4, 5) for t in problem.load([0], s, "train")["f_tasks"][0].tolist()]
    assert 1 in tasks
    assert {name: t.shape for name, t in problem.init_memory().items()} == (
        {"logits": (7, CLASSES)} if objective == "derpp" else {}
    )


def test_a_memory_of_the_whole_stream_begins_as_that_of_a_longer_one() -> None:
    short, long = (
        Memory((0, n), 7, 0, "reservoir", np.random.SeedSequence(3)).slots for n in (50, 90)
    )
    assert (long[:50] == short).all()


def test_derpp_stores_the_logits_before_the_step() -> None:
    problem = attached(objective="derpp", method="plain", memory_total=8, rounds=1, blocks=2)
    walk = Walk(problem, "lower_only", inner_lr=0.1)
    train = problem._samples._stream.train
    for step, (first, last) in enumerate(((0, 4), (4, 8), (8, 11), (11, 15))):
        y = walk.y_params() if step else problem._start()
        before = walk.memory["logits"]
        after = walk.walk(step + 1)["logits"]
        for slot, row in enumerate(problem._samples.memory.content(last)[0]):
            if row < first:
                assert torch.equal(after[slot], before[slot])
            else:
                wanted = problem.logits(
                    {}, y, train.examples.inputs[row][None], train.tasks[row : row + 1]
                )
                assert_tight(after[slot], wanted[0])


def test_derpp_stores_logits_of_what_came() -> None:
    problem = attached(objective="derpp", method="plain", blocks=2)
    walk = Walk(problem, "lower_only", inner_lr=0.1)
    before = walk.walk(6)["logits"]
    walk.walk(7)
    y = walk.y_params()  # a batch has two rounds: with which the last of them begins
    after = walk.walk(8)["logits"]
    content = problem._samples.memory.content(15)
    train = problem._samples._stream.train
    for t in range(3):
        for slot in range(5):
            row, number = content[t, slot], 5 * t + slot
            if row < 11:  # of the first task, or none yet
                assert torch.equal(after[number], before[number])
            else:
                wanted = problem.logits({}, y, train.examples.inputs[row][None], torch.tensor([t]))[
                    0
                ]
                assert_tight(after[number], wanted)


def test_ewc_adds_up_fisher_information() -> None:
    one, two = (attached(objective="ewc", method="plain", blocks=blocks) for blocks in (1, 2))
    memory = some_memory(one)
    x, y = some_x(one), some_y(one)
    found = []
    for problem in (one, two):
        oracle = oracle_at(problem, 5, x, memory)
        found.append(oracle.update_memory(repeated(y, problem.blocks)))
    assert_tight(found[1], found[0])
    train = one._samples._stream.train
    leaves = tree.leaves(y)
    wanted = {name: memory[f"fisher.{name}"].clone() for name in y}
    for row in range(5):
        logits = one.logits(
            {}, leaves, train.examples.inputs[row][None], train.tasks[row : row + 1]
        )
        loss = functional.cross_entropy(logits, train.examples.labels[row : row + 1])
        for name, grad in zip(y, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            wanted[name] += grad**2 / 5
    assert_tight({name: found[0][f"fisher.{name}"] for name in y}, wanted)
    assert_tight({name: found[0][f"anchor.{name}"] for name in y}, y)
    # And g is drawn to the anchor.
    g = oracle_at(one, 8, x, memory).lower(repeated(y, 1)).value[0]
    plain = (
        oracle_at(attached(objective="finetune", method="plain"), 8, x, {})
        .lower(repeated(y, 1))
        .value[0]
    )
    pull = sum(
        float((memory[f"fisher.{name}"] * (y[name] - memory[f"anchor.{name}"]) ** 2).sum())
        for name in y
    )
    assert_tight(g, plain + 50 * pull)


def test_joint_sees_all_tasks_at_once() -> None:
    problem = attached(objective="joint", method="plain")
    assert problem.length == 2 * 9  # 33 samples in batches of 4
    assert [step for step in range(problem.length) if problem.milestone(step)] == [
        problem.length - 1
    ]
    seen = torch.cat(
        [problem.load([0], step, "train")["g_inputs"][0] for step in range(0, problem.length, 2)]
    )
    whole = problem._samples._stream.train.examples.inputs
    assert sorted(seen.tolist()) == sorted(whole.tolist())
    tasks = problem.load([0], 0, "train")["g_tasks"][0]
    assert len(set(tasks.tolist())) > 1
    assert problem.final_metrics([{"accuracy_task_00": 0.5, "accuracy_task_01": 1.0}]) == {
        "acc": 0.75
    }


# Solvers


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_ctn_moves_x_along_the_partial_gradient_at_the_new_y(clip: float | None) -> None:
    problem = attached(blocks=2)
    walk = Walk(problem, "ctn", inner_steps=2, inner_lr=0.05, upper_lr=0.3, clip_norm=clip)
    x = {name: t.clone() for name, t in walk.upper.params.items()}
    walk.walk(1)
    single = attached()
    batch = {name: t[0] for name, t in single.load([0], 0, "train").items()} | single.init_memory()
    leaves, y = tree.leaves(x), single._start()
    for _ in range(2):
        y = tree.leaves(y)
        g = single.lower_loss(single.encode(x, batch), y, batch)
        y = {
            n: t - 0.05 * grad
            for (n, t), grad in zip(
                y.items(), torch.autograd.grad(g, list(y.values())), strict=True
            )
        }
    f = single.upper_loss(single.encode(leaves, batch), tree.detached(y), batch)
    grads = torch.autograd.grad(f, list(leaves.values()))
    if clip is not None:  # 1 by default, as in the released code
        length = torch.cat([grad.flatten() for grad in grads]).norm()
        assert length > clip
        grads = tuple(grad * clip / length for grad in grads)
    assert_tight(walk.y_params(), tree.detached(y))
    assert_tight(
        walk.upper.params,
        {n: t - 0.3 * grad for (n, t), grad in zip(x.items(), grads, strict=True)},
    )


def test_lower_only_leaves_x_alone() -> None:
    walk = Walk(attached(objective="er", method="ctn"), "lower_only", inner_steps=2, inner_lr=0.05)
    before = walk.x().clone()
    walk.walk(STEPS)
    assert torch.equal(walk.x(), before)


def test_agem_projects_where_gradients_conflict() -> None:
    d = {
        "a": torch.tensor([[1.0, 0.0], [1.0, 2.0], [1.0, 1.0]]),
        "b": torch.tensor([[1.0], [0.0], [0.0]]),
    }
    m = {
        "a": torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]),
        "b": torch.tensor([[-1.0], [3.0], [0.0]]),
    }
    got, conflict = projected(d, m)
    assert conflict.tolist() == [True, False, False]
    assert got["a"].tolist() == [[0, 0], [1, 2], [1, 1]]
    assert got["b"].tolist() == [[0], [0], [0]]


def test_agem_step_by_hand_and_in_one_reduce() -> None:
    problem = attached(objective="finetune", method="plain", blocks=2)
    walk = Walk(problem, "agem", inner_lr=0.1)
    walk.walk(8)
    y = walk.y_params()
    oracle = oracle_at(attached(objective="finetune", method="plain"), 8, some_x(problem), {})
    d, m = (
        tree.flatten({n: t[0] for n, t in oracle._gradient(loss, repeated(y, 1)).lower.items()})
        for loss in ("lower", "upper")
    )
    wanted = d - min(float(d @ m), 0.0) / float(m @ m) * m
    run = step_run(problem, walk.transport, range(2), 2, step=8, steps=STEPS)
    lower, metrics = take_step(walk.solver, walk.upper, walk.lower, run)
    assert run.traffic.reduces == 1
    walk.lower = lower
    assert_tight(tree.flatten(walk.y_params()), tree.flatten(y) - 0.1 * wanted)
    assert metrics["projected_share"] == float(d @ m < 0)
    # What is left of the gradient does not make the memory's loss grow (1e-12: rounding of the product).
    assert float(wanted @ m) > -1e-12


@pytest.mark.parametrize("name", ["lower_only", "agem"])
def test_solvers_without_x_want_a_y_that_lasts(name: str) -> None:
    with pytest.raises(ConfigError, match="move y alone"):
        solvers.get(name)().check(FewShot())


# Figures


def test_scores_by_hand() -> None:
    matrix = np.array([[0.9, 0.2, 0.1], [0.95, 0.8, 0.3], [0.6, 0.7, 0.85]])
    wanted = {
        "acc": (0.6 + 0.7 + 0.85) / 3,
        "ft": (0.9 + 0.8 + 0.85) / 3,
        "nbt": (0.3 + 0.1 + 0.0) / 3,
        "fm": ((0.95 - 0.6) + (0.8 - 0.7)) / 2,
        "bwt": ((0.6 - 0.9) + (0.7 - 0.8)) / 2,
        "fwt": ((0.2 - 0.5) + (0.3 - 0.5)) / 2,
    }
    found = report.scores(matrix, [0.5, 0.5, 0.5])
    assert found == pytest.approx(wanted)
    assert found["ft"] == pytest.approx(found["acc"] + found["nbt"])
    # A run that was cut short has learned fewer tasks than it is tested on.
    assert report.scores(matrix[:2], [0.5] * 3) == pytest.approx(
        {"acc": 0.875, "ft": 0.85, "nbt": -0.025, "fm": -0.05, "bwt": 0.05, "fwt": -0.3}
    )
    assert set(report.scores(matrix[:1], [0.5] * 3)) == {"acc", "ft", "nbt"}


@pytest.mark.parametrize("blocks", [1, 4])
def test_accuracies_are_those_of_the_uncut_test_samples(blocks: int) -> None:
    problem = attached(blocks=blocks, stream="split", test_samples_per_task=None)
    x, y = some_x(problem), some_y(problem)
    metrics = oracle_at(problem, 0, x, {}, "test").evaluate(repeated(y, blocks))
    test = problem._samples._stream.test
    hits = (
        reference_logits(problem, x, y, test.examples.inputs, test.tasks).argmax(1)
        == test.examples.labels
    )
    for t in range(3):
        assert_tight(metrics[f"accuracy_task_0{t}"].mean(), hits[test.tasks == t].double().mean())


def test_a_run_from_config_to_files(tmp_path: Path) -> None:
    config = {
        "problem": {
            "name": "continual",
            "tasks": 2,
            "samples_per_task": 40,
            "test_samples_per_task": 50,
            "hidden": 16,
            "blocks": 2,
        },
        "data": {"dataset": "digits"},
        "solver": {
            "name": "bome",
            "inner_steps": 2,
            "inner_lr": 0.03,
            "lower_lr": 0.03,
            "upper_lr": 0.1,
        },
        "log": {"tensorboard": False},
    }
    whole = bomemeta.train(config, [f"output_dir={tmp_path / 'whole'}"])
    assert whole.steps == 16
    cut = bomemeta.train(
        config, ["steps=11", f"output_dir={tmp_path / 'cut'}"]
    )  # in the middle of the second task
    assert set(cut.metrics) > {"acc", "ft", "nbt"}
    resumed = bomemeta.resume(tmp_path / "cut", ["steps=16"])
    assert resumed.upper_sha256 == whole.upper_sha256
    assert {n: v for n, v in resumed.metrics.items() if not n.endswith("_s")} == {
        n: v for n, v in whole.metrics.items() if not n.endswith("_s")
    }
    assert whole.metrics["ft"] == pytest.approx(whole.metrics["acc"] + whole.metrics["nbt"])
    saved = json.loads((tmp_path / "whole" / "accuracy_matrix.json").read_text())
    assert (saved["protocol"], saved["stream"], np.shape(saved["matrix"])) == (
        "task_incremental",
        "permuted",
        (2, 2),
    )
    assert saved["acc"] == pytest.approx(np.mean(saved["matrix"][1]))
    for name in ("accuracy_matrix.png", "accuracy_curve.png"):
        assert (tmp_path / "whole" / name).read_bytes().startswith(b"\x89PNG")


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"protocol": "class_incremental"},
            "class_incremental does not tell the task.* method: plain",
        ),
        ({"semantic_per_task": 5}, "semantic_per_task: got 5 of memory_per_task 5"),
        ({"objective": "er", "memory_per_task": 0}, "memory_per_task: got 0; objective er"),
        ({"memory_total": 9}, "memory_total: got 9; objective ctn keeps a memory of each task"),
        ({"stream": "split", "tasks": 4}, "do not make 4 equal groups"),
        (
            {"network": "resnet18", "stream": "split"},
            "network: resnet18 wants pictures; Rows has rows of 10 numbers",
        ),
    ],
)
def test_combinations_without_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attached(Rows(10, CLASSES), **fields)


def test_episodes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.dataset: continual wants labelled rows .* Toy"):
        attached(Toy())


def test_y_starts_at_the_seed() -> None:
    one, again, other = attached(), attached(blocks=2), attached(seed=1)
    assert torch.equal(one._start()["layer0.weight"], again._start()["layer0.weight"])
    assert not torch.equal(one._start()["layer0.weight"], other._start()["layer0.weight"])
