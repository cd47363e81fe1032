"""From a config to the parts of a run: problem, solver, transport. The engine is given these and
imports none of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bomemeta.boundary import reason
from bomemeta.config import Config
from bomemeta.contract.asking import location
from bomemeta.copies import copy_of
from bomemeta.core.problem import Problem, SharedProblem, stream_length
from bomemeta.core.randomness import mixed_seed
from bomemeta.core.solver import Solver
from bomemeta.data.digest import digest_of
from bomemeta.distributed.transport import Transport, WorkerFactory
from bomemeta.distributed.worker import Computing, ShardWorker, variant_of
from bomemeta.engine import Trainer
from bomemeta.errors import BomemetaError, ClusterError, ConfigError, DataError
from bomemeta.global_random import seeded
from bomemeta.imports import Imports
from bomemeta.limits import asks_too_much, check_counts, check_threads, within_memory
from bomemeta.sections import SECTIONS, label
from bomemeta.torch_settings import pin, pinned


def build_problem(config: Config) -> Problem:
    """The config's problem with its data, ready to be asked for tasks: a copy, so that the config's
    own object stays as it was given.

    Raises ConfigError where the two do not fit together, DataError where the data is missing or too
    small.
    """
    values = config.to_dict()
    check_counts(values)
    with torch_threads(config.threads), within_memory(values, limited=True):
        problem: Problem = copy_of(config.problem, "problem")
        name = label(problem)
        if problem.needs_data and config.data is None:
            raise ConfigError(
                f"data: missing; problem {name} wants a `data:` section with a `dataset:`, or from Python data=..."
            )
        if not problem.needs_data and config.data is not None:
            raise ConfigError(f"data: problem {name} reads no data set; take the section out")
        data = copy_of(config.data, "data")
        seed = mixed_seed(config.seed)
        with seeded(seed, "setup"):  # alike in every process, whatever it draws from
            if data is not None:
                with _naming(f"data set {label(data)}: prepare()", DataError):
                    data.prepare()
            with _naming(f"problem {name}: setup()", ConfigError):
                problem.attach(seed=seed, dtype=getattr(torch, config.dtype), data=data)
    length = stream_length(problem)
    if config.steps is None and length is None:
        raise ConfigError(
            f"steps: missing; problem {name} has no end of its own. Give a number, as in steps=1000"
        )
    if length is not None and config.steps is not None and config.steps > length:
        raise ConfigError(
            f"steps: got {config.steps}; the stream of problem {name} ends after {length}. Leave it out"
        )
    computing_of(config, problem)
    return problem


@contextmanager
def _naming(what: str, kind: type[BomemetaError]) -> Iterator[None]:
    """Says what a data set's or a problem's own code raises, with its line. What asks for more than
    there is passes: `within_memory` knows the numbers.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, BomemetaError) or asks_too_much(error):
            raise
        raise kind(f"{what} raised {reason(error)}{location(error)}") from error


def looked_at(config: Config, problem: Problem) -> dict[str, Any]:
    """The digest of the problem's data, under the settings of torch that the run has. Raises as
    `digest_of`.
    """
    with torch_threads(config.threads):
        return digest_of(problem)


def build_solver(config: Config, problem: Problem) -> Solver:
    """The config's solver. Raises ConfigError where it cannot solve that problem."""
    solver: Solver = config.solver
    with _naming(f"problem {label(problem)}", ConfigError):  # its properties are asked
        solver.check(problem)
    return solver


def open_transport(
    config: Config, say: Callable[[str], None], factory: WorkerFactory | None = None
) -> Transport:
    """Where the tasks are computed: this process (`workers: 0`) or Ray actors. `factory` makes the
    workers; None: those of a run's shards.

    Raises ConfigError or ClusterError where the device or the workers cannot be had.
    """
    factory = factory or BuildWorker.of(config)
    if config.workers == 0:
        from bomemeta.distributed.serial import SerialTransport

        return SerialTransport(factory, threads=config.threads, device=_serial_device(config))
    if config.device == "cuda" and config.gpus_per_worker == 0:
        raise ConfigError(
            "device: cuda with gpus_per_worker: 0; a worker sees a GPU only where it asks for a share of one"
        )
    if config.device == "cpu" and config.gpus_per_worker > 0:
        raise ConfigError(
            f"device: cpu with gpus_per_worker: {config.gpus_per_worker:g}; take one of the two out"
        )
    if sys.platform == "win32":
        raise ConfigError(
            f"workers: {config.workers} runs on Linux, and on Windows within its WSL. workers=0 runs here"
        )
    try:
        from bomemeta.distributed.by_value import send_modules_by_value, why_not_sent
        from bomemeta.distributed.cluster import RayOptions
        from bomemeta.distributed.leaders import LedTransport
        from bomemeta.distributed.ray_transport import RayTransport
    except ImportError as error:
        raise ClusterError(
            f"workers: {config.workers} needs Ray, which cannot be imported ({error}). workers=0 runs here"
        ) from error

    least, most = worker_range(config)
    options = RayOptions(
        workers=most,
        min_workers=least if config.workers == "auto" else None,
        threads=config.threads,
        cpus_per_worker=config.cpus_per_worker,
        gpus_per_worker=config.gpus_per_worker,
        worker_labels=config.worker_labels,
        address=config.address,
        step_timeout_s=config.step_timeout_s,
        start_timeout_s=config.start_timeout_s,
        max_replacements=config.max_replacements,
        wait_for_room_s=config.wait_for_room_s,
        reduce=config.reduce,
        backup_after=config.backup_after,
    )
    # Without leaders: a number that follows the cluster, and kernels of all workers together.
    led = config.workers != "auto" and config.reduce != "collective"
    led = led and config.leaders_above is not None and most > config.leaders_above
    objects = {key: getattr(config, key) for key in SECTIONS}
    send_modules_by_value(objects)
    try:
        return (LedTransport if led else RayTransport)(factory, options, say)
    except BomemetaError:
        raise
    except Exception as error:
        reason = why_not_sent(objects)
        if reason is None:
            raise
        raise ConfigError(reason) from error


def trainer_of(
    config: Config,
    say: Callable[[str], None] = lambda text: None,
    *,
    problem: Problem | None = None,
    solver: Solver | None = None,
    transport: Transport | None = None,
) -> Trainer:
    """The config's run at its start. What is given is used and stays the caller's to close; the
    rest is built as the config says, with this process's torch threads set until the trainer is
    closed.

    Raises as `build_problem`, `build_solver` and `open_transport` do.
    """
    problem = problem if problem is not None else build_problem(config)
    solver = solver if solver is not None else build_solver(config, problem)
    with ExitStack() as resources:
        resources.enter_context(torch_threads(config.threads))
        if transport is None:
            transport = resources.enter_context(closing(open_transport(config, say)))
        return Trainer(config, problem, solver, transport, resources.pop_all())
    raise AssertionError("unreachable")


def worker_range(config: Config) -> tuple[int, int]:
    """The least and the largest number of workers that the config allows. Raises ConfigError where
    the first is greater.
    """
    if config.workers != "auto":
        return config.workers, config.workers
    most = (
        config.max_workers
        if config.max_workers is not None
        else max(config.shards, config.min_workers)
    )
    if config.min_workers > most:
        raise ConfigError(f"min_workers: got {config.min_workers}, more than max_workers: {most}")
    return config.min_workers, most


def imports_of(config: Config) -> Imports:
    """The user's files that the config's objects need, to travel before them. Raises ConfigError
    where one cannot be read.
    """
    return Imports.of(config.imports, [getattr(config, key) for key in SECTIONS])


@dataclass(frozen=True)
class BuildWorker:
    """Makes a worker in whatever process it is called in. The config's objects travel by value."""

    imports: Imports  # first: whoever unpickles it has the modules that the objects may need
    config: Config

    @classmethod
    def of(cls, config: Config) -> BuildWorker:
        """Raises ConfigError where a file of `imports:` cannot be read."""
        return cls(imports_of(config), config)

    def __call__(self, device: str) -> ShardWorker:
        pin(self.config.threads)  # the user's files, which have just been executed, may set others
        problem = build_problem(self.config)
        return ShardWorker(
            lambda changes: variant_of(problem, changes),
            self.config.task_map,
            device,
            computing_of(self.config, problem),
        )


def computing_of(config: Config, problem: Problem) -> Computing:
    """How a worker of this config computes. Raises ConfigError where the problem cannot be computed
    so.
    """
    if config.micro_batch is not None and (
        not isinstance(problem, SharedProblem)
        or type(problem).micro_batches is SharedProblem.micro_batches
    ):
        raise ConfigError(
            f"micro_batch: {type(problem).__name__} does not say how its samples are taken apart (a SharedProblem's `micro_batches`); "
            "take it out"
        )
    if config.compute_dtype is not None and config.dtype != "float32":
        raise ConfigError(
            f"compute_dtype: got {config.compute_dtype} with dtype: {config.dtype}; x, y and sums are then in float32: set dtype=float32"
        )
    dtype = None if config.compute_dtype is None else getattr(torch, config.compute_dtype)
    return Computing(dtype, config.micro_batch)


def _serial_device(config: Config) -> str:
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError("device: cuda, but torch sees no GPU here; use device: cpu or auto")
    return "cuda:0"


def torch_threads(threads: int) -> AbstractContextManager[None]:
    """The settings of torch that a run has, for as long as it lasts: the driver adds and squares
    too. Raises ConfigError where the machine has not so many threads.
    """
    check_threads(threads)
    return pinned(threads)
