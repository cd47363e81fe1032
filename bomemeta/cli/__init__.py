"""The command line. Whatever runs something comes from `bomemeta.api`; here are names, help,
messages and exit codes.

Exit codes: 0 done, 1 the run failed and will fail again, 2 the config or the command is wrong, 75 the
same command is worth another try (what it ran on is gone), 130 interrupted.
Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

import io
import sys

from bomemeta.cli import (  # noqa: F401  the commands, in the order in which help shows them
    comparisons,
    examinations,
    inquiries,
    lists,
    pages,
    predictions,
    profiles,
    runs,
    searches,
    serving,
)
from bomemeta.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """The entry point of the `bomemeta` command."""
    for stream in (sys.stdout, sys.stderr):  # a terminal of ASCII shows what it has not as \\xe9
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
