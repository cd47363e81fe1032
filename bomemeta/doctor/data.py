"""Whether there is enough data for what the config asks, class by class, and whose images make the
BatchNorm statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bomemeta.core.problem import Problem
from bomemeta.data.episodes import EpisodeSpec, Split
from bomemeta.doctor.findings import Finding
from bomemeta.errors import DataError
from bomemeta.problems.few_shot import FewShot

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# Beyond this a data set is taken to have no limit.
MOST = 1 << 20
# Fewer samples of a class than this in a part, on average, say little of the class.
FEW = 5


def data(problem: Problem) -> list[Finding]:
    """What there is against what is asked for. The problem has been built, so nothing is missing
    altogether.
    """
    source = problem.data
    if source is None:
        return [Finding("OK", "data", "the problem reads none")]
    if hasattr(source, "episode") and all(
        hasattr(problem, name) for name in ("ways", "shots", "queries", "test_queries")
    ):
        return [_episodes(problem, split) for split in SPLITS]
    parts = {
        part: labels for part in ("train", "test") if (labels := _labels(source, part)) is not None
    }
    if not parts:
        return [
            Finding(
                "NOTE",
                "data",
                f"{type(source).__name__} does not say what its classes are, so they were not counted",
            )
        ]
    return [_labelled(part, labels) for part, labels in parts.items()] + _shares(
        problem, parts["train"]
    )


def shortages(problem: Problem, source: Any) -> list[Finding]:
    """Each split of a few-shot data set that is too small, where a problem could not be built for
    that reason.
    """
    wanted = ("ways", "shots", "queries", "test_queries")
    if not hasattr(source, "episode") or not all(hasattr(problem, name) for name in wanted):
        return []
    found = []
    for split in SPLITS:
        try:
            source.check(split, _spec(problem, split))
        except DataError as error:
            found.append(Finding("PROBLEM", "data", str(error)))
    return found


def batch_norm(problem: Problem) -> list[Finding]:
    """Which statistics normalise what, in training and in testing."""
    found = []
    for module in (
        module
        for value in vars(problem).values()
        if isinstance(value, nn.Module)
        for module in value.modules()
    ):
        if (
            isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.track_running_stats
            and module.training
        ):
            text = f"{type(module).__name__} keeps running averages, which are no part of x: workers differ, checkpoints have none"
            do = "Use bomemeta.nets.batch_norm.TaskBatchNorm, or track_running_stats=False"
            return [Finding("PROBLEM", "batch norm", text, do)]
    policy = getattr(problem, "batch_norm", None)
    if policy == "transductive":
        whose = (
            "queries alone"
            if getattr(problem, "form", "") == "network"
            else "support and queries together"
        )
        text = (
            f"transductive, in training and in testing: the statistics of {whose} normalise the queries, so they see each other. "
            "Published values may be of either kind; result.json has both (test_accuracy, test_accuracy_inductive)"
        )
        found.append(
            Finding(
                "NOTE",
                "batch norm",
                text,
                "problem.batch_norm=inductive takes the support set's alone",
            )
        )
    elif policy == "inductive":
        rows = getattr(problem, "ways", 0) * getattr(problem, "shots", 0)
        text = f"inductive, in training and in testing: the statistics of the {rows} support images alone; no running averages"
        found.append(Finding("OK", "batch norm", text))
    return found


def _spec(problem: Any, split: Split) -> EpisodeSpec:
    """The problem's own word, or that of a user's with keys of these names."""
    if isinstance(problem, FewShot):
        return problem.spec(split)
    return EpisodeSpec(
        problem.ways, problem.shots, problem.queries if split == "train" else problem.test_queries
    )


def _episodes(problem: Any, split: Split) -> Finding:
    """Found out by asking `check`, so for any data set."""
    spec, check = _spec(problem, split), problem.data.check

    def allows(wanted: EpisodeSpec) -> bool:
        try:
            check(split, wanted)
        except DataError:
            return False
        return True

    ways = _largest(lambda n: allows(EpisodeSpec(n, 1, 1)), spec.ways)
    shots = _largest(lambda n: allows(EpisodeSpec(spec.ways, n, 1)), spec.shots)
    queries = _largest(lambda n: allows(spec._replace(queries=n)), spec.queries)
    if queries < MOST:
        images = f"{spec.shots + queries} images in the smallest class, {spec.shots + spec.queries} asked for (shots + queries)"
    elif shots < MOST:
        images = f"{shots + 1} images in the smallest class, {spec.shots} of them for the support; queries repeat the rest, drawn anew"
    else:
        images = "no limit on images"
    classes = f"{ways:,} classes, {spec.ways} asked for" if ways < MOST else "no limit on classes"
    return Finding("OK", "data", f"{split}: {classes}; {images}")


def _largest(allowed: Callable[[int], bool], known: int) -> int:
    """The largest number that is allowed, where all below it are; `MOST` where there seems to be
    none.
    """
    high = max(known, 1)
    while high < MOST and allowed(high * 2):
        high *= 2
    if high >= MOST:
        return MOST
    low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low


def _labels(source: Any, part: str) -> Tensor | None:
    if hasattr(source, "examples"):
        labels: Tensor = source.examples(part).labels
        return labels
    if hasattr(source, "documents"):
        of_documents: Tensor = source.documents(part).label
        return of_documents
    return None


def _labelled(part: str, labels: Tensor) -> Finding:
    counts = torch.bincount(labels)
    text = f"{part}: {len(labels):,} samples of {len(counts)} classes, {int(counts.min()):,} to {int(counts.max()):,} of each"
    empty = [str(c) for c in (counts == 0).nonzero()[:, 0].tolist()]
    if empty:
        return Finding(
            "NOTE",
            "data",
            f"{text}; none of class {', '.join(empty[:10])}",
            "Count classes from 0 without gaps",
        )
    return Finding("OK", "data", text)


def _shares(problem: Any, labels: Tensor) -> list[Finding]:
    """Parts that the problem cuts out of the training data and that leave too little of each class."""
    share = torch.bincount(labels).double() / len(labels)
    share = share[share > 0]
    found = []
    for key in ("train", "validation", "samples_per_task", "memory_per_task", "semantic_per_task"):
        count = getattr(problem, key, None)
        if not isinstance(count, int) or count == 0:
            continue
        # A task of a split stream has a part of the classes.
        classes = getattr(problem, "classes_per_task", None) or len(share)
        if getattr(problem, "stream", "") == "split" and not getattr(
            problem, "classes_per_task", None
        ):
            classes = max(len(share) // getattr(problem, "tasks", 1), 1)
        each = count * float(share.min()) * len(share) / classes
        remembered = key in ("memory_per_task", "semantic_per_task")
        wanted = 1 if remembered else FEW
        if (count < classes) if remembered else (each < wanted):
            text = f"problem.{key} = {count}: {each:.2g} samples of the rarest class, on average"
            found.append(
                Finding(
                    "NOTE",
                    "data",
                    text,
                    f"{round(wanted * count / each + 0.5)} would be {wanted} of it",
                )
            )
    return found
