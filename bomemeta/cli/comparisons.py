"""The command that puts finished runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bomemeta.cli.app import app, reported


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]RUN_DIR...",
            help="Run folders, or folders of seeds; NAME is what the table calls it.",
        ),
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A metric of result.json; may be given several times."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What the others are compared with; else the first."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers there.")
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the tables there.")
    ] = None,
    figure_file: Annotated[
        Path | None,
        typer.Option("--figure", metavar="FILE", help="Draw means and intervals: .png or .svg."),
    ] = None,
    html_file: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write one page with tables and figure."),
    ] = None,
) -> None:
    """Compare finished runs: means over seeds, paired differences with intervals, ranks, tests.

    Runs with equal seeds are paired. What is written replaces a file of the same name.
    """
    with reported():
        from bomemeta.compare import compare as compare_entries
        from bomemeta.compare import read_entries, tables
        from bomemeta.errors import ConfigError
        from bomemeta.files import written_whole

        kind = figure_file.suffix.lstrip(".") if figure_file is not None else "png"
        if kind not in ("png", "svg"):
            raise ConfigError(f"--figure: got {figure_file}; wanted a name in .png or .svg")
        found = compare_entries(read_entries(runs), metric or (), reference)
        text = tables.markdown(found)
        typer.echo(text, nl=False)
        contents = {
            json_file: tables.as_json(found).encode(),
            markdown_file: text.encode(),
        }
        if figure_file is not None:
            contents[figure_file] = tables.figure(found, kind)
        if html_file is not None:
            contents[html_file] = tables.page(found).encode()
        for path, content in contents.items():
            if path is not None:
                with written_whole(path) as stream:
                    stream.write(content)
