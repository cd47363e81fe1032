"""MAML and its kin against gradients written out by hand, finite differences and learn2learn's own
algorithms; on few_shot and on problems of one's own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import needs
import pytest
import torch
from torch.nn import functional
from toy import Bench, attached, one_thread

from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.problem import Problem, SharedProblem
from bomemeta.errors import ConfigError
from bomemeta.problems.analytic import Analytic
from bomemeta.problems.few_shot import FewShot
from bomemeta.solvers.anil import ANIL
from bomemeta.solvers.bome import BOME
from bomemeta.solvers.fomaml import FOMAML
from bomemeta.solvers.learner_options import episodes
from bomemeta.solvers.maml import MAML
from bomemeta.solvers.meta_sgd import STEP_SIZE, MetaSGD
from bomemeta.solvers.reptile import Reptile

ALL = [MAML, FOMAML, ANIL, MetaSGD, Reptile]

POLICIES = ["transductive", "inductive"]
TASKS = range(3)
OPTIONS = {"inner_steps": 3, "inner_lr": 0.3}
# The same float64 sums in another order: rounding, which the inner steps and their derivatives make
# larger.
TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def network(batch_norm="transductive", **fields):
    return attached(
        FewShot(
            form="network",
            ways=3,
            shots=2,
            queries=2,
            test_queries=3,
            width=4,
            batch_norm=batch_norm,
            **fields,
        )
    )


def start(problem, solver):
    """x as a run has it at step 0, its head away from 0: at a head of 0 the backbone's inner
    gradients vanish.
    """
    x = problem.init_upper(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    x = {
        name: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) / 3
        if name in problem.head_names
        else tensor
        for name, tensor in x.items()
    }
    x = dict(solver.start(x, 1).params)
    for name, tensor in x.items():
        if name.startswith(STEP_SIZE):  # each its own
            x[name] = tensor * (
                0.5 + torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            )
    return x


def kernel(problem, solver, x, tasks=TASKS):
    return episodes(solver, LocalOracle(problem, x, problem.load(tasks, 0, "train"), "loop"), None)


def by_hand(problem, solver, x, task, second_order=True):
    """(y, query loss, support loss) of one task, in autograd alone and from the problem's
    documented BatchNorm policy.
    """
    support, labels = task["support"], task["support_labels"]
    names = (
        list(problem.head_names)
        if isinstance(solver, ANIL)
        else [name for name in x if not name.startswith(STEP_SIZE)]
    )

    def loss(y, images, wanted, rows):
        backbone = {
            name: tensor
            for name, tensor in y.items()
            if name not in problem.head_names and STEP_SIZE not in name
        }
        features = torch.func.functional_call(problem.network.module, backbone, (images, rows))
        logits = features @ y["head.weight"] + y["head.bias"]
        return functional.cross_entropy(logits[len(logits) - len(wanted) :], wanted)

    y = dict(x)
    for _ in range(solver.inner_steps):
        value = loss(y, support, labels, None)
        grads = torch.autograd.grad(
            value, [y[name] for name in names], create_graph=second_order, retain_graph=True
        )
        for name, grad in zip(names, grads, strict=True):
            size = x[STEP_SIZE + name] if isinstance(solver, MetaSGD) else solver.inner_lr
            y[name] = y[name] - size * grad
    if problem.batch_norm == "transductive":
        query = loss(y, task["query"], task["query_labels"], None)
    else:
        query = loss(y, torch.cat([support, task["query"]]), task["query_labels"], len(support))
    return y, query, loss(y, support, labels, None)


def tasks_of(problem, split="train"):
    stack = problem.load(TASKS, 0, split)
    return [{name: tensor[i] for name, tensor in stack.items()} for i in TASKS]


def leaves(x):
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in x.items()}


def assert_close(got, wanted):
    assert list(got) == list(wanted)
    for name in wanted:
        torch.testing.assert_close(
            got[name],
            wanted[name],
            atol=TOLERANCE,
            rtol=TOLERANCE,
            msg=lambda m, n=name: f"{n}: {m}",
        )


# Directions


@pytest.mark.parametrize("batch_norm", POLICIES)
@pytest.mark.parametrize("kind", [MAML, ANIL, MetaSGD])
def test_direction_is_the_gradient_through_the_steps(kind, batch_norm):
    problem, solver = network(batch_norm), kind(**OPTIONS)
    x = start(problem, solver)
    leaf = leaves(x)
    found = [by_hand(problem, solver, leaf, task) for task in tasks_of(problem)]
    total = torch.stack([query for _, query, _ in found]).sum()
    sums = kernel(problem, solver, x).sums
    assert_close(
        sums["direction"],
        dict(zip(x, torch.autograd.grad(total, list(leaf.values())), strict=True)),
    )
    torch.testing.assert_close(sums["upper_loss"], total.detach())
    torch.testing.assert_close(
        sums["lower_loss"], torch.stack([support for *_, support in found]).sum().detach()
    )
    assert all(
        grad.abs().max() > 1e-6 for grad in sums["direction"].values()
    )  # none is trivially equal


@pytest.mark.parametrize("batch_norm", POLICIES)
def test_first_order_direction_is_the_gradient_at_the_adapted_network(batch_norm):
    problem, solver = network(batch_norm), FOMAML(**OPTIONS)
    x = start(problem, solver)
    wanted = {name: torch.zeros_like(tensor) for name, tensor in x.items()}
    for task in tasks_of(problem):
        y = leaves(by_hand(problem, solver, leaves(x), task, second_order=False)[0])
        _, query, _ = by_hand(
            problem, FOMAML(inner_steps=1, inner_lr=1e-300), y, task, second_order=False
        )  # the loss at y
        for name, grad in zip(x, torch.autograd.grad(query, list(y.values())), strict=True):
            wanted[name] += grad
    got = kernel(problem, solver, x).sums["direction"]
    assert_close(got, wanted)
    second = kernel(problem, MAML(**OPTIONS), x).sums["direction"]
    assert max(float((second[name] - got[name]).abs().max()) for name in x) > 1e-3


@pytest.mark.parametrize("kind", [MAML, ANIL, MetaSGD])
def test_direction_against_finite_differences(kind):
    """Central differences of the mean query loss along a random direction, and for Meta-SGD along
    the step sizes alone.
    """
    problem, solver = network(), kind(**OPTIONS)
    x = start(problem, solver)
    generator = torch.Generator().manual_seed(2)
    along = {
        name: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in x.items()
    }
    if kind is MetaSGD:
        along = {
            name: tensor if name.startswith(STEP_SIZE) else torch.zeros_like(tensor)
            for name, tensor in along.items()
        }
    # Small enough that no ReLU or max-pool changes sides: the loss is then smooth, and the error
    # h^2 and rounding / h.
    h = 1e-6
    ends = [
        kernel(problem, solver, {name: x[name] + sign * h * along[name] for name in x}).sums[
            "upper_loss"
        ]
        for sign in (1, -1)
    ]
    direction = kernel(problem, solver, x).sums["direction"]
    slope = torch.stack([(direction[name] * along[name]).sum() for name in x]).sum()
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * h), slope, rtol=1e-5, atol=1e-7)
    assert abs(float(slope)) > 1e-3


def test_reptile_moves_x_to_the_mean_of_the_adapted_networks():
    problem, solver = network(), Reptile(**OPTIONS, upper_lr=1.0)
    x = start(problem, solver)
    adapted = [
        by_hand(problem, solver, leaves(x), task, second_order=False)[0]
        for task in tasks_of(problem)
    ]
    direction = kernel(problem, solver, x).sums["direction"]
    assert_close(direction, {name: sum(x[name] - y[name].detach() for y in adapted) for name in x})

    bench = Bench(problem, solver, 1)
    bench.upper = solver.start(x, 1)
    bench.advance(TASKS)
    assert_close(
        bench.upper.params,
        {name: sum(y[name].detach() for y in adapted) / len(TASKS) for name in x},
    )


def test_anil_is_maml_where_the_backbone_does_not_adapt():
    """Meta-SGD with step sizes of 0 in the backbone is ANIL, and with equal ones MAML."""
    problem = network()
    sizes = MetaSGD(**OPTIONS)
    x = {
        name: tensor
        for name, tensor in start(problem, sizes).items()
        if not name.startswith(STEP_SIZE)
    }
    for solver, adapts in ((MAML(**OPTIONS), list(x)), (ANIL(**OPTIONS), problem.head_names)):
        step = {
            STEP_SIZE + name: torch.full_like(x[name], 0.3 if name in adapts else 0.0) for name in x
        }
        got = kernel(problem, sizes, {**x, **step}).sums["direction"]
        assert_close({name: got[name] for name in x}, kernel(problem, solver, x).sums["direction"])


# Adaptation for meta-testing


@pytest.mark.parametrize("batch_norm", POLICIES)
@pytest.mark.parametrize("kind", ALL)
def test_evaluation_adapts_as_training_does(kind, batch_norm):
    problem, solver = network(batch_norm), kind(**OPTIONS)
    x = start(problem, solver)
    oracle = LocalOracle(problem, x, problem.load(TASKS, 0, "test"), "loop", differentiable=False)
    with torch.no_grad():
        y = solver.adapt(oracle, None)
    assert not any(tensor.requires_grad for tensor in y.values())
    assert list(y) == list(problem.init_upper(torch.Generator()))
    metrics = oracle.evaluate(y)
    for i, task in enumerate(tasks_of(problem, "test")):
        wanted, query, _ = by_hand(problem, solver, leaves(x), task)
        assert_close(
            {name: tensor[i] for name, tensor in y.items()},
            {name: wanted[name].detach() for name in y},
        )
        torch.testing.assert_close(metrics["loss"][i], query.detach())


def test_anil_leaves_the_backbone_alone_and_maml_does_not():
    problem = network()
    for solver in (MAML(**OPTIONS), ANIL(**OPTIONS)):
        x = start(problem, solver)
        y = solver.adapt(
            LocalOracle(problem, x, problem.load(TASKS, 0, "test"), "loop", differentiable=False),
            None,
        )
        moved = {name for name in y if not torch.equal(y[name], x[name].expand_as(y[name]))}
        assert moved == set(problem.head_names if isinstance(solver, ANIL) else x)


@pytest.mark.parametrize("kind", ALL)
def test_adaptation_without_steps_is_x(kind):
    problem, solver = network(), kind(**OPTIONS)
    x = start(problem, solver)
    y = solver.adapt(
        LocalOracle(problem, x, problem.load(TASKS, 0, "test"), "loop", differentiable=False), 0
    )
    assert all(torch.equal(y[name], x[name].expand_as(y[name])) for name in y)


# Steps


@pytest.mark.parametrize("kind", ALL)
def test_steps_repeat_bit_for_bit_and_touch_no_global_state(kind):
    """Also with another solver run in between, which shares the problem's network."""
    problem = network()
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        bench = Bench(problem, kind(**OPTIONS, upper_lr=0.01, upper_optimizer="adam"), 3, shards=2)
        before = torch.get_rng_state()
        bench.finish()
        assert torch.equal(before, torch.get_rng_state())
        ends.append(bench.x())
        Bench(problem, (MAML if kind is ANIL else ANIL)(**OPTIONS), 1).finish()
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], Bench(problem, kind(**OPTIONS), 3).x())


@pytest.mark.parametrize("kind", ALL)
def test_number_of_shards_changes_rounding_alone(kind):
    problem = network()
    ends = []
    for shards in (1, 3):
        bench = Bench(problem, kind(**OPTIONS, upper_lr=0.01), 2, shards=shards)
        bench.finish()
        ends.append(bench.x())
    torch.testing.assert_close(*ends, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("kind", "gradients", "products"),
    [(MAML, 4, 3), (FOMAML, 4, 0), (ANIL, 4, 3), (MetaSGD, 4, 3), (Reptile, 3, 0)],
)
def test_costs_and_names_in_the_log(kind, gradients, products):
    metrics = Bench(network(), kind(**OPTIONS), 1).advance(TASKS).metrics
    assert (metrics["gradient_evaluations"], metrics["hessian_products"]) == (gradients, products)
    assert {"upper_loss", "lower_loss", "hypergradient_norm", "upper_update_norm"} <= set(metrics)


@pytest.mark.parametrize("kind", ALL)
def test_learns(kind):
    """On tasks that were not trained on, against the untrained network: measured to gain 0.22 or
    more.
    """
    problem = attached(
        FewShot(form="network", ways=3, shots=2, queries=3, test_queries=5, width=8),
        dtype=torch.float32,
    )
    adam = {"upper_lr": 0.01, "upper_optimizer": "adam"}
    solver = kind(inner_steps=3, inner_lr=0.2, **({"upper_lr": 1.0} if kind is Reptile else adam))
    bench = Bench(problem, solver, 12)

    def accuracy():
        oracle = LocalOracle(
            problem,
            bench.upper.params,
            problem.load(range(20), 0, "test"),
            "loop",
            differentiable=False,
        )
        return float(oracle.evaluate(solver.adapt(oracle, None))["accuracy"].mean())

    before = accuracy()
    while bench.step < bench.steps:
        bench.advance(range(4 * bench.step, 4 * bench.step + 4))
    assert (
        accuracy() > before + 0.1
    )  # 20 tasks of 15 queries: the gain's standard error is about 0.03


# x with entries of the solver's own


def test_problem_ignores_entries_that_are_not_its_own():
    problem, solver = network(), MetaSGD(**OPTIONS)
    x = start(problem, solver)
    assert len(x) == 2 * len(problem.init_upper(torch.Generator()))
    plain = {name: tensor for name, tensor in x.items() if not name.startswith(STEP_SIZE)}
    batch = problem.load(TASKS, 0, "train")
    with_sizes, without = (LocalOracle(problem, upper, batch, "loop") for upper in (x, plain))
    assert list(with_sizes.init_lower()) == list(plain)
    y = without.init_lower()
    assert torch.equal(with_sizes.lower(y).value, without.lower(y).value)
    head = attached(FewShot(form="head", ways=3, queries=2, width=4))
    upper = head.init_upper(torch.Generator().manual_seed(0))
    one = {name: tensor[0] for name, tensor in head.load([0], 0, "train").items()}
    torch.testing.assert_close(
        head.encode({**upper, "extra": torch.zeros(1)}, one),
        head.encode(upper, one),
        atol=0,
        rtol=0,
    )


# What is refused


@dataclasses.dataclass(kw_only=True)
class Shared(SharedProblem, FewShot):
    pass


def small(form="network", **fields):
    return attached(FewShot(form=form, ways=3, queries=2, test_queries=2, width=4, **fields))


REFUSED = [
    (ALL, lambda: small("head", head="ridge"), "problem.name: y of FewShot does not start from x"),
    (ALL, lambda: attached(Analytic(case="coreset")), "problem.name: y of Analytic does not start"),
    (ALL, lambda: Shared(form="network"), "problem.name: Shared has one lower variable"),
    ([MetaSGD, Reptile], lambda: small("head"), "problem.name: the losses of FewShot see x through"),
    ([MetaSGD, Reptile], lambda: attached(Renamed()), "y of Renamed has y, and x no entry of that"),
    ([ANIL], lambda: attached(Pull()), r"head_names of Pull is \(\), and its y has w, b"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "make", "message"),
    [(kind, make, message) for kinds, make, message in REFUSED for kind in kinds],
)
def test_refused_problems(kind, make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        kind().check(make())
    assert kind.__name__ in str(caught.value)


@pytest.mark.parametrize("kind", ALL)
def test_network_form_is_taken(kind):
    kind().check(FewShot(form="network"))
    BOME().check(FewShot(form="network"))
    for tasks in (None, 3):
        for kind_ in (MAML, FOMAML, ANIL):
            kind_().check(small("head", fixed_tasks=tasks))


# Problems of one's own, with closed forms


class Pull(Problem):
    """y = {w, b} from x of the same names; g = |w - c|^2 / 2 + b^2 / 2, f = |w|^2 / 2 + sum b. The
    gradient of f through T steps of size a: (1 - a)^T in w and in b.
    """

    tasks: int | None = None

    @property
    def num_tasks(self) -> int | None:
        return self.tasks

    def init_upper(self, generator: torch.Generator) -> Any:
        return {name: torch.randn(2, generator=generator, dtype=self.dtype) for name in ("w", "b")}

    def load(self, task_ids, step, split) -> Any:
        return {"c": torch.tensor(list(task_ids), dtype=self.dtype)[:, None].expand(-1, 2)}

    def init_lower(self, encoded, batch) -> Any:
        return {name: encoded[name] for name in ("w", "b")}

    def upper_loss(self, encoded, lower, batch) -> Any:
        return (lower["w"] ** 2).sum() / 2 + lower["b"].sum()

    def lower_loss(self, encoded, lower, batch) -> Any:
        return ((lower["w"] - batch["c"]) ** 2).sum() / 2 + (lower["b"] ** 2).sum() / 2


class Headed(Pull):
    head_names = ("b",)  # type: ignore[assignment]


class Encoded(Pull):
    """x enters through an encode: y starts from 2 x."""

    def encode(self, upper, batch) -> Any:
        return {name: 2 * tensor for name, tensor in upper.items()}


class Boxed(Pull):
    def project_lower(self, lower) -> Any:
        return {name: tensor.clamp(-0.1, 0.1) for name, tensor in lower.items()}


class Renamed(Pull):
    def init_lower(self, encoded, batch) -> Any:
        return {"y": encoded["w"]}


RATE, STEPS = 0.3, 3
LEFT = (1 - RATE) ** STEPS  # of the distance to the minimiser


@pytest.mark.parametrize("task_map", ["loop", "vmap"])
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("scale", [1, 2])
def test_closed_forms_on_a_problem_of_ones_own(kind, scale, task_map):
    if scale == 2 and kind.needs_pairs:
        pytest.skip("refused: x is seen through an encode")
    problem = attached({1: Headed, 2: Encoded}[scale]())
    if kind is ANIL:
        problem = attached(type("Head", (type(problem),), {"head_names": ("b",)})())
    solver = kind(inner_steps=STEPS, inner_lr=RATE)
    solver.check(problem)
    x = problem.init_upper(torch.Generator().manual_seed(0))
    upper = dict(solver.start(x, 1).params)
    batch = problem.load(TASKS, 0, "train")
    found = episodes(solver, LocalOracle(problem, upper, batch, task_map), None)
    left = 1.0 if kind is ANIL else LEFT  # ANIL's w does not adapt
    w = [task + left * (scale * x["w"] - task) for task in TASKS]
    b = LEFT * scale * x["b"]
    assert_close(found.lower["y"], {"w": torch.stack(w), "b": b.expand(len(TASKS), -1)})
    first = kind is FOMAML
    wanted = {
        "w": scale * (1.0 if first else left) * sum(w),
        "b": torch.full_like(b, scale * (1.0 if first else LEFT) * len(TASKS)),
    }
    if kind is Reptile:
        wanted = {"w": sum(x["w"] - y for y in w), "b": len(TASKS) * (x["b"] - b)}
    assert_close({name: found.sums["direction"][name] for name in wanted}, wanted)


def test_tasks_that_persist_are_judged_at_their_adapted_y():
    problem = attached(Pull())
    problem.tasks = 3
    bench = Bench(problem, MAML(inner_steps=STEPS, inner_lr=RATE), 2)
    x = {name: tensor.clone() for name, tensor in bench.upper.params.items()}
    bench.advance(TASKS)
    kept = bench.lower.handles
    assert sorted(kept) == list(TASKS)
    for task in TASKS:
        wanted = torch.cat([task + LEFT * (x["w"] - task), LEFT * x["b"]])
        torch.testing.assert_close(torch.tensor(kept[task]), wanted)


def test_inner_steps_stay_in_the_admissible_set():
    problem, solver = attached(Boxed()), MAML(inner_steps=STEPS, inner_lr=RATE)
    x = problem.init_upper(torch.Generator().manual_seed(0))
    oracle = LocalOracle(problem, x, problem.load(TASKS, 0, "train"), "loop")
    for y in (solver.adapt(oracle, None), episodes(solver, oracle, None).lower["y"]):
        assert max(float(tensor.abs().max()) for tensor in y.values()) <= 0.1


# learn2learn's algorithms


@needs.learn2learn
@pytest.mark.parametrize("kind", [MAML, FOMAML, ANIL, MetaSGD])
def test_directions_are_those_of_learn2learn(kind):
    """Gradients to 1e-5, in single precision."""
    from bomemeta.l2l import learn2learn

    problem = attached(
        FewShot(form="network", ways=3, shots=2, queries=2, test_queries=3, width=4),
        dtype=torch.float32,
    )
    solver = kind(**OPTIONS)
    x = start(problem, solver)
    leaf = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in x.items()}
    weights = {name: tensor for name, tensor in leaf.items() if not name.startswith(STEP_SIZE)}
    adapts = list(problem.head_names) if kind is ANIL else list(weights)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.entries = torch.nn.ParameterList(weights[name] for name in adapts)

        def params(self) -> Any:
            return {**weights, **dict(zip(adapts, self.entries, strict=True))}

    algorithms, total = learn2learn().algorithms, torch.zeros(())
    for task in tasks_of(problem):
        if kind is MetaSGD:
            sizes = [leaf[STEP_SIZE + name] for name in adapts]
            learner = algorithms.MetaSGD(Network(), lrs=sizes).clone()
        else:
            learner = algorithms.MAML(Network(), solver.inner_lr, kind is FOMAML).clone()
        for _ in range(solver.inner_steps):
            y = learner.module.params()
            logits = problem.logits(y, problem.support_features(y, task))
            learner.adapt(functional.cross_entropy(logits, task["support_labels"]))
        y = learner.module.params()
        logits = problem.logits(y, problem.query_features(y, task))
        total = total + functional.cross_entropy(logits, task["query_labels"])
    wanted = dict(zip(leaf, torch.autograd.grad(total, list(leaf.values())), strict=True))
    got = kernel(problem, solver, x).sums["direction"]
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-5, rtol=1e-5)
