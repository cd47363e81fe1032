"""Commands that look into a config without training it, and that rerun the papers' experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bomemeta.cli.app import ConfigName, Overrides, app, reported


@app.command()
def check(
    config: ConfigName,
    overrides: Overrides = None,
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR", help="Take x from this run's last checkpoint, not from the start."
        ),
    ] = None,
    tasks: Annotated[
        int, typer.Option(min=1, help="How many tasks; a shared lower problem is checked whole.")
    ] = 2,
    settle: Annotated[
        int,
        typer.Option(
            min=1, help="At most so many steps until the solver's direction stands still."
        ),
    ] = 200,
    directions: Annotated[
        int, typer.Option(min=0, help="Random directions for finite differences.")
    ] = 3,
    at_step: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The step that the solver is told, for schedules; else the checkpoint's, or 0.",
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="At most so many trials with other keys where the direction is not OK; else all.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers there too.")
    ] = None,
) -> None:
    """Compare the solver's hypergradient with the implicit one and with finite differences.

    In float64, in this process, on a few tasks at a fixed x. The last line but notes begins with
    OK, POOR, WRONG or UNDECIDED; the exit code is 0 for OK and 1 for the others.
    """
    with reported():
        from bomemeta.hypercheck import check as compare

        report = compare(
            config,
            overrides or (),
            tasks=tasks,
            settle_steps=settle,
            directions=directions,
            run_dir=run,
            at_step=at_step,
            trials=trials,
            say=lambda text: typer.echo(text, err=True),
        )
        for line in report.lines():
            typer.echo(line)
        if json_file is not None:
            report.write(json_file)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def reproduce(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="The experiment, as in bome_toys; a wrong name shows them all."
        ),
    ],
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="The paper's lengths; without it, one to three minutes on a CPU."
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The folder; reproduced/NAME if left out. What is done there is not done again.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of every run.")] = 0,
) -> None:
    """Rerun a paper's experiment into a table and a figure.

    Writes table.md, table.json, figure.png and one file per run. Ctrl-C keeps the finished runs;
    the same command resumes.
    """
    with reported():
        from bomemeta.reproduce import reproduce as rerun

        folder = rerun(
            name, full=full, out=out, seed=seed, say=lambda text: typer.echo(text, err=True)
        )
        typer.echo((folder / "table.md").read_text(encoding="utf-8"), nl=False)
        typer.echo(f"written: {folder}")
