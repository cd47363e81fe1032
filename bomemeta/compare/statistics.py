"""Means with intervals, paired differences seed by seed, ranks, and a correction for many tests.

Intervals: Student's t, 95 %. Tests: the paired t test, two-sided, corrected by Holm's step-down
method (Holm, Scandinavian Journal of Statistics 1979). Ranks: 1 is best, ties share their mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bomemeta.compare.entries import Entry
from bomemeta.errors import ConfigError
from bomemeta.intervals import mean_and_half_width

# What a smaller number of is better; everything else that is compared is an accuracy or the like.
LESS = ("loss", "error", "residual", "forgetting", "nbt", "fm", "gap", "stationarity", "_s")
# What users compare first, where all entries have it.
USUAL = ("test_accuracy", "accuracy", "acc", "f1", "test_loss", "loss", "upper_error")


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, and the half-width of its 95 % interval (None below two seeds)."""

    value: float
    half_width: float | None
    seeds: int


@dataclass(frozen=True)
class Difference:
    """An entry minus the reference on the seeds that both have. `p`: Holm's, None below two seeds
    or where all differences are equal.
    """

    mean: Mean
    wins: int
    ties: int
    losses: int
    p: float | None


@dataclass(frozen=True)
class Row:
    """One entry under one metric. `rank`: the mean over the seeds that all entries have."""

    label: str
    mean: Mean
    rank: float | None
    difference: Difference | None  # None: of the reference itself, or without a common seed


@dataclass(frozen=True)
class Comparison:
    """All entries under all metrics, the reference, and what a reader has to know beside."""

    reference: str
    rows: dict[str, list[Row]]  # by metric
    notes: list[str]

    @staticmethod
    def less_is_better(metric: str) -> bool:
        """Whether a smaller value of this metric is the better one, by its name."""
        return any(metric.endswith(word) for word in LESS)


def compare(
    entries: Sequence[Entry], metrics: Sequence[str] = (), reference: str | None = None
) -> Comparison:
    """Compares every entry with the reference (default: the first), under the metrics given.

    Default metrics: those of USUAL that all entries have, else all that they have in common.
    Raises ConfigError where there are fewer than two entries, or a metric or the reference is
    unknown.
    """
    if len(entries) < 2:
        raise ConfigError(f"compare: got {len(entries)} entry; wanted at least two to compare")
    labels = [entry.label for entry in entries]
    reference = reference if reference is not None else labels[0]
    if reference not in labels:
        raise ConfigError(f"compare: reference {reference!r} is no entry; got {', '.join(labels)}")
    chosen = _metrics(entries, metrics)
    base = entries[labels.index(reference)]
    shared = sorted(set.intersection(*(set(entry.seeds) for entry in entries)))
    rows = {metric: _rows(entries, base, metric, shared) for metric in chosen}
    return Comparison(reference, _holm(rows), _notes(entries, shared))


def _metrics(entries: Sequence[Entry], wanted: Sequence[str]) -> list[str]:
    runs = [run for entry in entries for run in entry.seeds.values()]
    common = [name for name in runs[0] if all(name in run for run in runs)]
    for metric in wanted:
        if metric not in common:
            raise ConfigError(
                f"compare: metric {metric!r} is not in every run; all have {', '.join(common)}"
            )
    if wanted:
        return list(wanted)
    return [name for name in USUAL if name in common] or [
        name for name in common if "ci95" not in name
    ]


def _rows(entries: Sequence[Entry], base: Entry, metric: str, shared: Sequence[int]) -> list[Row]:
    sign = -1.0 if Comparison.less_is_better(metric) else 1.0
    ranks: dict[str, list[float]] = {entry.label: [] for entry in entries}
    for seed in shared:
        values = [sign * entry.seeds[seed][metric] for entry in entries]
        for entry, value in zip(entries, values, strict=True):
            better, equal = (
                sum(other > value for other in values),
                sum(other == value for other in values),
            )
            ranks[entry.label].append(better + (equal + 1) / 2)
    found = []
    for entry in entries:
        mean = _mean([run[metric] for run in entry.seeds.values()])
        rank = math.fsum(ranks[entry.label]) / len(shared) if shared else None
        difference = None if entry is base else _difference(entry, base, metric, sign)
        found.append(Row(entry.label, mean, rank, difference))
    return found


def _mean(values: Sequence[float]) -> Mean:
    return Mean(*mean_and_half_width(values), len(values))


def _difference(entry: Entry, base: Entry, metric: str, sign: float) -> Difference | None:
    seeds = sorted({*entry.seeds} & {*base.seeds})
    if not seeds:
        return None
    values = [entry.seeds[seed][metric] - base.seeds[seed][metric] for seed in seeds]
    wins = sum(sign * value > 0 for value in values)
    ties = sum(value == 0 for value in values)
    return Difference(_mean(values), wins, ties, len(values) - wins - ties, _paired_t(values))


def _paired_t(values: Sequence[float]) -> float | None:
    from scipy.special import stdtr

    n = len(values)
    mean = math.fsum(values) / n
    squares = math.fsum((value - mean) ** 2 for value in values)
    if n < 2 or not squares > 0:
        return None
    t = mean / math.sqrt(squares / (n - 1) / n)
    return float(2 * stdtr(n - 1, -abs(t)))


def _holm(rows: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The same rows with every p corrected for the number of tests in the whole table."""
    tests = [
        (row.difference.p, metric, i)
        for metric, each in rows.items()
        for i, row in enumerate(each)
        if row.difference is not None and row.difference.p is not None
    ]
    corrected = {metric: list(each) for metric, each in rows.items()}
    largest = 0.0
    for number, (p, metric, i) in enumerate(sorted(tests)):
        largest = max(largest, min(1.0, p * (len(tests) - number)))
        row = corrected[metric][i]
        assert row.difference is not None, "only differences are tested"
        corrected[metric][i] = replace(row, difference=replace(row.difference, p=largest))
    return corrected


def _notes(entries: Sequence[Entry], shared: Sequence[int]) -> list[str]:
    notes = []
    if not shared:
        notes.append("no seed is in all entries: there are no ranks over seeds")
    if any(len(entry.seeds) < 2 for entry in entries):
        alone = ", ".join(entry.label for entry in entries if len(entry.seeds) < 2)
        notes.append(f"one seed only, so no interval over seeds: {alone}")
    for key in ("evaluation", "data"):
        values = {_text(entry.config.get(key)) for entry in entries}
        if len(values) > 1:
            notes.append(f"`{key}:` is not the same in all entries: the test may be another")
    versions = {_text(dict(entry.versions)) for entry in entries}
    if len(versions) > 1:
        notes.append("the entries were made with different versions of packages")
    return notes


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)
