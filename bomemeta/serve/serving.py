"""A server as two deployments of Ray Serve: the web side, and replicas that hold the network and the
heads of the tenants that were asked for last.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ray import serve

from bomemeta.distributed.cluster import RayOptions, joined, local, must_start
from bomemeta.errors import BomemetaError, ConfigError
from bomemeta.predict.classifier import FewShotClassifier
from bomemeta.serve.desk import Desk, Image
from bomemeta.serve.tenants import Tenants
from bomemeta.serve.web import web

APP = "bomemeta"
HEADS_PER_REPLICA = 100  # of tenants; kilobytes each
A = TypeVar("A")


@serve.deployment(max_ongoing_requests=32)
class Heads:
    """The network, and heads by tenant and version. One request computes at a time."""

    def __init__(self, source: str, tenants: str) -> None:
        self._desk = Desk(source, Path(tenants), trust=True)  # `run` has asked
        self._turn = asyncio.Lock()

    async def _alone(self, function: Callable[[], A]) -> A:
        # In a thread: Serve asks whether a replica is well while it computes.
        async with self._turn:
            return await asyncio.to_thread(function)

    # A version's number is part of the id: a head that was fitted anew is another one, for every
    # replica.
    @serve.multiplexed(max_num_models_per_replica=HEADS_PER_REPLICA)  # type: ignore[untyped-decorator]
    async def _head(self, version_id: str) -> FewShotClassifier:
        name, _, version = version_id.rpartition("@")
        return self._desk.classifier(name, int(version))

    async def predict(self, images: Sequence[Image]) -> Any:
        """The predictions, or what is wrong."""
        try:
            classifier = await self._head(serve.get_multiplexed_model_id())
            return await self._alone(partial(self._desk.predict, classifier, images))
        except BomemetaError as error:
            return error

    async def fit(self, name: str, images: Sequence[Image], adds: bool) -> Any:
        """What the tenant then is, or what is wrong."""
        try:
            return await self._alone(partial(self._desk.fit, name, images, adds))
        except BomemetaError as error:
            return error


class _Remote:
    """The replicas, as the web side asks them."""

    def __init__(self, tenants: Tenants, heads: Any) -> None:
        self._tenants, self._heads = tenants, heads

    async def predict(self, name: str, images: Sequence[Image]) -> list[dict[str, Any]]:
        version = self._tenants.version(name)
        chosen = self._heads.options(multiplexed_model_id=f"{name}@{version}")
        found: list[dict[str, Any]] = _unless_wrong(await chosen.predict.remote(list(images)))
        return found

    async def fit(self, name: str, images: Sequence[Image], adds: bool) -> dict[str, Any]:
        found: dict[str, Any] = _unless_wrong(
            await self._heads.fit.remote(name, list(images), adds)
        )
        return found


def _unless_wrong(answer: Any) -> Any:
    if isinstance(answer, BomemetaError):
        raise answer
    return answer


@serve.deployment(max_ongoing_requests=100, ray_actor_options={"num_cpus": 0})
@serve.ingress()
class Web:
    """The HTTP side."""

    def __init__(self, tenants: str, heads: Any, most_bytes: int) -> None:
        self._tenants, self._heads, self._most = Tenants(Path(tenants)), heads, most_bytes

    def __serve_build_asgi_app__(self) -> Any:
        return web(self._tenants, _Remote(self._tenants, self._heads), self._most)


def run(
    source: str,
    tenants: Path,
    *,
    host: str,
    port: int,
    replicas: int,
    most_bytes: int,
    address: str | None,
    trust: bool,
    say: Callable[[str], None],
) -> None:
    """Serves until SIGINT or SIGTERM, and leaves nothing running.

    Raises ConfigError where the source, the tenants' folder or the port cannot be used, ClusterError
    where Ray cannot be had.
    """
    Desk(source, tenants, trust=trust)  # what is wrong with them is said before anything is started
    _check_port(host, port)
    options = RayOptions(workers=replicas, address=address)
    folder = str(tenants.expanduser().absolute())
    deployments: Any = (Heads, Web)  # `serve.deployment` is without types
    stop = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with ExitStack() as stack:
            if must_start(options):
                stack.enter_context(local(options, say))  # which ends with all that runs on it
            else:
                stack.enter_context(joined(options))
                stack.callback(serve.shutdown)
            logging.getLogger("ray.serve").setLevel(
                logging.WARNING
            )  # what happens is reported here
            serve.start(http_options={"host": host, "port": port})
            heads = deployments[0].options(num_replicas=replicas).bind(source, folder)
            serve.run(deployments[1].bind(folder, heads, most_bytes), name=APP, route_prefix="/")
            say(f"serving at http://{host}:{port} (tenants: {folder}); Ctrl-C ends it")
            stop.wait()
            say("ending")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ConfigError(
            f"host and port: {host}:{port} cannot be listened on: {error.strerror}. Choose another --port"
        ) from error
