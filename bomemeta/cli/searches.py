"""The command that searches for hyperparameters."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from bomemeta.cli.app import INTERRUPTED, ConfigName, Overrides, Trust, app, reported


@app.command()
def tune(
    config: ConfigName,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Resume the search in this folder, or at this URI; CONFIG is the same file.",
        ),
    ] = None,
    trust: Trust = False,
) -> None:
    """Search over hyperparameters as the tune file CONFIG says, with Ray Tune.

    Prints the table of trials and writes it, with the best config as best.yaml, into the search's
    folder: output_dir=DIR chooses it (a path, or a URI as in s3://BUCKET/SEARCH), runs/NAME is the
    default. Ctrl-C keeps what was reported; the line that it prints resumes it.
    """
    with reported():
        from bomemeta.tune import tune as search

        result = search(
            config,
            overrides or (),
            resume=resume,
            trust=trust,
            say=lambda text: typer.echo(text, err=True),
        )
        if result.interrupted:
            again = shlex.join(
                ["bomemeta", "tune", config, *(overrides or ()), "--resume", str(result.output_dir)]
            )
            typer.echo(f"interrupted; resume with `{again}`", err=True)
            raise typer.Exit(INTERRUPTED)
        typer.echo(result.table, nl=False)
        typer.echo(f"best config: {result.best_config}")
