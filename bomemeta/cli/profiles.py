"""The command that says where a step's time goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from bomemeta.cli.app import ConfigName, Overrides, app, reported


@app.command()
def profile(
    config: ConfigName,
    overrides: Overrides = None,
    steps: Annotated[
        int, typer.Option(min=1, help="How many steps are measured; the values are their medians.")
    ] = 10,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps before, which are not counted.")] = 3,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers there too.")
    ] = None,
) -> None:
    """Say where the time of a step goes, and which key moves the largest part.

    Real steps of CONFIG from its start, with its workers; then the same once more in this process,
    where the parts of the computation are told apart. Writes nothing but FILE.
    """
    with reported():
        os.environ.setdefault(
            "KINETO_LOG_LEVEL", "6"
        )  # torch's profiler, read when torch loads: errors that are none (no GPU)
        from bomemeta.profile import profile as measure

        found = measure(
            config,
            overrides or (),
            steps=steps,
            warm_up=warm_up,
            say=lambda text: typer.echo(text, err=True),
        )
        for line in found.lines():
            typer.echo(line)
        if json_file is not None:
            found.write(json_file)
