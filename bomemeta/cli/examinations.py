"""Commands that say beforehand what a run will need."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from bomemeta.cli.app import ConfigName, Overrides, app, reported


@app.command()
def doctor(
    config: ConfigName,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDR",
            help="A running Ray cluster to look at, as address=ADDR; it is left as it was.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, with the numbers behind it.")
    ] = False,
) -> None:
    """Say what a run will need, and whether it is there: memory, data, workers, time, disk.

    Runs a few dry steps in this process and writes nothing. One line per finding, OK, NOTE or
    PROBLEM; the exit code is 1 where there is a PROBLEM.
    """
    with reported():
        from bomemeta.doctor import examine

        given = [*(overrides or ()), *([f"address={address}"] if address is not None else [])]
        with contextlib.redirect_stdout(sys.stderr):  # what a user's own code prints
            report = examine(config, given, say=lambda text: typer.echo(text, err=True))
        for line in [report.to_json()] if as_json else report.lines():
            typer.echo(line)
    if not report.ok:
        raise typer.Exit(1)
