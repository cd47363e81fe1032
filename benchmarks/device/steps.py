"""Part `steps`: a whole step of BOME over supervised ones on the same network, images and precision.

Few-shot (conv4, resnet12): one step with the per-task barrier over ONE forward and backward pass of
the backbone on the same images, as one batch and task by task; the faster of both is the floor.
A whole network as the shared y (ResNet-18, GPT): a step takes T + 3 gradients, so it is compared
with T + 3 supervised steps on batches of the same size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from benchmarks.device.resnet18 import ResNet18
from benchmarks.device.sizes import (
    FULL,
    TINY,
    Say,
    Sizes,
    device_here,
    ms,
    peak_mib,
    ratio,
    timed,
    wait,
)
from benchmarks.sized import Noise
from benchmarks.supervised import Preloaded, channels_last_network
from bomemeta.core.problem import Batch, Encoded, SharedProblem, Split
from bomemeta.core.solver import LowerStates, take_step
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.distributed.joint import step_run
from bomemeta.distributed.rounds import StepRun
from bomemeta.distributed.serial import SerialTransport
from bomemeta.distributed.worker import ShardWorker
from bomemeta.nets.gpt import GPT
from bomemeta.solvers.bome import BOME

PRECISIONS = ("float32", "tf32", "bfloat16")
INNER_STEPS = 5


@contextmanager
def precision(name: str, device: str) -> Iterator[None]:
    """float32 without TensorFloat-32, float32 with it, or autocast to bfloat16; what was set before
    comes back.
    """
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    on = name == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        with torch.autocast(
            device.split(":")[0], torch.bfloat16, enabled=name == "bfloat16", cache_enabled=False
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def steps(sizes: Sizes, say: Say) -> None:
    device = device_here()
    makers: dict[str, Callable[[], Contenders]] = {
        "conv4": lambda: few_shot("conv4", sizes, device),
        "resnet12": lambda: few_shot("resnet12", sizes, device),
        "gpt": lambda: shared(gpt(sizes, device), device),
        "resnet18": lambda: shared(resnet18(sizes, device), device),
    }
    for name, make in makers.items():
        for kind in PRECISIONS:
            if kind == "tf32" and device == "cpu":
                continue
            row: dict[str, Any] = {"network": name, "precision": kind}
            try:
                with precision(kind, device):
                    row |= measured(*make(), sizes, device)
            except (RuntimeError, ImportError) as error:
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            say(row)


# What is timed in turn, how many floors a step of ours is worth, and how many examples it sees.
Contenders = tuple[dict[str, Callable[[], None]], int, int]


def measured(
    contenders: dict[str, Callable[[], None]], floors: int, examples: int, sizes: Sizes, device: str
) -> dict[str, Any]:
    taken = timed(contenders, sizes, device)
    floor = min((name for name in taken if name != "step"), key=lambda name: ms(taken[name]))
    each = [floors * seconds for seconds in taken[floor]]
    return {
        "step_ms": ms(taken["step"]),
        "floor_ms": ms(each),
        "floor": floor,
        "over_floor": ratio(taken["step"], each),
        "examples_per_s": 1000 * examples / ms(taken["step"]),
        "peak_mib": peak_mib(contenders["step"], device),
    }


class OnDevice(Preloaded):
    """Its episodes are on the device before the clock starts."""

    def place(self, device: str) -> None:
        self.batch = {name: tensor.to(device) for name, tensor in self.batch.items()}


def episodes(backbone: str, sizes: Sizes, device: str) -> OnDevice:
    problem = OnDevice(
        backbone=backbone,  # type: ignore[arg-type]
        width=sizes.width if backbone == "conv4" else sizes.resnet_width,
    )
    data = Noise()
    data.prepare()
    problem.attach(seed=0, dtype=torch.float32, data=data)
    problem.draw(0, sizes.tasks)
    problem.place(device)
    return problem


def few_shot(backbone: str, sizes: Sizes, device: str) -> Contenders:
    problem = episodes(backbone, sizes, device)
    net = channels_last_network(problem) if backbone == "conv4" else _resnet_and_head(problem)
    net.to(device)
    images = torch.cat([problem.batch["support"], problem.batch["query"]], 1)
    labels = torch.cat([problem.batch["support_labels"], problem.batch["query_labels"]], 1)

    def one_batch() -> None:
        functional.cross_entropy(net(images.flatten(0, 1)), labels.flatten()).backward()
        net.zero_grad()

    def by_task() -> None:
        for image, label in zip(images, labels, strict=True):
            functional.cross_entropy(net(image), label).backward()
        net.zero_grad()

    step, _ = few_shot_step(problem, sizes, device)
    return {"one_batch": one_batch, "by_task": by_task, "step": step}, 1, labels.numel()


def few_shot_step(
    problem: OnDevice, sizes: Sizes, device: str, solver: Any = None
) -> tuple[Callable[[], None], UpperVariable]:
    """A whole step over the serial transport, in one shard; and the x that it moves."""
    solver = solver or BOME(
        inner_steps=INNER_STEPS,
        inner_lr=0.2,
        lower_lr=0.2,
        upper_lr=1e-3,
        barrier="per_task",
        diagnose_every=0,
    )
    transport = SerialTransport(
        lambda where: ShardWorker(lambda changes: problem, "auto", where), device=device,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    upper = solver.start(problem.init_upper(torch.Generator().manual_seed(0)), 1)

    def step() -> None:
        run = StepRun(transport, range(sizes.tasks), 1, step=0, steps=1, persistent=False)
        take_step(solver, upper, LowerStates.none(), run)

    return step, upper


def _resnet_and_head(problem: OnDevice) -> nn.Module:
    backbone = problem._built(torch.Generator().manual_seed(0)).module.requires_grad_()
    found = backbone(torch.zeros(2, *problem.data.image_shape))
    return nn.Sequential(backbone, nn.Linear(found.shape[1], problem.ways))


class Whole(SharedProblem):
    """y = all weights of a network, x = a weight for each example of g, in one block on the device."""

    def __init__(self, net: nn.Module, inputs: Tensor, labels: Tensor) -> None:
        self.net, half = net, len(inputs) // 2
        self.batch: Batch = {
            "inputs": inputs[None, :half], "labels": labels[None, :half],
            "clean_inputs": inputs[None, half:], "clean_labels": labels[None, half:],
        }  # fmt: skip
        self.examples = half

    def init_upper(self, generator: torch.Generator) -> Params:
        return {"weights": torch.zeros(self.examples)}

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        return self.batch

    def encode(self, upper: Params, batch: Batch) -> Encoded:
        return {"weights": upper["weights"].sigmoid()}

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        return {name: tensor.detach() for name, tensor in self.net.named_parameters()}

    def losses(self, lower: Params, inputs: Tensor, labels: Tensor) -> Tensor:
        """CE of every label, [examples]: of an image its class, of a text the mean of its bytes."""
        logits = functional_call(self.net, lower, (inputs,))
        if labels.ndim == 1:
            return functional.cross_entropy(logits, labels, reduction="none")
        each = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return each.view_as(labels).mean(1)

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return self.losses(lower, batch["clean_inputs"], batch["clean_labels"]).mean()

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        losses = self.losses(lower, batch["inputs"], batch["labels"])
        return (encoded["weights"] * losses).mean()


def gpt(sizes: Sizes, device: str) -> Whole:
    width, layers, heads, context = sizes.gpt
    net = GPT(width, layers, heads, context, fused=True).to(device)
    net.reset(torch.Generator(device).manual_seed(0))
    count = max(sizes.batch // 8, 2) if sizes is FULL else sizes.batch
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (2 * count, context + 1), generator=draw).to(device)
    return Whole(net, tokens[:, :-1], tokens[:, 1:])


def resnet18(sizes: Sizes, device: str) -> Whole:
    torch.manual_seed(0)
    layout = torch.contiguous_format if device == "cpu" else torch.channels_last
    net = ResNet18(sizes.resnet_width).to(device, memory_format=layout)
    side = 16 if sizes is TINY else 32
    images = torch.rand(2 * sizes.batch, 3, side, side)
    images = images.to(device, memory_format=layout)
    return Whole(net, images, torch.arange(2 * sizes.batch, device=device) % 10)


def shared(problem: Whole, device: str) -> Contenders:
    solver = BOME(inner_steps=INNER_STEPS, inner_lr=0.01, lower_lr=0.01, upper_lr=1.0)
    transport = SerialTransport(
        lambda where: ShardWorker(lambda changes: problem, "auto", where), device=device,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    upper = solver.start(problem.init_upper(torch.Generator()), 1)
    kept = [LowerStates.none()]

    def step() -> None:
        run = step_run(problem, transport, range(1), 1, step=0, steps=1)
        kept[0] = take_step(solver, upper, kept[0], run).lower

    inputs, labels = problem.batch["inputs"][0], problem.batch["labels"][0]

    def supervised() -> None:
        weights = dict(problem.net.named_parameters())
        problem.losses(weights, inputs, labels).mean().backward()
        problem.net.zero_grad()

    wait(device)
    return {"supervised": supervised, "step": step}, INNER_STEPS + 3, len(labels)
