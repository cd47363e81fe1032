"""The command that shows a run on a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bomemeta.cli.app import Overrides, RunDir, Trust, app, reported


@app.command()
def report(
    run_dir: RunDir,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The page; the first free NAME-report.html here if left out."
        ),
    ] = None,
    episodes: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="How many test episodes are tested again; 100 if left out, or as many as the run's evaluation has.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE where it exists.")] = False,
    trust: Trust = False,
) -> None:
    """Write one HTML page about a run: curves, lambda and q, times, classes, episodes, findings, config.

    The run may be finished or not. Its newest checkpoint is tested again in this process. Keys may
    say where the data are now, as in data.root=DIR. The page loads nothing and runs nothing.
    """
    with reported():
        from bomemeta.page.run_page import write_report

        written = write_report(
            run_dir,
            out,
            episodes=episodes,
            force=force,
            overrides=overrides or (),
            trust=trust,
            say=lambda text: typer.echo(text, err=True),
        )
        typer.echo(f"written: {written.resolve()}")
