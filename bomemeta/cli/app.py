"""The command line's one application, and what its commands share: arguments, messages and exit codes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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

ConfigName = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of one in ./configs.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys to set over the config, as in steps=100 solver.inner_steps=5."),
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder that the run printed when it started.")]


@app.callback(invoke_without_command=True)
def _version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if show:
        typer.echo(f"bomemeta {version('bomemeta')}")
        raise typer.Exit


def run_and_show(start: Callable[[Listener], Result]) -> None:
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
def reported() -> Iterator[None]:
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
