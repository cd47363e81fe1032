"""Commands about what is there: registered classes and data sets."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bomemeta.cli.app import app, reported

data_app = typer.Typer(
    help="Data sets on this machine.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")


class Kind(StrEnum):
    """What `list` can show; the values are the words typed."""

    solvers = "solvers"
    problems = "problems"
    datasets = "datasets"
    configs = "configs"


@app.command("list")
def list_(
    kind: Annotated[
        Kind | None, typer.Argument(help="Which list; without it solvers, problems and data sets.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="Show the keys of this one, or the text of this config."
        ),
    ] = None,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="FILE", help="A file of yours that registers more."),
    ] = None,
) -> None:
    """Show solvers, problems, data sets and configs, and the keys of one."""
    with reported():
        from bomemeta import listing
        from bomemeta.imports import load_imports

        load_imports(imports or [])
        if kind is Kind.configs:
            lines = listing.config_text(name) if name is not None else listing.config_names()
        elif kind is not None and name is not None:
            lines = listing.keys_of(kind.value, name)
        else:
            lines = listing.names_of(
                [kind.value]
                if kind is not None
                else [each.value for each in Kind if each is not Kind.configs]
            )
        for line in lines:
            typer.echo(line)


@data_app.command("prepare")
def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The data set, as in omniglot.")],
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where to put it, later a config's data.root; BOMEMETA_DATA if left out, for glyphs the cache.",
        ),
    ] = None,
    trust_pickles: Annotated[
        bool,
        typer.Option(
            "--trust-pickles",
            help="Load a download that is a pickle, and could run code, because you trust its source.",
        ),
    ] = False,
) -> None:
    """Download a data set into a folder that runs read.

    Needs a connection to the internet. What is there already is left as it is.
    """
    with reported():
        from bomemeta.data.prepare import prepare as prepare_data

        path = prepare_data(name, root, trust_pickles=trust_pickles)
        typer.echo(f"{name} is ready: {path.resolve()}")
