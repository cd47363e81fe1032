"""One report: reads the run, tests it again, and writes the page."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bomemeta.boundary import reason
from bomemeta.errors import BomemetaError, ConfigError
from bomemeta.extras import versions
from bomemeta.files import written_whole
from bomemeta.health import HealthMonitor
from bomemeta.page import classes, curves, html
from bomemeta.page.examination import Examination, examine
from bomemeta.page.html import Html
from bomemeta.page.source import Source, read, texts
from bomemeta.sections import label
from bomemeta.yaml_text import dump

EPISODES = 100  # tested again unless said otherwise
PACKAGES = ("bomemeta", "torch", "torchvision", "ray", "numpy", "learn2learn")


def write_report(
    run_dir: str | Path,
    out: str | Path | None = None,
    *,
    episodes: int | None = None,
    force: bool = False,
    overrides: Sequence[str] = (),
    keys: Mapping[str, Any] | None = None,
    trust: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Writes the page of a run, finished or not, and returns where it is: `out`, or the first free of
    NAME-report.html, NAME-report-2.html, ... here.

    `episodes`: how many test episodes are tested again (None: 100, or as many as the run's evaluation
    has, where that is less). Raises ConfigError where `out` exists and is not to be replaced (`force`),
    where the folder is no run's, or comes from elsewhere and would execute something.
    """
    if episodes is not None and episodes < 1:
        raise ConfigError(f"episodes: got {episodes}; wanted 1 or more")
    if out is not None:
        _check_free(Path(out), force)
    source = read(str(run_dir), list(overrides), keys, trust=trust)
    found = _examined(source, episodes, say)
    content = page(source, found).encode(errors="backslashreplace")
    return _write(content, Path(out) if out is not None else None, source.name, force)


def page(source: Source, found: Examination) -> str:
    """The whole page as text."""
    log = source.curves()
    optional = [curves.stream(log), *_of_classes(found), curves.others(log)]
    return html.document(
        f"{source.name}: bomemeta report",
        _head(source, found),
        _health(source),
        curves.learning(log),
        curves.barrier(log),
        *(part for part in optional if part is not None),
        curves.time(log),
        _metrics(source),
        _record(source),
    )


def _examined(source: Source, episodes: int | None, say: Callable[[str], None]) -> Examination:
    if source.checkpoint is None:
        return Examination(why="There is no checkpoint that could be tested.")
    wanted = episodes or min(EPISODES, source.settings.evaluation.episodes)
    try:
        return examine(source.settings, source.checkpoint, wanted, say)
    except BomemetaError as error:
        say(f"the page says nothing of classes: {error}")
        return Examination(why=f"The run could not be tested again here: {error}")
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # A problem's or a data set's own code; what the log says is worth a page without it.
        say(f"the page says nothing of classes: {reason(error)}")
        return Examination(why=f"The run could not be tested again here: {reason(error)}")


def _of_classes(found: Examination) -> list[Html]:
    if not found.tested:
        why = found.why.rstrip(".")
        message = f"{why}. Accuracy per class, confusions, episodes and features are left out."
        return [html.section("Classes", html.paragraph(message))]
    return [classes.by_class(found), classes.episodes(found), classes.embedding(found)]


def _head(source: Source, found: Examination) -> Html:
    settings = source.settings
    names = [label(settings.problem), f"solver {label(settings.solver)}"]
    if settings.data is not None:
        names.insert(1, f"data set {label(settings.data)}")
    ended = source.result is not None
    state = f"finished after {source.steps} steps"
    if not ended:
        state = f"not finished: step {source.steps} of {settings.steps or 'its stream'}"
    shown = [("steps" if ended else "steps so far", str(source.steps))]
    for name in ("test_accuracy", "acc", "test_loss", "upper_error", "f1"):
        if name in source.metrics:
            shown.append((f"{name.replace('_', ' ')} of the run", _with_interval(source, name)))
    if found.tested:
        mean, width = found.accuracy
        of = f"{found.episodes} episodes" if found.episodes else "the test part"
        interval = "" if width is None else f" ± {100 * width:.1f}"
        shown.append((f"accuracy on {of}, tested for this page", f"{100 * mean:.1f} %{interval}"))
    if source.result is not None and isinstance(source.result.get("wall_s"), int | float):
        shown.append(("time of the last process", curves.duration(source.result["wall_s"])))
    notes = html.listing(source.notes) if source.notes else Html("")
    return html.joined(
        [
            Html(f"<h1>{html.text(source.name)}</h1>"),
            html.paragraph(f"{', '.join(names)}. The run is {state}.", "dim"),
            html.tiles(shown),
            notes,
        ]
    )


def _with_interval(source: Source, name: str) -> str:
    value = source.metrics[name]
    if "accuracy" not in name and name != "acc":
        return f"{value:.4g}"
    width = source.metrics.get(name.replace("accuracy", "ci95")) if "accuracy" in name else None
    return f"{100 * value:.1f} %" + (f" ± {100 * width:.1f}" if width is not None else "")


def _health(source: Source) -> Html:
    """The findings, from the log: result.json has those of the last process alone."""
    monitor, reported = HealthMonitor(), []
    for line in source.log:
        step = int(line["step"])
        numbers = {name: value for name, value in line.items() if name != "step"}
        reported += [f"step {step}: {finding}" for finding in monitor.update(step, numbers)]
    if len(source.log) < 50:
        caption = f"The health monitor looks at 50 steps at a time, and the log has {len(source.log)}: it has nothing to say yet."
    elif reported:
        caption = "The health monitor found:"
    else:
        caption = "The health monitor found nothing wrong."
    findings = {finding.partition(": ")[2] for finding in reported}
    noted = source.result.get("notes") if source.result is not None else []
    notes = [note for note in texts(noted) if note not in findings]
    more = [Html("<h3>Notes of the run</h3>"), html.listing(notes)] if notes else []
    return html.section("Health", html.paragraph(caption), html.listing(reported), *more)


def _metrics(source: Source) -> Html:
    if source.result is None:
        message = "The run has not ended: there are no final metrics yet."
        return html.section("Final metrics", html.paragraph(message))
    rows = [(html.long(name), f"{value:.6g}") for name, value in source.metrics.items()]
    return html.section("Final metrics", html.table(("metric", "value"), rows))


def _record(source: Source) -> Html:
    there = source.result.get("versions") if source.result is not None else None
    if isinstance(there, Mapping):
        caption, found = "The versions of the run's last process.", dict(there)
    else:
        caption = "The versions that made this page: a run writes down its own at its end."
        found = {"python": platform.python_version(), **versions(*PACKAGES)}
    rows = [
        ("SHA-256 of x", html.long(source.sha256 or "there is no checkpoint")),
        ("seed", html.long(source.settings.seed)),
        ("run folder", html.long(source.folder.location)),
        *((str(name), html.long(version)) for name, version in found.items()),
    ]
    config = Html(f"<pre>{html.text(dump(source.settings.to_dict()))}</pre>")
    return html.joined(
        [
            html.section("What it was made with", html.paragraph(caption, "dim"), html.table(("", ""), rows)),
            html.section("Config", html.folded("every key with its value", config)),
        ]
    )  # fmt: skip


def _check_free(path: Path, force: bool) -> None:
    if path.is_dir():
        raise ConfigError(f"--out: {path} is a folder; wanted a file's name, as in {path}/report.html")  # fmt: skip
    if path.exists() and not force:
        raise ConfigError(
            f"--out: {path} exists; another name keeps both, --force (force=True) replaces it"
        )


def _write(content: bytes, out: Path | None, name: str, force: bool) -> Path:
    path = out if out is not None else _claimed(name)
    try:
        if out is not None and not force:
            path.open("xb").close()  # ours, or another was faster
        with written_whole(path) as stream:
            stream.write(content)
    except FileExistsError:
        _check_free(path, force)
        raise
    except OSError as error:
        raise ConfigError(f"--out: {path} cannot be written: {error.strerror or error}") from error
    return path


def _claimed(name: str) -> Path:
    """The first free NAME-report.html, -2, ... here, made so that nobody else takes it."""
    number = 1
    while True:
        path = Path(f"{name}-report{'' if number == 1 else f'-{number}'}.html")
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            return path
        number += 1
