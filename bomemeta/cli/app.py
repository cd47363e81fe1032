"""The command line's one application, and what its commands share: arguments, messages and exit
codes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import bomemeta

if TYPE_CHECKING:
    from bomemeta.api import Result
    from bomemeta.report import Listener

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the same command is worth another try

app = typer.Typer(
    help="Bilevel meta-learning, distributed on Ray: the same bits for any number of workers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help reads the same in a pipe, a log and a terminal
    pretty_exceptions_enable=False,
)

ConfigName = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="A YAML file, or the name of one that `list configs` shows."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Keys to set over the config, as in steps=100 solver.inner_steps=5.",
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Execute what a folder from elsewhere names (imports, classes, pickles): you have looked at it.",
    ),
]
RunDir = Annotated[
    str,
    typer.Argument(
        metavar="RUN_DIR", help="The folder or URI that the run printed when it started."
    ),
]


@app.callback(invoke_without_command=True)
def _version(
    show: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    if show:
        typer.echo(f"bomemeta {bomemeta.__version__}")
        raise typer.Exit


def run_and_show(start: Callable[[Listener], Result], again: str | None = None) -> None:
    """Runs with progress on stderr, prints the result to stdout, and ends with a line that says how
    the run ended and where it is.

    `again`: how to resume after an interruption; None: `bomemeta resume`.
    """
    from bomemeta.errors import BomemetaError
    from bomemeta.report import TerminalListener, show_result

    listener = TerminalListener()
    try:
        with contextlib.closing(listener):
            result = start(listener)
    except (BomemetaError, KeyboardInterrupt, SystemExit) as error:
        if listener.run_dir is not None:
            typer.echo(f"run folder: {listener.run_dir}", err=True)
        if isinstance(error, BomemetaError):
            _say_failed(error)
            _leave_if_headless(error)
            raise typer.Exit(_code(error)) from error
        typer.echo(f"interrupted; {_how_to_resume(listener.run_dir, again)}", err=True)
        raise typer.Exit(INTERRUPTED) from error
    location = result.uri or result.run_dir
    if result.interrupted:
        typer.echo(
            f"interrupted after {result.steps} steps; {_how_to_resume(location, again)}", err=True
        )
        raise typer.Exit(INTERRUPTED)
    show_result(result)
    typer.echo(f"done after {result.steps} steps; run folder: {location}", err=True)


def _how_to_resume(location: Path | str | None, again: str | None) -> str:
    return (
        f"resume with {again or f'`bomemeta resume {location}`'}"
        if location is not None
        else "no run had begun"
    )


def _say_failed(error: Exception) -> None:
    """The message; where it has several lines, its first one again, so that the last line of a log
    says what happened.
    """
    first, *others = str(error).splitlines()
    if others:
        typer.echo(str(error), err=True)
    typer.echo(f"failed{' (all of it above)' if others else ''}: {first}", err=True)


def _leave_if_headless(error: Exception) -> None:
    """Without a head Ray cannot take its leave: it would end this process with a code of its own."""
    from bomemeta.errors import HeadLost

    if isinstance(error, HeadLost):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(TRY_AGAIN)


def _code(error: Exception) -> int:
    from bomemeta.errors import ClusterLost, ConfigError, StorageError

    if isinstance(error, ConfigError):
        return 2
    return TRY_AGAIN if isinstance(error, ClusterLost | StorageError) else 1


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turns bomemeta's own errors into a message and an exit code; any other error is a bug and
    keeps its traceback.

    SIGTERM ends a command as Ctrl-C does, with its last words; while steps are taken, the run
    handles both itself.
    """
    from bomemeta.errors import BomemetaError

    before = (
        signal.signal(signal.SIGTERM, signal.default_int_handler) if _in_main_thread() else None
    )
    try:
        yield
    except BomemetaError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(_code(error)) from error
    except (KeyboardInterrupt, SystemExit) as error:  # SystemExit: Ray makes that of a SIGTERM
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from error
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
