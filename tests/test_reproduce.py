"""Experiments: every one, cut down, writes what it promises; what is done is not done again;
nothing of another experiment is touched.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy  # noqa: F401 (registers toy_labelled)
from matplotlib.figure import Figure
from toy import one_thread
from typer.testing import CliRunner

from bomemeta.cli import app
from bomemeta.config import load_config
from bomemeta.data import archives
from bomemeta.data.newsgroups import FILE
from bomemeta.errors import ConfigError
from bomemeta.reproduce import (
    EXPERIMENTS,
    bamm_toy,
    bome_cleaning,
    bome_l2,
    bome_toys,
    lancbio_cleaning,
    lancbio_synthetic,
    reproduce,
    runs,
    tables,
)
from bomemeta.reproduce.experiment import Budget, PaperRun, merged
from bomemeta.reproduce.runner import execute
from bomemeta.reproduce.tables import table_lines

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
PNG = b"\x89PNG"
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def newsgroups(folder: Path) -> str:
    """A folder with an archive of 40 + 24 made-up posts of 12 words in 4 classes."""
    rng = np.random.default_rng(2)
    arrays: dict[str, np.ndarray] = {
        "label_name": np.array([f"group.{c}" for c in range(4)]),
        "vocabulary_utf8": np.frombuffer(
            "\n".join(f"word{j}" for j in range(12)).encode(), np.uint8
        ),
    }
    for part, rows in (("train", 40), ("test", 24)):
        label = np.sort(np.arange(rows) % 4)
        dense = rng.poisson(0.3 + 2 * (np.arange(12) % 4 == label[:, None]))
        row, column = dense.nonzero()
        arrays[f"{part}_indptr"] = np.cumsum([0, *np.bincount(row, minlength=rows)]).astype(
            np.int32
        )
        arrays[f"{part}_indices"] = column.astype(np.int32)
        arrays[f"{part}_counts"] = dense[row, column].astype(np.uint16)
        arrays[f"y_{part}"] = label.astype(np.uint8)
    archives.write(folder / FILE, arrays, compress=True)
    return str(folder)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[[PaperRun], PaperRun]:
    """Cuts a run down to a few steps on data that is made up here."""
    root = newsgroups(tmp_path)

    def change(run: PaperRun) -> PaperRun:
        problem = run.config["problem"]["name"]
        changes: dict[str, Any] = {"steps": STEPS}
        if problem == "hyper_cleaning":
            changes |= {
                "data": {"dataset": "toy_labelled"},
                "problem": {"train": 40, "validation": 20},
            }
            changes["problem"]["selection"] = min(run.config["problem"]["selection"], 20)
        elif problem == "regularisation":
            changes |= {
                "data": {"dataset": "twenty_newsgroups", "root": root},
                "evaluation": {"solve_steps": 3},
            }
        elif "dim_upper" in run.config["problem"]:
            changes["problem"] = {"dim_upper": 3}
        return dataclasses.replace(run, config=merged(run.config, **changes), points=2)

    return change


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take half a second each."""
    monkeypatch.setattr(tables, "_figure", lambda experiment, records: PNG)


def read(folder: Path) -> Any:
    return json.loads((folder / "table.json").read_text())


def markdown_rows(text: str) -> list[list[str]]:
    """The cells of all tables, without headings."""
    lines = [
        [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line[:1] == "|"
    ]
    rules = [i for i, cells in enumerate(lines) if set(cells) == {"---"}]
    return [cells for i, cells in enumerate(lines) if i not in rules and i + 1 not in rules]


def agree(cell: str, value: Any, column: str) -> bool:
    """Whether the text is the number, rounded: to its own digits, by at most half of the last one."""
    if value is None or isinstance(value, str):
        return cell == (value if value is not None else "-")
    mantissa, _, exponent = cell.partition("e")
    unit = 10.0 ** (-len(mantissa.partition(".")[2]) + int(exponent or 0))
    return abs(float(cell) - value * (100 if column.endswith("%") else 1)) <= 0.5 * unit * (
        1 + 1e-9
    )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_writes_table_and_figure_that_agree(
    name: str, tiny: Callable[[PaperRun], PaperRun], tmp_path: Path
) -> None:
    reported: list[str] = []
    folder = reproduce(name, out=tmp_path / "out", say=reported.append, change=tiny)
    runs = EXPERIMENTS[name]("short", 0).runs
    assert len(reported) == 1 + len(runs)
    assert reported[-1].endswith("all done")
    assert (folder / "figure.png").read_bytes().startswith(PNG)
    written = read(folder)
    assert (written["experiment"], written["length"], written["seed"], written["runs_missing"]) == (
        name,
        "short",
        0,
        [],
    )
    assert written["environments"][0]["versions"]["torch"]
    rows = [row for table in written["tables"] for row in table["rows"]]
    assert len(rows) >= len(runs)
    shown = markdown_rows((folder / "table.md").read_text())
    assert len(shown) == len(rows)
    for cells, row in zip(shown, rows, strict=True):
        assert all(
            agree(cell, value, column)
            for cell, (column, value) in zip(cells, row.items(), strict=True)
        ), (cells, row)
    for run in runs:
        record = json.loads((folder / "runs" / f"{run.name}.json").read_text())
        costs = [(point["step"], point["gradients"]) for point in record["curve"]]
        assert costs == sorted(costs)
        assert record["diverged"] is not None or 0 < costs[-1][0] <= STEPS


def test_numbers_of_the_table_are_those_of_a_plain_run(
    tiny: Callable[[PaperRun], PaperRun], tmp_path: Path
) -> None:
    """A second witness: `bomemeta.train` of the same config."""
    import bomemeta

    (run,) = (
        tiny(run)
        for run in EXPERIMENTS["hyper_cleaning_mnist"]("short", 3).runs
        if run.name == "soba"
    )
    run = dataclasses.replace(run, budget=None)
    result = bomemeta.train(run.config, [f"output_dir={tmp_path / 'run'}", "log.tensorboard=false"])
    last = execute(run).last
    assert {
        name: last[name] for name in ("test_accuracy", "f1", "test_loss", "selection_accuracy")
    } == {
        name: result.metrics[name]
        for name in ("test_accuracy", "f1", "test_loss", "selection_accuracy")
    }
    assert (
        last["gradients"]
        == result.metrics["gradient_evaluations"] + 2 * result.metrics["hessian_products"]
    )


def one_run(name: str, **changes: Any) -> PaperRun:
    config = merged(bome_toys.DEGENERATE, steps=12, **changes)
    return PaperRun(name=name, label=name, config=config, points=3, variables=True)


def test_a_run_ends_with_the_step_that_spends_its_budget() -> None:
    # BOME with T = 1 takes 4 gradients a step: 10 are spent by the third.
    record = execute(dataclasses.replace(one_run("degenerate"), budget=Budget("gradients", 10)))
    assert [point["step"] for point in record.curve] == [0, 1, 2, 3]
    assert record.at("gradients", 9)["step"] == 2
    assert record.curve[0]["variables"] == {"upper": {"x": [0.0]}, "lower": {}}


def test_a_run_that_diverges_has_a_record() -> None:
    solver = {"name": "itd", "inner_steps": 5, "inner_lr": 10.0, "upper_lr": 1e200}
    record = execute(one_run("degenerate", solver=solver))
    assert record.diverged is not None
    assert "not finite" in record.diverged
    assert record.last["step"] < 12
    json.dumps(dataclasses.asdict(record), allow_nan=False)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_whose_runs_are_all_missing_can_be_written_up(name: str) -> None:
    experiment = EXPERIMENTS[name]("full", 0)
    assert all(
        len(row) == len(table.columns) for table in experiment.tables({}) for row in table.rows
    )
    experiment.draw(Figure(), {})


# What is done is not done again


def counted(monkeypatch: pytest.MonkeyPatch, stop_before: int | None = None) -> list[str]:
    """The names of the runs that start from here on; Ctrl-C comes before the run of that number."""
    started: list[str] = []

    def run(each: PaperRun) -> Any:
        if len(started) == stop_before:
            raise KeyboardInterrupt
        started.append(each.name)
        return execute(each)

    monkeypatch.setattr(runs, "execute", run)
    return started


def names_of(name: str) -> list[str]:
    return [run.name for run in EXPERIMENTS[name]("short", 0).runs]


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_experiment_keeps_its_runs_and_resumes(
    tiny: Callable[[PaperRun], PaperRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[str] = []
    counted(monkeypatch, stop_before=2)
    with pytest.raises(KeyboardInterrupt):
        reproduce("bome_toys", out=tmp_path / "out", say=reported.append, change=tiny)
    assert reported[-1] == "2 of 5 runs are done and kept; the same command resumes from there"
    assert read(tmp_path / "out")["runs_missing"] == names_of("bome_toys")[2:]
    before = [
        (tmp_path / "out" / "runs" / f"{name}.json").read_text()
        for name in names_of("bome_toys")[:2]
    ]
    started = counted(monkeypatch)
    reproduce("bome_toys", out=tmp_path / "out", change=tiny)
    assert started == names_of("bome_toys")[2:]
    assert [
        (tmp_path / "out" / "runs" / f"{name}.json").read_text()
        for name in names_of("bome_toys")[:2]
    ] == before
    assert [row["problem"].partition(",")[0] for row in read(tmp_path / "out")["tables"][0]["rows"]] == [
        "coreset", "coreset", "coreset", "minimax", "degenerate",
    ]  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_other_settings_or_a_damaged_file_is_run_again(
    tiny: Callable[[PaperRun], PaperRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reproduce("bome_toys", out=tmp_path / "out", change=tiny)
    (tmp_path / "out" / "runs" / "coreset_2.json").write_text("{")

    def other(run: PaperRun) -> PaperRun:
        run = tiny(run)
        return (
            dataclasses.replace(run, config=merged(run.config, steps=3))
            if run.name == "minimax"
            else run
        )

    started = counted(monkeypatch)
    reproduce("bome_toys", out=tmp_path / "out", change=other)
    assert started == ["coreset_2", "minimax"]
    assert [row["steps"] for row in read(tmp_path / "out")["tables"][0]["rows"]] == [4, 4, 4, 3, 4]


@pytest.mark.usefixtures("undrawn")
def test_nothing_of_another_experiment_is_written_over(
    tiny: Callable[[PaperRun], PaperRun], tmp_path: Path
) -> None:
    reproduce("bome_toys", out=tmp_path / "out", change=tiny)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for arguments in (
        {"name": "lancbio_synthetic"},
        {"name": "bome_toys", "seed": 1},
        {"name": "bome_toys", "full": True},
    ):
        given: Mapping[str, Any] = arguments
        with pytest.raises(
            ConfigError,
            match="holds another experiment, experiment bome_toys, length short, seed 0; this one is",
        ):
            reproduce(out=tmp_path / "out", change=tiny, **given)
    assert {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    } == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an experiment's; nothing is written over"):
        reproduce("bome_toys", out=tmp_path / "mine", change=tiny)
    with pytest.raises(ConfigError, match="is a file"):
        reproduce("bome_toys", out=tmp_path / "mine" / "notes.txt", change=tiny)


@pytest.mark.usefixtures("undrawn")
def test_default_folder_follows_length_and_seed(
    tiny: Callable[[PaperRun], PaperRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        runs.EXPERIMENTS, "bome_toys", lambda length, seed: _small(bome_toys.make(length, seed))
    )
    assert reproduce("bome_toys", change=tiny) == tmp_path / "reproduced" / "bome_toys"
    assert (
        reproduce("bome_toys", full=True, seed=2, change=tiny)
        == tmp_path / "reproduced" / "bome_toys-full-seed2"
    )


def _small(experiment: Any) -> Any:
    return dataclasses.replace(experiment, runs=experiment.runs[-1:])


# Words


def test_an_unknown_name_shows_them_all() -> None:
    result = CliRunner().invoke(app, ["reproduce", "bome_toy"])
    assert result.exit_code == 2
    assert (
        "bome_toy is not an experiment. Did you mean bome_toys? There are: "
        + ", ".join(EXPERIMENTS)
        in result.stderr
    )


@pytest.mark.usefixtures("undrawn")
def test_the_command_prints_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(length: Any, seed: int) -> Any:
        experiment = bome_toys.make(length, seed)
        return dataclasses.replace(experiment, runs=[one_run("degenerate", seed=seed)])

    monkeypatch.setitem(runs.EXPERIMENTS, "bome_toys", small)
    result = CliRunner().invoke(
        app, ["reproduce", "bome_toys", "--out", str(tmp_path / "out"), "--seed", "5"]
    )
    assert result.exit_code == 0
    assert (
        result.stdout
        == (tmp_path / "out" / "table.md").read_text() + f"written: {tmp_path / 'out'}\n"
    )
    assert "short version, seed 5" in result.stdout
    assert result.stderr.splitlines()[0].startswith("bome_toys: 1 runs, 0 of them done before")


def test_bars_within_cells_are_escaped() -> None:
    (table,) = bamm_toy.make("short", 0).tables({})
    changed = dataclasses.replace(table, rows=[[1, "|x|", None, 0.5, None, 2.0]])
    assert table_lines(changed)[-1] == r"| 1 | \|x\| | - | 5.00e-01 | - | 2.0 |"


def test_every_experiment_is_in_the_documentation() -> None:
    text = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    assert [name for name in EXPERIMENTS if f"| `{name}` |" not in text] == []


# The base configs are written out in the package, which works without the repository


BASES = {
    "analytic_minimax": bome_toys.MINIMAX,
    "analytic_degenerate": bome_toys.DEGENERATE,
    "analytic_bamm_convex": bamm_toy.BASE,
    "analytic_lancbio_synthetic": lancbio_synthetic.BASE,
    "l2_newsgroups_bome": bome_l2.BASE,
    "hyper_cleaning_mnist_bome": bome_cleaning.base("mnist"),
    "hyper_cleaning_fashion_bome": bome_cleaning.base("fashion_mnist"),
    "hyper_cleaning_mnist_lancbio": lancbio_cleaning.base("mnist"),
    "hyper_cleaning_fashion_lancbio": lancbio_cleaning.base("fashion_mnist"),
}


@pytest.mark.parametrize("name", BASES)
def test_base_config_is_the_shipped_one(name: str) -> None:
    assert load_config(BASES[name]).to_dict() == load_config(CONFIGS / f"{name}.yaml").to_dict()


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("length", ["short", "full"])
def test_every_run_has_a_config_that_can_be_read_and_a_name_of_its_own(
    name: str, length: Any
) -> None:
    experiment = EXPERIMENTS[name](length, 7)
    assert experiment.name == name
    assert len({run.name for run in experiment.runs}) == len(experiment.runs)
    assert all(load_config(run.config).seed == 7 for run in experiment.runs)
