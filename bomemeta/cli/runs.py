"""Commands that train and evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from bomemeta.cli.app import ConfigName, Overrides, RunDir, Trust, app, reported, run_and_show


@app.command()
def train(
    config: ConfigName,
    overrides: Overrides = None,
    auto_resume: Annotated[
        bool,
        typer.Option(
            "--auto-resume",
            help="Resume the run in output_dir, which must be given; begin it where there is none.",
        ),
    ] = False,
    restarts: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Start again when killed or without a cluster, N times in a row without a new checkpoint. With --auto-resume.",
        ),
    ] = 0,
) -> None:
    """Meta-train as CONFIG says, then meta-test and print the result.

    The run's folder is printed first: output_dir=DIR chooses it (a path, or a URI as in
    s3://BUCKET/RUN), runs/NAME is the default. Ctrl-C stops after the current step; `bomemeta
    resume` continues from there to the same result, and so does the same command again with
    --auto-resume. With --restarts too, a run that dies (kill -9, out of memory, a crash) is started
    again by itself; what ends with an error or was stopped is not. The last line says how the run
    ended.
    """
    from bomemeta.supervise import announced, is_needed

    if restarts or is_needed(config, overrides or ()):
        raise typer.Exit(_supervised(config, overrides or (), auto_resume, restarts))
    again = "the same command" if auto_resume else None
    with announced(), reported():
        from bomemeta import runs

        run_and_show(
            lambda listener: runs.train(
                config, overrides or (), auto_resume=auto_resume, listener=listener
            ),
            again,
        )


def _trusted(trust: bool) -> dict[str, Any]:
    return {"trust": True} if trust else {}


def _supervised(config: str, overrides: Sequence[str], auto_resume: bool, restarts: int) -> int:
    with reported():
        from bomemeta.errors import ConfigError
        from bomemeta.supervise import cluster_of, location_of, same_command, supervise

        if restarts and not auto_resume:
            raise ConfigError(
                f"--restarts {restarts}: a run that is started again resumes where it was; give --auto-resume too"
            )
        location = location_of(config, overrides)
        return supervise(
            same_command(config, overrides, auto_resume),
            location,
            restarts,
            lambda text: typer.echo(text, err=True),
            cluster_of(config, overrides),
            "the same command" if auto_resume else f"`bomemeta resume {location or 'RUN_DIR'}`",
        )


@app.command()
def resume(run_dir: RunDir, overrides: Overrides = None, trust: Trust = False) -> None:
    """Resume a run that was interrupted, to the same bits.

    Keys that cannot change the result may be set, such as workers=4 or log.every_steps=5.
    """
    with reported():
        from bomemeta import runs

        run_and_show(
            lambda listener: runs.resume(
                run_dir, overrides or (), **_trusted(trust), listener=listener
            )
        )


@app.command()
def extend(
    run_dir: RunDir,
    data: Annotated[
        str, typer.Option(metavar="NEW", help="An .npz with x_train, y_train, x_test and y_test.")
    ],
    overrides: Overrides = None,
    tasks: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="How many tasks are made of it. Default: one, or of a split stream as many as its new classes give.",
        ),
    ] = None,
    trust: Trust = False,
) -> None:
    """Append new data to a finished stream and train on it, with the same memory.

    The result has the bits of a run that had the data at the end of its stream from the start.
    Ctrl-C and `bomemeta resume` as in any run.
    """
    with reported():
        from bomemeta import runs

        run_and_show(
            lambda listener: runs.extend(
                run_dir, data, tasks, overrides or (), **_trusted(trust), listener=listener
            )
        )


@app.command("eval")
def evaluate(run_dir: RunDir, overrides: Overrides = None, trust: Trust = False) -> None:
    """Meta-test a run's last checkpoint again.

    Keys that cannot change training may be set, as in evaluation.episodes=2000.
    """
    with reported():
        from bomemeta import runs

        run_and_show(
            lambda listener: runs.evaluate(
                run_dir, overrides or (), **_trusted(trust), listener=listener
            )
        )


@app.command()
def submit(
    config: ConfigName,
    overrides: Overrides = None,
    address: Annotated[
        str,
        typer.Option(
            metavar="URL",
            envvar="RAY_API_SERVER_ADDRESS",
            help="The cluster's dashboard, as in http://HEAD:8265.",
        ),
    ] = "http://127.0.0.1:8265",
    wait: Annotated[bool, typer.Option(help="Show the job's log until it ends.")] = True,
    uv: Annotated[
        bool,
        typer.Option(
            "--uv",
            help="Run with `uv run`, which builds the environment of this folder's pyproject.toml there.",
        ),
    ] = False,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Leave files of this folder out, as a line of .gitignore does."
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=VALUE]", help="Set an environment variable for the job."),
    ] = None,
    restarts: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Start the run again when it is killed, as `bomemeta train --restarts N`.",
        ),
    ] = 3,
) -> None:
    """Run `bomemeta train CONFIG --auto-resume --restarts 3` as a job on a Ray cluster.

    The job runs in a copy of the current folder (without .git, .venv, runs, data, and what
    .gitignore names), so the config and what it imports must be in it; output_dir must be an
    absolute path that the cluster's machines share, or a URI. The same submission again resumes
    with the run. The exit code says how the job ended: 0, 1, 75 where another try is worth it,
    or 130 if stopped.
    """
    with reported():
        from bomemeta import submit as jobs

        submission = jobs.prepare(
            config,
            overrides or (),
            uv=uv,
            excludes=exclude or (),
            environment=env or (),
            restarts=restarts,
        )
        code = jobs.submit(
            submission,
            address,
            wait=wait,
            say=lambda text: typer.echo(text, err=True),
            show=lambda text: typer.echo(text, nl=False),
        )
    raise typer.Exit(code)
