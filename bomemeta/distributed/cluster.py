"""Where the Ray cluster comes from: one started on this machine for this process alone, or one that
is there already.
"""

from __future__ import annotations

import math
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import ray
from ray._private import ray_constants, services

from bomemeta.errors import ClusterError, ConfigError

# A worker may share its core with three others: enough to try three workers on a laptop, not enough
# to stall it.
MAX_OVERSUBSCRIPTION = 4

# Ray counts the resources of actors that were just killed as taken for a moment (measured: below 1
# s).
CAPACITY_PATIENCE_S = 10.0

# Where shards are added up: on the driver, by the workers in a tree, or (one shared lower variable)
# by all workers among themselves.
Reduce = Literal["driver", "tree", "collective"]

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
    address: str | None = None
    step_timeout_s: float = 300.0  # a call without an answer for this long means a hung worker
    start_timeout_s: float = 180.0  # placing an actor, importing torch, building the worker
    max_replacements: int = (
        100  # per transport: beyond it the machine is ill and the run should stop
    )
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
        for name in ("workers", "threads", "step_timeout_s", "start_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"ray: {name} is {getattr(self, name)}; it must be greater than 0"
                )
        for name in ("cpus_per_worker", "gpus_per_worker", "max_replacements"):
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
        ClusterError: no such cluster, or it refuses us.
    """
    connected_before = ray.is_initialized()
    if not connected_before:
        try:
            _probe(options.address or os.environ["RAY_ADDRESS"])
            ray.init(address=options.address)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            address = options.address or os.environ["RAY_ADDRESS"]
            raise ClusterError(
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
def local(options: RayOptions, on_event: Callable[[str], None]) -> Iterator[None]:
    """A cluster of this machine, for this process: loopback only, token authentication, no
    dashboard, no statistics.

    The thread that enters must stay alive until it leaves: Linux kills Ray's processes when the
    *thread* that started them ends (PR_SET_PDEATHSIG).

    Raises:
        ClusterError: more workers than this machine can hold, or Ray does not start.
    """
    global _limit
    cores = len(os.sched_getaffinity(0))
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
    with _local_settings():
        _make_token()
        try:
            ray.init(
                address="local",
                num_cpus=max(cores, math.ceil(wanted)),
                # GPUs are never oversubscribed: Ray counts those that are there.
                num_gpus=None if options.gpus_per_worker else 0,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
                _system_config={"max_direct_call_object_size": SENT_DIRECTLY},
            )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ClusterError(
                f"Ray did not start on this machine: {error}. workers=0 runs without Ray"
            ) from error
        try:
            _limit = SENT_DIRECTLY
            yield
        finally:
            _limit = RAYS_LIMIT
            ray.shutdown()


def outgoing(array: np.ndarray, calls: int) -> Any:
    """What so many calls are given in the place of `array`: itself where all its copies are small,
    else a reference to one in the store.
    """
    directly = array.nbytes <= _limit - ENVELOPE and array.nbytes * calls <= SENT_DIRECTLY
    return array if directly else ray.put(array)


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


def _make_token() -> None:
    """The user's token file, where Ray would make it, but readable by its owner alone (Ray's own is
    readable by all).
    """
    chosen = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    path = Path.home() / ".ray" / "auth_token"
    if chosen or path.exists() or os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix="auth_token."
        ) as file:  # made with mode 0600
            file.write(secrets.token_hex(32))
            file.flush()
            with suppress(FileExistsError):  # another process was faster: its token is as good
                os.link(file.name, path)
    except OSError as error:
        raise ClusterError(
            f"Ray's token file {path} cannot be written: {error}. Set RAY_AUTH_TOKEN to a secret of your own"
        ) from error


class _Capacity(NamedTuple):
    at_all: int  # workers that fit on the nodes that there are
    now: int  # that fit beside what runs there
    where: str


def room(options: RayOptions) -> int:
    """How many workers of this kind could be started now, beside those that run."""
    return _capacity(options).now


def check_capacity(options: RayOptions, say: Callable[[str], None] = lambda line: None) -> None:
    """Raises ClusterError where the cluster has no room for the workers; Ray itself would wait for
    ever.

    Where their number follows the cluster, room for the least number is waited for, as nodes may
    still come.
    """
    workers = options.workers if options.min_workers is None else options.min_workers
    patience = options.start_timeout_s if options.elastic else CAPACITY_PATIENCE_S
    deadline = time.monotonic() + patience
    told = False
    while (capacity := _capacity(options)).now < workers:
        if (capacity.at_all < workers and not options.elastic) or time.monotonic() > deadline:
            raise ClusterError(
                f"{workers} workers of {options.cpus_per_worker:g} CPU and {options.gpus_per_worker:g} GPU each do not fit: "
                f"{capacity.where}, room for {capacity.now} workers. Use fewer workers=, a smaller cpus_per_worker= or "
                "gpus_per_worker=, or end what else runs there"
            )
        if not told and options.elastic:
            say(f"waiting for room for {workers} workers: {capacity.where}")
            told = True
        time.sleep(0.2)


def _capacity(options: RayOptions) -> _Capacity:
    bundles = _placement_bundles()
    if bundles is None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        where, free = f"the cluster ({len(nodes)} nodes)", ray.available_resources()
    else:
        nodes = bundles
        where, free = (
            "the placement group of this trial",
            {name: _sum(bundles, name) for name in ("CPU", "GPU")},
        )
    at_all = sum(_room(node, options) for node in nodes)
    where = (
        f"{where} has {_sum(nodes, 'CPU'):g} CPU and {_sum(nodes, 'GPU'):g} GPU, free are {free.get('CPU', 0.0):g} CPU and "
        f"{free.get('GPU', 0.0):g} GPU"
    )
    return _Capacity(at_all, min(at_all, _room(free, options)), where)


def ask_autoscaler(options: RayOptions, workers: int) -> None:
    """Tells the cluster's autoscaler, where there is one, that so many workers are wanted; 0 takes
    the request back.
    """
    from ray.autoscaler.sdk import request_resources

    wanted = {"CPU": options.cpus_per_worker, "GPU": options.gpus_per_worker}
    bundle = {name: math.ceil(amount) for name, amount in wanted.items() if amount > 0}
    request_resources(bundles=[bundle] * workers if bundle else [])


def _room(resources: Mapping[str, float], options: RayOptions) -> int:
    """How many workers fit; `options.workers` where they ask for nothing."""
    wanted = {"CPU": options.cpus_per_worker, "GPU": options.gpus_per_worker}
    # 1e-9: three workers of 0.1 fit in 0.3, which is a little less in floating point.
    fits = [
        int(resources.get(name, 0.0) / amount + 1e-9)
        for name, amount in wanted.items()
        if amount > 0
    ]
    return min(fits, default=options.workers)


def _sum(resources: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(one.get(name, 0.0) for one in resources)


def scheduling_strategy() -> str | None:
    """SPREAD puts workers on different nodes; in a placement group (Ray Tune) the group has decided
    already.

    Only None stays in the group: with "DEFAULT" Ray places an actor outside of it, where a trial's
    workers wait for ever.
    """
    return "SPREAD" if _placement_bundles() is None else None


def _placement_bundles() -> list[dict[str, float]] | None:
    """What is left of the placement group that our actors will be placed in, or None outside of
    one.
    """
    group = ray.util.get_current_placement_group()
    if group is None or not ray.get_runtime_context().should_capture_child_tasks_in_placement_group:
        return None
    first, *rest = group.bundle_specs
    # The first bundle is where this driver runs.
    own = ray.get_runtime_context().get_assigned_resources()
    return [{name: amount - own.get(name, 0.0) for name, amount in first.items()}, *rest]


def importable_paths() -> list[str]:
    """This process's `sys.path`, absolute: what lets a worker import the modules that are named in
    a pickled request.
    """
    return [os.path.abspath(path) for path in sys.path]
