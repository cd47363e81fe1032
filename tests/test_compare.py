"""`bomemeta compare`: statistics against scipy's, what is read, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from bomemeta.api import train
from bomemeta.cli import app
from bomemeta.compare import Entry, compare, read_entries
from bomemeta.compare.tables import as_json, page
from bomemeta.errors import ConfigError

RNG = np.random.default_rng(0)
ACCURACIES = {name: 0.8 + 0.01 * RNG.standard_normal(6) for name in ("a", "b", "c")}
ENTRIES = [
    Entry(name, {seed: {"test_accuracy": float(v)} for seed, v in enumerate(values)}, {}, {})
    for name, values in ACCURACIES.items()
]


def test_means_differences_and_tests_are_scipys() -> None:
    rows = compare(ENTRIES).rows["test_accuracy"]
    raw = []
    for row, values in zip(rows, ACCURACIES.values(), strict=True):
        low, high = stats.t.interval(0.95, 5, values.mean(), stats.sem(values))
        assert row.mean.value == pytest.approx(values.mean())
        assert row.mean.half_width == pytest.approx((high - low) / 2)
        if row.label != "a":
            gaps = values - ACCURACIES["a"]
            assert row.difference is not None
            assert row.difference.mean.value == pytest.approx(gaps.mean())
            assert row.difference.wins == (gaps > 0).sum()
            raw.append(stats.ttest_rel(values, ACCURACIES["a"]).pvalue)
    found = [row.difference.p for row in rows if row.difference is not None]
    order = np.argsort(raw)
    holm = np.maximum.accumulate([min(1.0, raw[i] * (2 - n)) for n, i in enumerate(order)])
    assert [found[i] for i in order] == pytest.approx(list(holm))


def test_ranks_are_scipys_with_ties_and_less_is_better() -> None:
    losses = np.array([[1.0, 2.0, 2.0], [3.0, 1.0, 2.0]])  # [seed, entry]
    entries = [
        Entry(f"e{i}", {seed: {"test_loss": losses[seed, i]} for seed in range(2)}, {}, {})
        for i in range(3)
    ]
    rows = compare(entries).rows["test_loss"]
    ranks = np.mean([stats.rankdata(row) for row in losses], axis=0)
    assert [row.rank for row in rows] == pytest.approx(list(ranks))
    assert rows[1].difference is not None
    assert (rows[1].difference.wins, rows[1].difference.losses) == (1, 1)


def test_seeds_are_paired_by_their_number_and_not_by_their_order() -> None:
    a = Entry("a", {0: {"acc": 0.1}, 1: {"acc": 0.9}}, {}, {})
    b = Entry("b", {1: {"acc": 1.0}, 2: {"acc": 0.0}}, {}, {})
    difference = compare([a, b]).rows["acc"][1].difference
    assert difference is not None
    assert difference.mean.value == pytest.approx(0.1)
    assert difference.mean.seeds == 1
    assert difference.mean.half_width is None
    assert difference.p is None


def run(folder: Path, **keys: Any) -> str:
    config = {
        "problem": {"name": "analytic", "case": "quadratic", "tasks": 3},
        "solver": {"name": "bome", "inner_steps": 3, **keys.pop("solver", {})},
        "steps": 2,
        "output_dir": str(folder),
        "log": {"tensorboard": False},
    }
    train(config | keys)
    return str(folder)


def test_runs_in_folders_are_read_and_written_as_table_json_figure_and_page(tmp_path: Path) -> None:
    for seed in range(2):
        run(tmp_path / "one" / f"s{seed}", seed=seed)
    many = run(tmp_path / "many", seeds=2, solver={"upper_lr": 0.3})
    files = {name: tmp_path / f"out.{name}" for name in ("json", "markdown", "figure", "html")}
    files["figure"] = tmp_path / "out.svg"
    options = [text for name, file in files.items() for text in (f"--{name}", str(file))]
    arguments = ["compare", str(tmp_path / "one"), f"faster={many}", "--metric", "upper_error"]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    assert files["markdown"].read_text(encoding="utf-8") == result.output
    rows = json.loads(files["json"].read_text())["rows"]["upper_error"]
    assert [(row["label"], row["mean"]["seeds"]) for row in rows] == [("one", 2), ("faster", 2)]
    each = [
        json.loads((tmp_path / "one" / f"s{seed}" / "result.json").read_text())["metrics"]
        for seed in range(2)
    ]
    assert rows[0]["mean"]["value"] == pytest.approx(sum(m["upper_error"] for m in each) / 2)
    assert "less is better" in result.output
    assert files["figure"].read_bytes().lstrip().startswith(b"<?xml")
    html = files["html"].read_text(encoding="utf-8")
    assert html.count("<svg") == 1
    assert "http:" not in html
    assert "https:" not in html


def test_runs_that_are_no_seeds_of_one_config_are_refused_with_the_key(tmp_path: Path) -> None:
    run(tmp_path / "x" / "a", seed=0)
    run(tmp_path / "x" / "b", seed=1, solver={"inner_steps": 4})
    with pytest.raises(ConfigError, match=r"solver\.inner_steps \(3, 4\)"):
        read_entries([str(tmp_path / "x")])
    run(tmp_path / "y" / "a", seed=0)
    run(tmp_path / "y" / "b", seed=0)
    with pytest.raises(ConfigError, match="seed 0 twice"):
        read_entries([str(tmp_path / "y")])
    with pytest.raises(ConfigError, match="two entries are called a; give them names"):
        read_entries([str(tmp_path / "x" / "a"), str(tmp_path / "y" / "a")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a run's result.json"),
        ("[]", "is not a run's result.json"),
        ('{"metrics": {}}', "it has no config, seed"),
        (None, r"no result.json in .* The run there has not ended"),
    ],
)
def test_what_is_no_finished_run_is_named(
    tmp_path: Path, content: str | None, message: str
) -> None:
    (tmp_path / "config.yaml").write_text("")
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_entries([str(tmp_path)])


def test_wrong_questions_are_answered() -> None:
    with pytest.raises(ConfigError, match="at least two"):
        compare(ENTRIES[:1])
    with pytest.raises(ConfigError, match="metric 'f2' is not in every run; all have test_acc"):
        compare(ENTRIES, ["f2"])
    with pytest.raises(ConfigError, match="reference 'z' is no entry; got a, b, c"):
        compare(ENTRIES, reference="z")


def test_a_number_that_was_not_finite_stays_so() -> None:
    odd = Entry("odd", {0: {"acc": math.nan}, 1: {"acc": 0.5}}, {}, {})
    found = compare([odd, Entry("b", {0: {"acc": 0.1}, 1: {"acc": 0.2}}, {}, {})])
    assert math.isnan(found.rows["acc"][0].mean.value)
    assert "NaN" in as_json(found)
    assert "nan" in page(found)
