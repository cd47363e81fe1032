"""The command line. Whatever runs something comes from `bomemeta.api`; here are names, help, messages and exit codes.

Exit codes: 0 done, 1 the run failed, 2 the config or the command is wrong, 130 interrupted.
Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bomemeta.api import Result
    from bomemeta.report import Listener

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    help="Bilevel meta-learning, distributed on Ray: the same bits for any number of workers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help reads the same in a pipe, a log and a terminal
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Data sets on this machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

_Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys to set over the config, as in steps=100 solver.inner_steps=5."),
]
_RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder that the run printed when it started.")]


class Kind(StrEnum):
    """What `list` can show; the values are the words typed."""

    solvers = "solvers"
    problems = "problems"
    datasets = "datasets"


def main() -> None:
    """The entry point of the `bomemeta` command."""
    app()


@app.callback(invoke_without_command=True)
def _version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if show:
        typer.echo(f"bomemeta {version('bomemeta')}")
        raise typer.Exit


@app.command()
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of one in ./configs.")],
    overrides: _Overrides = None,
) -> None:
    """Meta-train as CONFIG says, then meta-test and print the result.

    The run's folder is printed first: output_dir=DIR chooses it, runs/NAME is the default. Ctrl-C stops after the
    current step; `bomemeta resume` goes on from there to the same result.
    """
    with _reported():
        from bomemeta import api

        _run(lambda listener: api.train(config, overrides or (), listener=listener))


@app.command()
def resume(run_dir: _RunDir, overrides: _Overrides = None) -> None:
    """Go on with a run that was interrupted, to the same bits.

    Keys that cannot change the result may be set, such as workers=4 or log.every_steps=5.
    """
    with _reported():
        from bomemeta import api

        _run(lambda listener: api.resume(run_dir, overrides or (), listener=listener))


@app.command("eval")
def evaluate(run_dir: _RunDir, overrides: _Overrides = None) -> None:
    """Meta-test a run's last checkpoint again.

    Keys that cannot change training may be set, as in evaluation.episodes=2000.
    """
    with _reported():
        from bomemeta import api

        _run(lambda listener: api.evaluate(run_dir, overrides or (), listener=listener))


@app.command()
def check(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of one in ./configs.")],
    overrides: _Overrides = None,
    run: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Take x from this run's last checkpoint, not from the start.")
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="How many tasks; a shared lower problem is checked whole.")] = 2,
    settle: Annotated[int, typer.Option(min=1, help="At most so many steps until the solver's direction stands still.")] = 200,
    directions: Annotated[int, typer.Option(min=0, help="Random directions for finite differences.")] = 3,
    at_step: Annotated[
        int | None, typer.Option(min=0, help="The step that the solver is told, for schedules; else the checkpoint's, or 0.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers there too.")] = None,
) -> None:
    """Compare the solver's hypergradient with the implicit one and with finite differences.

    In float64, in this process, on a few tasks at a fixed x. The last line but notes begins with OK, POOR, WRONG or
    UNDECIDED; the exit code is 0 for OK and 1 for the others.
    """
    with _reported():
        from bomemeta.hypercheck import check as compare

        report = compare(
            config,
            overrides or (),
            tasks=tasks,
            settle_steps=settle,
            directions=directions,
            run_dir=run,
            at_step=at_step,
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
    name: Annotated[str, typer.Argument(metavar="NAME", help="The experiment, as in bome_toys; a wrong name shows them all.")],
    full: Annotated[bool, typer.Option("--full", help="The paper's lengths; without it, one to three minutes on a CPU.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder; reproduced/NAME if left out. What is done there is not done again."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of every run.")] = 0,
) -> None:
    """Rerun a paper's experiment into a table and a figure.

    Writes table.md, table.json, figure.png and one file per run. Ctrl-C keeps the finished runs; the same command goes on.
    """
    with _reported():
        from bomemeta.reproduce import reproduce as rerun

        folder = rerun(name, full=full, out=out, seed=seed, say=lambda text: typer.echo(text, err=True))
        typer.echo((folder / "table.md").read_text(encoding="utf-8"), nl=False)
        typer.echo(f"written: {folder}")


@app.command("list")
def list_(
    kind: Annotated[Kind | None, typer.Argument(help="Which list; all three without it.")] = None,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show the config keys of this one.")] = None,
    imports: Annotated[
        list[str] | None, typer.Option("--import", metavar="FILE", help="A file of yours that registers more.")
    ] = None,
) -> None:
    """Show solvers, problems and data sets, and the config keys of one."""
    with _reported():
        from bomemeta import listing
        from bomemeta.imports import load_imports

        load_imports(imports or [])
        if kind is not None and name is not None:
            lines = listing.keys_of(kind.value, name)
        else:
            lines = listing.names_of([kind.value] if kind is not None else [each.value for each in Kind])
        for line in lines:
            typer.echo(line)


@data_app.command("prepare")
def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The data set, as in omniglot.")],
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where to put it, later a config's data.root; BOMEMETA_DATA if left out, for glyphs the cache."
        ),
    ] = None,
    trust_pickles: Annotated[
        bool,
        typer.Option("--trust-pickles", help="Load a download that is a pickle, and could run code, because you trust its source."),
    ] = False,
) -> None:
    """Download a data set into a folder that runs read.

    Needs a connection to the internet. What is there already is left as it is.
    """
    with _reported():
        from bomemeta.data.prepare import prepare as prepare_data

        path = prepare_data(name, root, trust_pickles=trust_pickles)
        typer.echo(f"{name} is ready: {path.resolve()}")


def _run(start: Callable[[Listener], Result]) -> None:
    """Runs with progress on stderr, prints the result to stdout, and says how to go on after an interruption."""
    from bomemeta.report import TerminalListener, show_result

    listener = TerminalListener()
    with contextlib.closing(listener):
        result = start(listener)
    if result.interrupted:
        listener.note(f"interrupted after {result.steps} steps; go on with `bomemeta resume {result.run_dir}`")
        raise typer.Exit(INTERRUPTED)
    show_result(result)


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Turns bomemeta's own errors into a message and an exit code; any other error is a bug and keeps its traceback."""
    from bomemeta.errors import BomemetaError, ConfigError

    try:
        yield
    except BomemetaError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error
    except KeyboardInterrupt as error:  # in between start and end the run itself handles it
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from error


if __name__ == "__main__":
    main()
