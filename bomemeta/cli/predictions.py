"""Commands that use what was trained: fit a classifier to images, predict with it, export it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import ExitStack
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
        from bomemeta.predict.classifier import few_shot_classifier

        classifier = few_shot_classifier(run_dir, trust=trust).fit(folder)
        where = classifier.save(out, examples=examples)
        counts = zip(classifier.classes_.tolist(), classifier.n_examples_.tolist(), strict=True)
        typer.echo(f"classifier of {len(classifier.classes_)} classes: {where}")
        for name, count in counts:
            typer.echo(f"  {name}: {count} examples")


@app.command()
def predict(
    clf: Classifier,
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Images, or folders of images; with --workers also URIs as in s3://BUCKET/FOLDER.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="A table with all probabilities.")] = False,
    workers: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Through Ray Data on N workers. 0: this process."),
    ] = 0,
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="With --workers: a running Ray cluster."),
    ] = None,
    trust: Trust = False,
) -> None:
    """Say which class each image is of, with its probability.

    An image that cannot be read gets a line on stderr, and the exit code is then 1.
    """
    with reported(), ExitStack() as stack:
        from bomemeta.errors import ConfigError

        if as_json and as_csv:
            raise ConfigError("--json and --csv: wanted one of them")
        answers: Iterator[tuple[str, list[float] | None, str]]
        if workers:
            from bomemeta.serve.batch import predictions

            names, count, answers = stack.enter_context(
                predictions(clf, paths, workers, address=address, trust=trust, say=_say)
            )
        else:
            if address is not None:
                raise ConfigError("--address: wanted together with --workers N")
            names, files = _here(clf, paths, trust)
            answers, count = _answers(*files), len(files[1])
        if as_csv:
            typer.echo(_csv_line(["path", "class", *names]), nl=False)
        unread = 0
        bar = stack.enter_context(
            typer.progressbar(length=count, file=_stderr(), hidden=count < PART)
        )
        for path, row, reason in answers:
            if row is None:
                typer.echo(reason, err=True)
                unread += 1
            else:
                _show(path, names, row, as_json, as_csv)
            bar.update(1)
        if unread:
            raise typer.Exit(1)


def _here(clf: Path, paths: list[str], trust: bool) -> tuple[list[str], tuple[Any, list[Path]]]:
    """The classes' names, and the classifier with the images' files."""
    from bomemeta.errors import ConfigError
    from bomemeta.predict.classifier import few_shot_classifier
    from bomemeta.predict.inputs import labelled_files
    from bomemeta.storage import is_uri

    classifier = few_shot_classifier(clf, trust=trust)
    names = [str(name) for name in classifier.classes_.tolist()]
    files: list[Path] = []
    for path in paths:
        if is_uri(path):
            raise ConfigError(f"{path}: a URI is read by Ray Data: give --workers N too")
        folder = Path(path).is_dir()
        files += [file for file, _ in labelled_files(path)] if folder else [Path(path)]
    return names, (classifier, files)


def _answers(classifier: Any, files: list[Path]) -> Iterator[tuple[str, list[float] | None, str]]:
    """Of each image its path, probabilities, and else why there are none."""
    from bomemeta.errors import DataError

    for first in range(0, len(files), PART):
        part = files[first : first + PART]
        try:
            for file, row in zip(part, classifier.predict_proba(part), strict=True):
                yield str(file), row.tolist(), ""
        except DataError:  # one of them: ask each alone
            for file in part:
                try:
                    yield str(file), classifier.predict_proba([file])[0].tolist(), ""
                except DataError as error:
                    yield str(file), None, str(error)


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
        from bomemeta.predict import TrialsResult
        from bomemeta.predict.classifier import few_shot_classifier
        from bomemeta.predict.trials import evaluate_trials, trials_of

        classifier, given, outcomes = (
            few_shot_classifier(run_dir, trust=trust),
            trials_of(where),
            [],
        )
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
    """Write one graph, and check it against the original: of a fitted classifier images to logits, of
    a run support images, their labels (one-hot) and queries to logits.
    """
    with reported():
        from bomemeta.predict.classifier import few_shot_classifier

        classifier = few_shot_classifier(clf, trust=trust)
        written = classifier.export(file)
        given = "support [s, C, H, W], labels [s, ways] one-hot, query [n, C, H, W]"
        given = "images [n, C, H, W]" if classifier.is_fitted else given
        typer.echo(f"{written}: {given} -> logits [n, classes], features [n, d]")


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _show(file: str, names: list[str], row: list[float], as_json: bool, as_csv: bool) -> None:
    best = max(range(len(row)), key=row.__getitem__)
    if as_json:
        record = {
            "path": file,
            "class": names[best],
            "probabilities": dict(zip(names, row, strict=True)),
        }
        typer.echo(json.dumps(record))
    elif as_csv:
        typer.echo(_csv_line([file, names[best], *row]), nl=False)
    else:
        typer.echo(f"{file}\t{names[best]}\t{row[best]:.4f}")


def _csv_line(cells: list[Any]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue()


def _stderr() -> Any:
    return typer.get_text_stream("stderr")
