"""Episodes per second: bomemeta's sampler against learn2learn's `Taskset` and a torch `DataLoader`,
on the same images in memory.

    OMP_NUM_THREADS=1 python -m benchmarks.sampling --data-root DATA --json OUT.json

All three give 5-way episodes of 1 support and 5 query images a class of Omniglot's training
characters, as float tensors in [0, 1], in turn, round by round; CPU and wall time of one process,
no worker processes. bomemeta's and the DataLoader's cut support from queries (the other does not:
its users index the task's data).

    bomemeta     `FewShot.load` of 8 episodes at a time, every character with its four turns; each a function of its number alone
    learn2learn  `Taskset` with NWays, KShots, LoadData, RemapLabels and ConsecutiveLabels, as its examples have it; characters upright
    dataloader   `DataLoader` over single images with a batch sampler that draws classes and images; characters upright
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.few_shot_step import interleaved, spread
from bomemeta.data.omniglot import Omniglot
from bomemeta.environment import environment
from bomemeta.l2l import learn2learn
from bomemeta.problems.few_shot import FewShot

WAYS, SHOTS, QUERIES = 5, 1, 5
EPISODES = 8  # drawn in one turn of a round


class Images(Dataset[tuple[Tensor, int]]):
    """Single images with their class, as a user's data set gives them."""

    def __init__(self, data: Omniglot) -> None:
        rows = data._characters().upright["train"]
        numbers = np.concatenate(
            [start + np.arange(count) for start, count in zip(rows.start, rows.count, strict=True)]
        )
        self.images = data._characters().images[torch.from_numpy(numbers)]
        self.labels = np.repeat(np.arange(len(rows.count)), rows.count).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.images[row][None].float() / 255, self.labels[row]


class EpisodeRows:
    """A batch sampler: rows of one episode, class after class, support first."""

    def __init__(self, labels: Sequence[int]) -> None:
        self._rows = [np.flatnonzero(np.asarray(labels) == c) for c in range(max(labels) + 1)]
        self._rng = np.random.default_rng(0)

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            classes = self._rng.choice(len(self._rows), WAYS, replace=False)
            drawn = np.stack(
                [self._rng.choice(self._rows[c], SHOTS + QUERIES, replace=False) for c in classes]
            )
            yield [*drawn[:, :SHOTS].ravel().tolist(), *drawn[:, SHOTS:].ravel().tolist()]


def bomemeta_sampler(data: Omniglot) -> Callable[[], None]:
    problem = FewShot(ways=WAYS, shots=SHOTS, queries=QUERIES)
    problem.attach(seed=0, dtype=torch.float32, data=data)
    numbers = iter(range(0, 10**9, EPISODES))

    def draw() -> None:
        first = next(numbers)
        problem.load(range(first, first + EPISODES), 0, "train")

    return draw


def learn2learn_sampler(data: Omniglot) -> Callable[[], None]:
    l2l = learn2learn()
    images = l2l.data.MetaDataset(Images(data))
    transforms = [
        l2l.data.transforms.NWays(images, WAYS),
        l2l.data.transforms.KShots(images, SHOTS + QUERIES),
        l2l.data.transforms.LoadData(images),
        l2l.data.transforms.RemapLabels(images),
        l2l.data.transforms.ConsecutiveLabels(images),
    ]
    tasks = l2l.data.Taskset(images, transforms, num_tasks=-1)

    def draw() -> None:
        for _ in range(EPISODES):
            tasks.sample()

    return draw


def dataloader_sampler(data: Omniglot) -> Callable[[], None]:
    images = Images(data)
    batches = iter(DataLoader(images, batch_sampler=EpisodeRows(images.labels)))  # type: ignore[arg-type]

    def draw() -> None:
        for _ in range(EPISODES):
            drawn, _ = next(batches)
            drawn[: WAYS * SHOTS], drawn[WAYS * SHOTS :]

    return draw


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    data = Omniglot(root=options.data_root)
    data.prepare()
    samplers = {
        "bomemeta": bomemeta_sampler(data),
        "learn2learn": learn2learn_sampler(data),
        "dataloader": dataloader_sampler(data),
    }
    taken = interleaved(samplers, options.rounds, lambda number: None)
    result = {
        "episodes_per_second": {
            clock: {name: EPISODES / statistics.median(times) for name, times in by_name.items()}
            for clock, by_name in taken.items()
        },
        "spread": {
            clock: {name: spread(times) for name, times in by_name.items()}
            for clock, by_name in taken.items()
        },
        "images_per_episode": WAYS * (SHOTS + QUERIES),
        "rounds": options.rounds,
        "environment": environment(),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
