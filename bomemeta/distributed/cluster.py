"""Where the Ray cluster comes from: one started on this machine for this process alone, or one that
is there already.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
from ray._private import ray_constants, services
from ray._private.label_utils import validate_label_selector

from bomemeta.distributed.node import patient, ray_children, reap
from bomemeta.distributed.private import make_token, session_folder
from bomemeta.environment import usable_cores
from bomemeta.errors import ClusterError, ClusterLost, ConfigError

# A worker may share its core with three others: enough to try three workers on a laptop, not enough
# to stall it.
MAX_OVERSUBSCRIPTION = 4

# Where shards are added up: on the driver, by the workers in a tree, or (one shared lower variable)
# by all workers among themselves.
Reduce = Literal["driver", "tree", "collective"]

# A start of Ray's that fails sooner than that was not slow.
QUICK_S = 5.0
PROBE_TIMEOUT_S = (
    10.0  # for one TCP connection: longer than any network takes that could carry a step
)
# What goes in a call, or comes with the message that it is done, and not through the object store,
# which costs a millisecond or more each time: up to so many bytes, in a cluster that was started
# here and in others. Ray's own limit is just below the four-layer network's x.
SENT_DIRECTLY, RAYS_LIMIT = 1024**2, 100 * 1024
# What a message has beside an array's bytes.
ENVELOPE = 4096
_limit = RAYS_LIMIT  # of the cluster that this process is on


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """What to ask of Ray. `address=None` joins this process's cluster or RAY_ADDRESS, else starts a
    local one.
    """

    workers: int
    min_workers: int | None = (
        None  # not None: as many workers as there is room for, from this number up to `workers`
    )
    threads: int = 1  # torch threads of each worker
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    worker_labels: Mapping[str, str] = field(default_factory=dict)  # Ray's selectors, by label
    address: str | None = None
    step_timeout_s: float = 300.0  # a call without an answer for this long means a hung worker
    start_timeout_s: float = (
        300.0  # starting Ray, placing an actor, importing torch, building the worker
    )
    max_replacements: int = (
        100  # in one round: beyond it the machine is ill and the run should stop
    )
    wait_for_room_s: float = 0.0  # a cluster that is full, or too small as yet, is waited for
    reduce: Reduce = "driver"
    backup_after: float | None = (
        None  # a call that takes so many times what is expected is also given to a free worker
    )

    @property
    def elastic(self) -> bool:
        """Whether the number of workers follows the cluster."""
        return self.min_workers is not None

    def __post_init__(self) -> None:
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise ConfigError(
                f"ray: min_workers is {self.min_workers}; it must be from 1 to the largest number of workers, {self.workers}"
            )
        if self.backup_after is not None and self.backup_after <= 1:
            raise ConfigError(
                f"ray: backup_after is {self.backup_after:g}; it must be greater than 1, a call's usual time"
            )
        if fault := validate_label_selector(dict(self.worker_labels)):
            raise ConfigError(f"worker_labels: got {dict(self.worker_labels)}: {fault}")
        for name in ("workers", "threads", "step_timeout_s", "start_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"ray: {name} is {getattr(self, name)}; it must be greater than 0"
                )
        for name in ("cpus_per_worker", "gpus_per_worker", "max_replacements", "wait_for_room_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"ray: {name} is {getattr(self, name)}; it must not be negative")
        if self.address is not None and self.address.startswith("ray://"):
            raise ConfigError(
                f"ray: address is {self.address}; Ray Client cannot tell a dead worker from a slow one. "
                "Run the command inside the cluster with `ray job submit`, or give the host:port of its head node"
            )


def must_start(options: RayOptions) -> bool:
    """Whether there is no cluster to join."""
    if options.address is not None:
        return options.address == "local"
    return not os.environ.get("RAY_ADDRESS") and not ray.is_initialized()


@contextmanager
def joined(options: RayOptions) -> Iterator[None]:
    """A cluster that is there already, and stays when we leave.

    Raises:
        ClusterLost: no such cluster, or it refuses us.
    """
    connected_before = ray.is_initialized()
    if not connected_before:
        try:
            _probe(options.address or os.environ["RAY_ADDRESS"])
            ray.init(address=options.address)
        except Exception as error:  # Ray raises bare ones too, as where a node is slow to start
            address = options.address or os.environ["RAY_ADDRESS"]
            raise ClusterLost(
                f"no Ray cluster could be joined at {address}: {error}. Check the address, and that RAY_AUTH_MODE and "
                "the token are the same on both sides; or leave the address out to start a cluster on this machine"
            ) from error
    try:
        yield
    finally:
        if not connected_before:
            ray.shutdown()


def _probe(address: str) -> None:
    """Raises OSError where nobody listens: ray.init would hang there for ever, deaf even to
    SIGTERM.
    """
    host, _, port = address.rpartition(":")
    if port.isdigit():  # not "auto"
        with socket.create_connection(
            (services.resolve_ip_for_localhost(host.strip("[]")), int(port)), PROBE_TIMEOUT_S
        ):
            pass


@contextmanager
def local(
    options: RayOptions, on_event: Callable[[str], None], deadline: float | None = None
) -> Iterator[None]:
    """A cluster of this machine, for this process: loopback only, token authentication, a session
    folder of this user's alone, no dashboard, no statistics.

    The thread that enters must stay alive until it leaves: Linux kills Ray's processes when the
    *thread* that started them ends (PR_SET_PDEATHSIG). What does not start is tried again until
    `deadline` (monotonic seconds; None: `start_timeout_s` from now).

    Raises:
        ClusterError: more workers than this machine can hold.
        ClusterLost: Ray does not start.
    """
    global _limit
    cores = usable_cores()
    workers = options.workers if options.min_workers is None else options.min_workers
    wanted = workers * options.cpus_per_worker
    if wanted > MAX_OVERSUBSCRIPTION * cores:
        raise ClusterError(
            f"{workers} workers of {options.cpus_per_worker:g} CPU want {wanted:g} CPU; this machine has {cores}, "
            f"and more than {MAX_OVERSUBSCRIPTION} times that would only wait. "
            f"Use workers={int(MAX_OVERSUBSCRIPTION * cores / options.cpus_per_worker)} or fewer, a smaller "
            "cpus_per_worker, or address= of a larger cluster"
        )
    if workers * options.threads > cores:
        on_event(
            f"{workers} workers of {options.threads} threads share {cores} cores: the machine is oversubscribed, "
            "results stay the same, speed suffers"
        )
    with session_folder() as folder, _local_settings():
        make_token(on_event)
        _start(
            options,
            on_event,
            time.monotonic() + options.start_timeout_s if deadline is None else deadline,
            folder,
            num_cpus=max(cores, math.ceil(wanted)),
            # GPUs are never oversubscribed: Ray counts those that are there.
            num_gpus=None if options.gpus_per_worker else 0,
        )
        try:
            _limit = SENT_DIRECTLY
            yield
        finally:
            _limit = RAYS_LIMIT
            ray.shutdown()


def _start(
    options: RayOptions,
    on_event: Callable[[str], None],
    deadline: float,
    folder: Path,
    **resources: int | None,
) -> None:
    """Starts Ray; what fails for slowness is tried again until the deadline."""
    while True:
        reap()
        before, begun = ray_children(), time.monotonic()
        try:
            with patient(deadline):
                ray.init(
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="error",
                    _temp_dir=str(folder),
                    _system_config={"max_direct_call_object_size": SENT_DIRECTLY},
                    **resources,
                )
            return
        except Exception as error:
            ray.shutdown()
            for pid in ray_children() - before:  # of the cluster that did not come up
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            reason = str(error).strip().partition("\n")[0]
            # What fails at once fails again; and so does what has no time for as long a try.
            took_s = time.monotonic() - begun
            if took_s < QUICK_S or time.monotonic() + took_s > deadline:
                raise ClusterLost(
                    f"Ray did not start on this machine within start_timeout_s = {options.start_timeout_s:g} s: {reason} "
                    "workers=0 runs without Ray"
                ) from error
            on_event(f"Ray did not start in {took_s:.0f} s ({reason}); it is tried again")


def outgoing(array: np.ndarray, calls: int) -> Any:
    """What so many calls are given in the place of `array`: itself where all its copies are small,
    else a reference to one in the store.
    """
    directly = array.nbytes <= _limit - ENVELOPE and array.nbytes * calls <= SENT_DIRECTLY
    return array if directly else ray.put(array)


def store_bytes() -> float:
    """What the object store of this node holds."""
    own = ray.get_runtime_context().get_node_id()
    sizes = [
        node["Resources"].get("object_store_memory", math.inf)
        for node in ray.nodes()
        if node["NodeID"] == own
    ]
    return float(sizes[0]) if sizes else math.inf


@contextmanager
def _local_settings() -> Iterator[None]:
    """Settings that Ray reads from the environment, here and in its processes; what the user has
    set stays as it is.

    Ray reads some of them when it is imported, which may be long ago, hence also as attributes.
    """
    ours = {
        # Ray's way to say "this cluster is one machine": every server then listens on the loopback
        # address. It has no effect to pass _node_ip_address="127.0.0.1": Ray replaces it by the
        # address of the network card.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": ("0", "ENABLE_RAY_CLUSTER"),
        # Under `uv run` Ray would build the environment again for its workers: 69 s instead of 5 s.
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": ("0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV"),
    }
    # ray.init sets these two itself where they are unset: authentication by token, no statistics.
    environment = {
        name: os.environ.get(name) for name in (*ours, "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED")
    }
    attributes = {attribute: getattr(ray_constants, attribute) for _, attribute in ours.values()}
    for name, (value, attribute) in ours.items():
        if name not in os.environ:
            os.environ[name] = value
            setattr(ray_constants, attribute, False)
    try:
        yield
    finally:
        for attribute, before in attributes.items():
            setattr(ray_constants, attribute, before)
        for name, value_before in environment.items():
            os.environ.pop(name, None)
            if value_before is not None:
                os.environ[name] = value_before


def importable_paths() -> list[str]:
    """This process's `sys.path`, absolute: what lets a worker import the modules that are named in
    a pickled request.
    """
    return [os.path.abspath(path) for path in sys.path]
