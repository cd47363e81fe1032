"""The HTTP side of a server: requests in, JSON out, and a page to try it on.

    GET    /                              the page
    GET    /tenants                       all tenants
    GET    /tenants/NAME                  one: its classes and how many examples each has
    DELETE /tenants/NAME
    POST   /tenants/NAME/fit              images with labels: a new classifier
    POST   /tenants/NAME/add_examples     more of them
    POST   /tenants/NAME/predict          images

A body is JSON, {"images": [{"image": BASE64, "label": TEXT, "name": TEXT}, ...]}, or a form
(multipart) with files `images` and as many texts `labels`. What is wrong with it is answered with 4xx
and {"error": TEXT}.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bomemeta.errors import BomemetaError, DataError
from bomemeta.serve.desk import Image
from bomemeta.serve.tenants import Tenants, UnknownTenant

MEGABYTE = 10**6
MOST_IMAGES = 1000  # in one request
# The page loads nothing from elsewhere, and nobody else's page may hold it in a frame.
POLICY = "default-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; frame-ancestors 'none'"


class Desks(Protocol):
    """Whoever computes, here or in another process."""

    async def fit(self, name: str, images: Sequence[Image], adds: bool) -> dict[str, Any]: ...

    async def predict(self, name: str, images: Sequence[Image]) -> list[dict[str, Any]]: ...


def web(tenants: Tenants, desks: Desks, most_bytes: int) -> ASGIApp:
    """The app. `most_bytes`: of a request's body; a larger one is answered with 413."""
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

    async def index(request: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    async def everyone(request: Request) -> Response:
        return JSONResponse({"tenants": [tenants.about(name) for name in tenants.names()]})

    async def about(request: Request) -> Response:
        return JSONResponse(tenants.about(request.path_params["name"]))

    async def delete(request: Request) -> Response:
        tenants.delete(request.path_params["name"])
        return JSONResponse({})

    def fits(adds: bool) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            images = await _images(request)
            return JSONResponse(await desks.fit(request.path_params["name"], images, adds))

        return answer

    async def predict(request: Request) -> Response:
        images = await _images(request)
        return JSONResponse(
            {"predictions": await desks.predict(request.path_params["name"], images)}
        )

    app = Starlette(
        routes=[
            Route("/", index),
            Route("/tenants", everyone),
            Route("/tenants/{name}", about),
            Route("/tenants/{name}", delete, methods=["DELETE"]),
            Route("/tenants/{name}/fit", fits(False), methods=["POST"]),
            Route("/tenants/{name}/add_examples", fits(True), methods=["POST"]),
            Route("/tenants/{name}/predict", predict, methods=["POST"]),
        ],
        exception_handlers={
            UnknownTenant: _refused(404),
            BomemetaError: _refused(422),
            HTTPException: _http_error,
        },
    )
    return _Guard(app, most_bytes)


def _refused(status: int) -> Callable[[Request, Exception], Response]:
    return lambda request, error: JSONResponse({"error": str(error)}, status)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)


class _Guard:
    """Refuses bodies that are too large, before they are read, and what other sites' pages send."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app, self._most = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode().lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        refused = self._too_large(int(headers.get("content-length", "0") or 0))
        origin = headers.get("origin", "")
        if origin and origin.partition("://")[2] != headers.get("host"):
            refused = JSONResponse({"error": f"a page of {origin} may not ask this server"}, 403)
        if refused is not None:
            await refused(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if self._too_large(seen) is not None:
                raise HTTPException(413, self._message)
            return message

        await self._app(scope, counted, send)

    @property
    def _message(self) -> str:
        return (
            f"the request is larger than {self._most / MEGABYTE:g} MB; send fewer or smaller images"
        )

    def _too_large(self, size: int) -> Response | None:
        return JSONResponse({"error": self._message}, 413) if size > self._most else None


async def _images(request: Request) -> list[Image]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind == "multipart/form-data":
        images = await _of_form(request)
    elif kind == "application/json":
        images = _of_json(await request.body())
    else:
        raise HTTPException(
            415,
            f"content type: got {kind or 'none'}; wanted multipart/form-data or application/json",
        )
    if len(images) > MOST_IMAGES:
        raise DataError(f"got {len(images)} images in one request; wanted {MOST_IMAGES} at most")
    return images


async def _of_form(request: Request) -> list[Image]:
    most = MOST_IMAGES + 1
    async with request.form(max_files=most, max_fields=most) as form:
        files, labels = form.getlist("images"), form.getlist("labels")
        if labels and len(labels) != len(files):
            raise DataError(
                f"the form has {len(files)} files `images` and {len(labels)} texts `labels`; wanted "
                "as many of both"
            )
        found = []
        for number, file in enumerate(files):
            if isinstance(file, str):
                raise DataError("the form's `images` holds a text; wanted files")
            label = labels[number] if labels else None
            name = file.filename or f"image {number}"
            found.append(Image(name, await file.read(), None if label is None else str(label)))
        return found


def _of_json(body: bytes) -> list[Image]:
    try:
        given = json.loads(body)
        images = given["images"]
        assert isinstance(images, list)
    except (ValueError, TypeError, KeyError, AssertionError, RecursionError) as error:
        raise HTTPException(400, 'the body is not JSON like {"images": [...]}') from error
    return [_of_entry(entry, number) for number, entry in enumerate(images)]


def _of_entry(entry: Any, number: int) -> Image:
    fields = {"image": entry} if isinstance(entry, str) else entry
    if not isinstance(fields, dict) or not isinstance(fields.get("image"), str):
        raise DataError(
            f"image {number}: wanted a base64 text, or an object with `image`, one, and `label`"
        )
    name, label = fields.get("name", f"image {number}"), fields.get("label")
    if not isinstance(name, str) or not isinstance(label, str | None):
        raise DataError(f"image {number}: wanted texts as `name` and `label`")
    try:
        content = base64.b64decode(fields["image"], validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{name} is not base64: {error}") from error
    return Image(name, content, label)
