"""Writes the site's pages that repeat what is elsewhere: the API from its docstrings, the commands
from their `--help`, the tutorials, and the files of the repository's root. mkdocs runs it as a hook;
nothing is written into docs/.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer
import yaml

import bomemeta
from bomemeta.cli import app

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs runs this file by its path
import notebooks

ROOT = Path(__file__).parents[1]
GROUPS = {
    "Runs": ["bomemeta.api", "bomemeta.inquiries", "bomemeta.contract", "bomemeta.predict"],
    "Base classes": ["bomemeta.core."],
    "Solvers": ["bomemeta.solvers."],
    "Problems": ["bomemeta.problems."],
    "Data sets": ["bomemeta.data."],
}
MODULES = ["bomemeta.errors", "bomemeta.tune", "bomemeta.doctor", "bomemeta.profile"]
OBJECTS_MEMBERS = ("Base classes", "Runs")  # of the others the keys alone matter: configuration.md


def api() -> str:
    """One `::: name` of mkdocstrings for each public name."""
    lines = [
        "# Python API",
        "",
        "Every name here is also in `bomemeta` itself: `import bomemeta as bm`, `bm.train(...)`.",
        "Written from the docstrings. The keys of solvers, problems and data sets, one by one:",
        "[Configuration](../configuration.md).",
    ]
    modules = bomemeta._NAMES
    for group, heads in GROUPS.items():
        lines += ["", f"## {group}"]
        for module, names in modules.items():
            if module.startswith(tuple(heads)):
                for name in names:
                    lines += ["", f"::: {module}.{name}"]
                    if group not in OBJECTS_MEMBERS:
                        lines += ["    options:", "      members: false"]
                    elif name == "Problem":  # whose base classes are not named here
                        lines += ["    options:", "      inherited_members: true"]
    lines += ["", "## Modules"]
    for module in MODULES:
        lines += ["", f"::: {module}"]
    return "\n".join([*lines, ""])


def commands() -> str:
    """Each command with its help, as `--help` has it."""
    lines = [
        "# Commands",
        "",
        "`bomemeta COMMAND --help` says the same. Exit codes: 0 done, 1 the run failed, 2 the config or",
        "the command is wrong, 130 interrupted.",
    ]
    top = typer.main.get_command(app)
    for words, command in _leaves(top, ["bomemeta"]):
        lines += ["", *_command(words, command)]
    return "\n".join([*lines, ""])


def _leaves(command: Any, words: list[str]) -> list[tuple[list[str], Any]]:
    below = getattr(command, "commands", None)
    if below is None:
        return [(words, command)]
    return [
        leaf
        for name, each in below.items()
        if not each.hidden
        for leaf in _leaves(each, [*words, name])
    ]


def _command(words: list[str], command: Any) -> list[str]:
    context = command.make_context(words[-1], [], resilient_parsing=True)
    usage = " ".join([*words, *command.collect_usage_pieces(context)])
    lines = [f"## {' '.join(words)}", "", "```text", usage, "```", ""]
    lines += [_paragraphs(command.help or ""), ""]
    rows = []
    for parameter in command.get_params(context):
        if getattr(parameter, "hidden", False):
            continue
        names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
        if parameter.param_type_name == "argument":
            names = f"`{parameter.metavar or parameter.name.upper()}`"
        rows.append(f"| {names} | {_default(parameter)} | {_cell(parameter.help or '')} |")
    if rows:
        lines += ["| argument or option | default | |", "|---|---|---|", *rows]
    return lines


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required or value is None or callable(value) or "Sentinel" in type(value).__name__:
        return "required" if parameter.required else ""
    return "" if value in (False, (), []) else f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.replace("\b", "").split("\n\n"))


def root_page(name: str) -> str:
    """A Markdown file of the root, with its links as they are from docs/."""
    return (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")


def cite() -> str:
    """What to cite, from CITATION.cff."""
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    cited = yaml.safe_load(text)
    lines = [
        "# How to cite",
        "",
        cited["message"],
        "",
        f"{cited['title']}, version {cited['version']}.",
        "",
    ]
    for work in cited["references"]:
        names = ", ".join(
            f"{each['given-names']} {each['family-names']}" for each in work["authors"]
        )
        lines.append(f"* {names}: *{work['title']}*, {work['conference']['name']} {work['year']}")
    return "\n".join(
        [
            *lines,
            "",
            "As a file for reference managers, `CITATION.cff`:",
            "",
            "```yaml",
            text.strip(),
            "```",
            "",
        ]
    )


PAGES = {
    "reference/api.md": api,
    "reference/commands.md": commands,
    "changelog.md": lambda: root_page("CHANGELOG.md"),
    "contributing.md": lambda: root_page("CONTRIBUTING.md"),
    "cite.md": cite,
}


def on_files(files: Any, config: Any) -> Any:
    """mkdocs' hook: adds the pages."""
    from mkdocs.structure.files import File

    for path, write in PAGES.items():
        files.append(File.generated(config, path, content=write()))
    for path, content in notebooks.pages():
        if (source := files.get_file_from_path(path)) is not None:
            files.remove(source)
        files.append(File.generated(config, path, content=content))
    return files
