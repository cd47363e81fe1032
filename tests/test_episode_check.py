"""A data set's episodes are looked at before a run: each fault is named, with the split, what was
got and what was wanted; what can be put right is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import Toy

import bomemeta
from bomemeta.data.episode_check import check_episodes, checked
from bomemeta.data.episodes import Episode, EpisodeSpec, Split
from bomemeta.errors import DataError

SPEC = EpisodeSpec(3, 2, 4)
SPECS: dict[Split, EpisodeSpec] = {"train": SPEC, "validation": SPEC, "test": SPEC}


class Changed(Toy):
    """The toy data set with a fault in one split."""

    def __init__(self, change: Callable[[Episode], Any], split: str = "test") -> None:
        super().__init__()
        self.change, self.faulty = change, split
        self.prepare()

    def episode(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> Any:
        episode = super().episode(split, spec, key)
        return self.change(episode) if split == self.faulty else episode


def mixed(episode: Episode, seed: int = 0) -> Episode:
    """The rows of both parts in another order."""
    g = torch.Generator().manual_seed(seed)
    s, q = (torch.randperm(len(x), generator=g) for x in (episode.support, episode.query))
    return Episode(
        episode.support[s], episode.support_labels[s], episode.query[q], episode.query_labels[q]
    )


def with_nan(episode: Episode) -> Episode:
    images = episode.query.clone()
    images[5, 0, 3, 3] = float("nan")
    return episode._replace(query=images)


def raising(episode: Episode) -> Episode:
    raise IndexError("index 7 is out of bounds")


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError


def silent(episode: Episode) -> Episode:
    raise Mute


def from_global_generators(episode: Episode) -> Episode:
    return episode._replace(support=episode.support * (1 - 0.1 * float(np.random.rand())))


def relabelled(labels: Any) -> Callable[[Episode], Episode]:
    return lambda episode: episode._replace(support_labels=torch.tensor(labels))


FAULTS: dict[str, tuple[Callable[[Episode], Any], str]] = {
    "none": (lambda e: None, r"episode\(\) gave NoneType.* Wanted an Episode\(support"),
    "a list": (list, r"episode\(\) gave list.* Wanted an Episode"),
    "numpy": (
        lambda e: e._replace(support=e.support.numpy()),
        "the support images are ndarray. Wanted a torch tensor",
    ),
    "bytes": (
        lambda e: e._replace(query=(e.query * 255).to(torch.uint8)),
        "the query images are torch.uint8. Wanted float32 in 0..1: divide by 255",
    ),
    "channels last": (
        lambda e: e._replace(support=e.support.movedim(1, -1)),
        r"the support images are \[6, 16, 16, 1\]. Wanted \[6, 1, 16, 16\]",
    ),
    "flat": (
        lambda e: e._replace(query=e.query.flatten(1)),
        r"the query images are \[12, 256\]. Wanted \[12, 1, 16, 16\]",
    ),
    "short": (
        lambda e: e._replace(support=e.support[1:], support_labels=e.support_labels[1:]),
        r"the support images are \[5, 1, 16, 16\]. Wanted \[6, 1, 16, 16\]",
    ),
    "one-based": (
        lambda e: e._replace(query_labels=e.query_labels + 1),
        r"the query labels are 1 \(4 times\), 2 \(4 times\), 3 \(4 times\). Wanted each of 0..2 4 times",
    ),
    "uneven": (relabelled([0, 0, 0, 1, 2, 2]), r"the support labels are 0 \(3 times\).* Wanted each"),
    "class numbers": (relabelled([7, 7, 11, 11, 30, 30]), r"the support labels are 7 \(2 times\), 11 \(2 times"),
    "int32": (
        lambda e: e._replace(query_labels=e.query_labels.int()),
        "the query labels are torch.int32. Wanted a torch tensor, int64",
    ),
    "float labels": (
        lambda e: e._replace(support_labels=e.support_labels.float()),
        "the support labels are torch.float32",
    ),
    "one hot": (
        lambda e: e._replace(support_labels=torch.eye(3, dtype=torch.int64)[e.support_labels]),
        r"the support labels are \[6, 3\]. Wanted \[6\]",
    ),
    "nan": (
        with_nan,
        r"the query images have NaN or infinite numbers, in 1 of 12 images \(first in row 5\)",
    ),
    "0 to 255": (
        lambda e: e._replace(support=e.support * 255),
        "the support images have numbers from .* to 255. Wanted 0 to 1: scale them, or name .* value_range",
    ),
    "impure": (
        from_global_generators,
        r"two draws with the key \(0, 2, 0\) gave different support. Wanted the same bits",
    ),
    "raises": (
        raising,
        r"episode\(\) raised IndexError: index 7 is out of bounds. Wanted an episode of 3 ways, 2 shots and 4 queries",
    ),
    "raises without a text": (silent, r"episode\(\) raised Mute\. Wanted an episode"),
    "sparse": (
        lambda e: e._replace(query=e.query.to_sparse()),
        "the query images are sparse_coo, on cpu. Wanted a dense tensor on the CPU",
    ),
    "no memory": (
        lambda e: e._replace(query_labels=e.query_labels.to("meta")),
        "the query labels are strided, on meta. Wanted a dense tensor on the CPU",
    ),
    "8 bits": (
        lambda e: e._replace(support=e.support.to(torch.float8_e4m3fn)),
        "the support images are torch.float8_e4m3fn. Wanted float32 in 0..1",
    ),
    "queries are the support": (
        lambda e: e._replace(query=e.support.repeat_interleave(2, 0)),
        "12 of 12 query images are support images, bit for bit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_fault_is_named(fault, split):
    change, message = FAULTS[fault]
    if split == "train":
        message = message.replace("(0, 2, 0", "(0, 0, 0")
    with pytest.raises(DataError, match=rf"^Changed, split {split}, episode 0: {message}"):
        check_episodes(Changed(change, split), SPECS, 0)


def test_a_sound_data_set_passes_and_its_first_episodes_are_its_digest():
    sound = Changed(lambda episode: episode)
    first = check_episodes(sound, SPECS, 0)
    assert check_episodes(Changed(lambda episode: episode), SPECS, 0) == first
    other = check_episodes(Changed(lambda e: e._replace(query=e.query * 0.99)), SPECS, 0)
    assert {name for name in first if first[name] != other[name]} == {"first test episodes"}


def test_a_range_of_its_own_is_allowed():
    class Standardised(Changed):
        value_range = (-1.0, 1.0)

    check_episodes(Standardised(lambda e: e._replace(support=e.support * 2 - 1)), SPECS, 0)
    with pytest.raises(DataError, match=r"have numbers from -6 to 6. Wanted -1 to 1"):
        check_episodes(Standardised(lambda e: e._replace(support=e.support * 12 - 6)), SPECS, 0)


@pytest.mark.parametrize(
    "wrong", [None, (1, 0), (0.0,), "01", (float("nan"), 1), (0, float("inf"))]
)
def test_a_range_that_is_none_is_refused(wrong):
    source = Changed(lambda episode: episode)
    source.value_range = wrong
    with pytest.raises(DataError, match=r"^Changed.value_range is .*Wanted \(lowest, highest\)"):
        check_episodes(source, SPECS, 0)


@pytest.mark.parametrize("wrong", [None, (16, 16), (1.0, 16.0, 16.0), "abc", (1, -16, 16)])
def test_a_shape_that_is_none_is_refused(wrong):
    class Shaped(Changed):
        image_shape = wrong

    with pytest.raises(DataError, match=r"^Shaped.image_shape is .*Wanted \(channels, height"):
        check_episodes(Shaped(lambda episode: episode), SPECS, 0)


def test_images_of_other_floats_and_of_a_graph_are_taken():
    def graph(episode):
        support = episode.support.clone().requires_grad_()
        return episode._replace(support=support, query=episode.query.to(torch.bfloat16))

    check_episodes(Changed(graph), SPECS, 0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_in_another_order_are_sorted(seed):
    plain = Changed(lambda episode: episode).episode("test", SPEC, (0, 2, 0))
    found = checked(Changed(lambda e: mixed(e, seed)), "test", SPEC, (0, 2, 0))
    assert torch.equal(found.support_labels, plain.support_labels)
    assert torch.equal(found.query_labels, plain.query_labels)
    for label in range(SPEC.ways):  # the images of a class are those of the class
        for part in ("support", "query"):
            rows = getattr(plain, f"{part}_labels") == label
            mine, theirs = (
                {image.numpy().tobytes() for image in getattr(e, part)[rows]}
                for e in (found, plain)
            )
            assert mine == theirs


CONFIG: dict[str, Any] = {
    "imports": ["mixed_toy"],
    "problem": {"name": "few_shot", "ways": 3, "shots": 2, "queries": 3, "test_queries": 3, "width": 4},
    "solver": {"name": "bome", "inner_steps": 2, "inner_lr": 0.2, "lower_lr": 0.2, "adapt_steps": 1, "barrier_steps": 1},
    "steps": 2, "tasks_per_step": 2, "evaluation": {"episodes": 4}, "log": {"tensorboard": False},
}  # fmt: skip


def test_a_run_on_rows_in_any_order_is_the_run_on_sorted_ones(tmp_path):
    """Prototypes are then means of a class: unsorted, they were means of several, and an accuracy of
    82 % came to 33 %.
    """
    results = {}
    for name in ("sorted", "mixed"):
        config = CONFIG | {"data": {"dataset": "mixed_toy", "order": name}}
        results[name] = bomemeta.train(config, [f"output_dir={tmp_path / name}"])
    torch.testing.assert_close(results["mixed"].upper, results["sorted"].upper)
    assert results["mixed"].metrics["test_accuracy"] == pytest.approx(
        results["sorted"].metrics["test_accuracy"]
    )


@pytest.mark.parametrize("fault", ["one_based", "nan", "late_nan", "late_labels"])
def test_a_run_stops_at_the_data(fault, tmp_path):
    config = CONFIG | {"data": {"dataset": "mixed_toy", "fault": fault}}
    message = {
        "one_based": r"MixedToy, split train, episode 0: the support labels are 1 .* Wanted each of 0..2",
        "nan": r"MixedToy, split train, episode 0: the support images have NaN",
        "late_nan": r"step 1: the data of split train has NaN or infinite numbers: support .*task",
        "late_labels": r"MixedToy, split train, episode 3: the support labels are 1",
    }[fault]
    with pytest.raises(DataError, match=message):
        bomemeta.train(config, [f"output_dir={tmp_path / 'run'}"])
    if not fault.startswith("late"):
        assert not Path(tmp_path / "run").exists()
