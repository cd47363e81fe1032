"""`reduce: collective` with one shared y: y stays with the members of the group, so what travels is x
and what its step needs, and what the members exchange.
"""

from __future__ import annotations

from typing import NamedTuple

from bomemeta.config import Config
from bomemeta.distributed.slices import nodes_of, parts
from bomemeta.doctor.dry import Dry, Still, TaskCounts
from bomemeta.doctor.findings import Finding, number, size
from bomemeta.doctor.nodes import Machines, Workers, spread

# A megabyte that a member sends while it receives one, over gloo on one machine (1e7 float32 numbers
# on 2 processes: 62 ms for 40 MB).
EXCHANGE_S = 0.0016


class Together(NamedTuple):
    """Bytes of a step, but for the first three."""

    members: int
    nodes: int  # of the tree: the most that a member's shards add up to
    kernels: int  # rounds of Ray
    down: float  # x and the problem's memory, to each node, for every kernel
    to_driver: float  # x's gradient and numbers, of the first member
    exchanged: float  # the most that a member sends the others
    member: float  # held at once by a member, beside the tensors of its shards
    driver: float  # held at once by the driver; y is there while a checkpoint is written


def together_of(
    config: Config, plan: TaskCounts, machines: Machines, workers: Workers, dry: Dry
) -> Together | None:
    """None where kernels run elsewhere: at the driver, or where the tasks are."""
    if config.reduce != "collective" or machines.kind == "serial" or dry.kernels == 0:
        return None
    world = max(min(workers.expected, plan.shards), 1)
    nodes = [len(nodes_of(part, plan.shards)) for part in parts(plan.shards, world)]
    largest = dry.bytes_reduced_later / max(dry.reduces, 1)
    adding = (max(nodes) + sum(nodes) / world) * largest if world > 1 else largest
    return Together(
        world,
        max(nodes),
        dry.kernels,
        dry.kernels * dry.asked_bytes,
        dry.answer_bytes,
        exchanged(dry.bytes_reduced_later, world, max(nodes)),
        # The kernel is the member's own, and it has y as it was while it makes the next one.
        dry.driver_bytes + dry.state_bytes + adding,
        # x, its optimiser's and its copy; y as it comes and as it is written.
        3 * dry.asked_bytes + dry.answer_bytes + 2 * dry.state_bytes,
    )


def exchanged(reduced: float, world: int, nodes: int) -> float:
    """What a member sends whose shards are so many nodes of the tree, of as many reduced bytes:
    the others' slices of each node, and its own slice of the sum.
    """
    return reduced * (nodes + 1) * (world - 1) / world


def seconds(joint: Together, one: Dry | Still, round_s: float, megabyte_s: float) -> float:
    """What a step costs beside computing: rounds of Ray, bytes to and from the driver, and the
    exchange.
    """
    reduced = one.bytes_reduced_later if isinstance(one, Dry) else one.bytes_reduced
    sent = exchanged(reduced, joint.members, joint.nodes)
    moved = (joint.down + joint.to_driver) / 1e6 * megabyte_s
    return one.kernels * round_s + moved + sent / 1e6 * EXCHANGE_S


def finding(config: Config, machines: Machines, workers: Workers, joint: Together) -> Finding:
    """What travels."""
    nodes = len(spread(config, machines, workers.expected))
    text = f"y stays with {number(joint.members, 'member')} (reduce: collective): in {number(joint.kernels, 'kernel')} "
    text += f"{size(joint.down)} (x) down to each of {number(nodes, 'node')} "
    text += f"and {size(joint.to_driver)} (x's gradient and numbers) to the driver; "
    text += (
        f"a member sends the others {size(joint.exchanged)}: {joint.nodes + 1} |y| (W - 1) / W in each reduce of W = {joint.members}"
        if joint.members > 1
        else "one member exchanges nothing"
    )
    return Finding("OK", "bytes per step", text)
