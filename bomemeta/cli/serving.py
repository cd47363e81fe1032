"""The command that serves a trained network over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bomemeta.cli.app import Trust, app, reported


@app.command()
def serve(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_DIR", help="A trained run's folder, or a classifier that `fit` wrote."
        ),
    ],
    tenants: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="Where classifiers are kept; made where it is missing."
        ),
    ] = Path("tenants"),
    host: Annotated[
        str, typer.Option(help="0.0.0.0 lets other machines in; nobody is asked who they are.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[
        int, typer.Option(min=1, help="Processes that hold the network, one CPU each.")
    ] = 1,
    max_mb: Annotated[
        float, typer.Option(min=0.001, max=100_000, help="The largest request, in megabytes.")
    ] = 32.0,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster to run on; without, one is started here.")
    ] = None,
    trust: Trust = False,
) -> None:
    """Serve a trained network: tenants fit, add_examples and predict over HTTP, and a page to try it.

    Each tenant has a small head of its own on the one network. Ctrl-C ends the server.
    """
    with reported():
        from bomemeta.extras import require

        for module in ("starlette", "python_multipart"):
            require(module, "serve", "serve")
        from bomemeta.serve import serving

        serving.run(
            source,
            tenants,
            host=host,
            port=port,
            replicas=replicas,
            most_bytes=int(max_mb * 10**6),
            address=address,
            trust=trust,
            say=lambda text: typer.echo(text, err=True),
        )
