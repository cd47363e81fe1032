"""The command line. Whatever runs something comes from `bomemeta.api`; here are names, help,
messages and exit codes.

Exit codes: 0 done, 1 the run failed, 2 the config or the command is wrong, 130 interrupted.
Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from bomemeta.cli import runs, searches, inquiries, examinations, profiles, comparisons, lists  # noqa: F401, I001  the commands, in the order in which help shows them
from bomemeta.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """The entry point of the `bomemeta` command."""
    app()
