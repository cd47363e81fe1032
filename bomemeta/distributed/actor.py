"""What runs in a worker's process, and how that process is told from all others."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bomemeta.distributed.losses import crash_in
from bomemeta.distributed.resident import Kept
from bomemeta.distributed.summation import added
from bomemeta.distributed.transport import checked_returns
from bomemeta.errors import ClusterError
from bomemeta.paths import SHARED_DATA

# What torch imports in the middle of a first call (in `autograd.grad` with `grad_outputs`: sympy, 500
# modules, 2.6 s of CPU at load 12). Where the driver has it, from its check of the problem, a worker has it before its first
# shard.
LATE = ("torch.fx.experimental.symbolic_shapes",)
# How long another node is asked how a worker there ended.
CRASH_ANSWER_S = 5.0
# How a call's answer is cut into objects: no share; reply and share as one, for the driver; the
# share for itself, to stay in the cluster.
Form = Literal["plain", "whole", "apart"]


class Process(NamedTuple):
    """Which process a worker is. The birth (clock ticks since boot) tells it from a later process
    with the same number.
    """

    pid: int
    birth: str
    node_id: str


def birth_of(pid: int) -> str:
    """Empty where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def kill_process(process: Process) -> None:
    if process.birth and birth_of(process.pid) == process.birth:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def kill_on_its_node(process: Process) -> list[Any]:
    """SIGKILL, from a task on the process's node where that is another one: then the list holds the
    task's reference.
    """
    if process.node_id == ray.get_runtime_context().get_node_id():
        kill_process(process)
        return []
    there = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
    killer = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(kill_process)
    return [killer.remote(process)]


def crash_of(pid: int) -> str | None:
    """How a worker of this node crashed by a fault of its own, if it did: Ray's words for that and
    for a kill from outside are the same, but a crash leaves words in the worker's own log.
    """
    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    found = (crash_in(log) for log in logs.glob(f"worker-*-{pid}.err"))
    return next((how for how in found if how is not None), None)


def crash_on(node_id: str, pid: int) -> str | None:
    """`crash_of` by a task on that node; None too where it does not answer soon."""
    if node_id == ray.get_runtime_context().get_node_id():
        return crash_of(pid)
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    asked = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(crash_of)
    try:
        found: str | None = ray.get(asked.remote(pid), timeout=CRASH_ANSWER_S)
    except ray.exceptions.RayError:
        return None
    return found


def actor_class(
    cpus: float, gpus: float, strategy: str | None, labels: Mapping[str, str] | None = None
) -> Any:
    """ShardActor as Ray makes it. Ray repeats nothing by itself: `transport` says why.

    Out of order: an actor that executes its calls in order of their numbers waits 30 s for a call
    that was cancelled before it was sent, and then fails the one behind it (2 of 295 tries; out of
    order 0 of 2,186). The order of our calls does not matter: `build` is waited for, and each other
    call brings all that it needs. One call at a time is computed all the same.
    """
    return ray.remote(
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=0,
        max_task_retries=0,
        allow_out_of_order_execution=True,
        scheduling_strategy=strategy,
        label_selector=dict(labels) if labels else None,
    )(ShardActor)


class ShardActor:
    """The process that holds one worker. `build` is not in `__init__`: what it raises would lose
    its type there.
    """

    def build(
        self, factory: bytes, threads: int, paths: list[str], late: Sequence[str] = ()
    ) -> Process:
        # Before torch is imported: these are read once, and Ray has set OMP_NUM_THREADS to the
        # actor's CPUs.
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = str(threads)
        os.environ.setdefault(SHARED_DATA, "1")
        sys.path.extend(path for path in paths if path not in sys.path)
        import torch

        torch.set_num_threads(threads)
        for name in late:
            importlib.import_module(name)
        context = ray.get_runtime_context()
        # Not torch.cuda.is_available(): an actor without GPUs sees all of them. Ray shows an actor
        # only its own, so 0.
        given = context.get_accelerator_ids().get("GPU")
        if given and not torch.cuda.is_available():
            raise ClusterError(
                f"Ray gave a worker on {ray.util.get_node_ip_address()} GPU {', '.join(given)}, and torch {torch.__version__} sees none "
                "there. Look at that machine's driver and at its torch, or compute on CPUs with gpus_per_worker=0"
            )
        device = "cuda:0" if given else "cpu"
        self._worker = pickle.loads(factory)(device)
        self._kept = Kept()
        return Process(os.getpid(), birth_of(os.getpid()), context.get_node_id())

    def lead(self, factory: bytes, paths: list[str]) -> Process:
        """`build` of a leader, which computes nothing itself and needs no torch."""
        sys.path.extend(path for path in paths if path not in sys.path)
        self._worker = pickle.loads(factory)("cpu")
        node_id = ray.get_runtime_context().get_node_id()
        return Process(os.getpid(), birth_of(os.getpid()), node_id)

    def ping(self) -> None:
        pass

    def execute(
        self, request: Any, returns: int, form: Form, broadcast: np.ndarray, *states: np.ndarray
    ) -> Any:
        results = checked_returns(
            self._worker.execute(request, broadcast, *states), returns, summed=form != "plain"
        )
        if form == "whole":
            results = results[:2], *results[2:]
        return results if len(results) > 1 else results[0]

    def merge(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return added(left, right)

    def together(
        self, request: Any, member: Any, broadcast: np.ndarray, name: str, alive: frozenset[str]
    ) -> Any:
        """See `transport.JointRequest`. Of what is kept here, nobody wants but what is `alive`."""
        from bomemeta.distributed.process_group import (
            ProcessGroup,  # torch's distributed part, for those who use it
        )

        self._group: ProcessGroup = getattr(self, "_group", None) or ProcessGroup()
        self._kept.forget_all_but(alive)
        self._group.join(member)
        return request.execute(self._worker, broadcast, self._group, self._kept, name)

    def kept(self, name: str) -> np.ndarray | None:
        return self._kept.find(name)
