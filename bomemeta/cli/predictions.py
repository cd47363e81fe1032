"""Commands that use what was trained: fit a classifier to images, predict with it, export it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bomemeta.cli.app import Trust, app, reported

PART = 64  # images between two movements of the progress bar

Classifier = Annotated[Path, typer.Argument(metavar="CLF", help="The folder that `fit` wrote.")]


@app.command()
def fit(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="The folder of a trained run.")],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Images in one folder for each class.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="CLF", help="A new folder for the classifier.")
    ],
    examples: Annotated[
        bool, typer.Option(help="Keep the examples in it, so that more can be added later.")
    ] = True,
    trust: Trust = False,
) -> None:
    """Fit a classifier to a folder of class folders, on a trained run's network."""
    with reported():
        from bomemeta.predict import load_classifier

        classifier = load_classifier(run_dir, trust=trust).fit(folder)
        where = classifier.save(out, examples=examples)
        counts = zip(classifier.classes_.tolist(), classifier.n_examples_.tolist(), strict=True)
        typer.echo(f"classifier of {len(classifier.classes_)} classes: {where}")
        for name, count in counts:
            typer.echo(f"  {name}: {count} examples")


@app.command()
def predict(
    clf: Classifier,
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Images, or folders of images.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="A table with all probabilities.")] = False,
    trust: Trust = False,
) -> None:
    """Say which class each image is of, with its probability.

    An image that cannot be read gets a line on stderr, and the exit code is then 1.
    """
    with reported():
        from bomemeta.errors import ConfigError, DataError
        from bomemeta.predict import load_classifier
        from bomemeta.predict.inputs import labelled_files

        if as_json and as_csv:
            raise ConfigError("--json and --csv: wanted one of them")
        classifier = load_classifier(clf, trust=trust)
        files: list[Path] = []
        for path in paths:
            files += [file for file, _ in labelled_files(path)] if path.is_dir() else [path]
        names = [str(name) for name in classifier.classes_.tolist()]
        if as_csv:
            typer.echo(_csv_line(["path", "class", *names]), nl=False)
        unread = 0
        with typer.progressbar(length=len(files), file=_stderr(), hidden=len(files) < PART) as bar:
            for first in range(0, len(files), PART):
                part = files[first : first + PART]
                good, rows = list(part), []
                try:
                    rows = list(classifier.predict_proba(part))
                except DataError:  # one of them: ask each alone
                    good = []
                    for file in part:
                        try:
                            rows.append(classifier.predict_proba([file])[0])
                            good.append(file)
                        except DataError as error:
                            typer.echo(str(error), err=True)
                            unread += 1
                for file, row in zip(good, rows, strict=True):
                    _show(file, names, row.tolist(), as_json, as_csv)
                bar.update(len(part))
        if unread:
            raise typer.Exit(1)


@app.command()
def trials(
    run_dir: Annotated[
        str,
        typer.Argument(
            metavar="RUN_DIR|CLF", help="The folder of a trained run, or of a classifier."
        ),
    ],
    where: Annotated[
        Path,
        typer.Argument(
            metavar="TRIALS",
            help="A folder of TRIAL/support/CLASS/IMAGE and TRIAL/query/CLASS/IMAGE, of Lake's runs, or an .npz.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="All predictions, as JSON.")] = False,
    trust: Trust = False,
) -> None:
    """Judge a run's classifier on given trials, each fitted to its own support images."""
    with reported():
        from bomemeta.predict import TrialsResult, load_classifier
        from bomemeta.predict.trials import evaluate_trials, trials_of

        classifier, given, outcomes = load_classifier(run_dir, trust=trust), trials_of(where), []
        for outcome in evaluate_trials(classifier, given):
            outcomes.append(outcome)
            if not as_json:
                typer.echo(f"{outcome.name}\t{100 * outcome.accuracy:.2f} %")
        result = TrialsResult(outcomes)
        if as_json:
            typer.echo(json.dumps(result.to_dict(), indent=1))
        else:
            width = result.half_width
            spread = "" if width is None else f" +- {100 * width:.2f}"
            typer.echo(f"{len(outcomes)} trials: {100 * result.accuracy:.2f}{spread} %")


@app.command()
def export(
    clf: Classifier,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A new file: .pt2 (torch.export) or .onnx.")
    ],
    trust: Trust = False,
) -> None:
    """Write a fitted classifier as one graph, and check it against the original."""
    with reported():
        from bomemeta.predict import load_classifier

        written = load_classifier(clf, trust=trust).export(file)
        typer.echo(f"{written}: images [n, C, H, W] -> logits [n, classes], features [n, d]")


def _show(file: Path, names: list[str], row: list[float], as_json: bool, as_csv: bool) -> None:
    best = max(range(len(row)), key=row.__getitem__)
    if as_json:
        record = {
            "path": str(file),
            "class": names[best],
            "probabilities": dict(zip(names, row, strict=True)),
        }
        typer.echo(json.dumps(record))
    elif as_csv:
        typer.echo(_csv_line([str(file), names[best], *row]), nl=False)
    else:
        typer.echo(f"{file}\t{names[best]}\t{row[best]:.4f}")


def _csv_line(cells: list[Any]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue()


def _stderr() -> Any:
    return typer.get_text_stream("stderr")
