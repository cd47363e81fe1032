"""The few-shot benchmarks of learn2learn (Arnold et al., 2020), through its own `get_tasksets`,
`Taskset` and task transforms.

Images are scaled to [0, 1] and not normalised: `get_tasksets` is called without data augmentation,
which gives mini-ImageNet as 0..255 (divided by 255 here) and the others as [0, 1]. Omniglot comes
with ink 1 on 0.

Three of the five are PICKLES that learn2learn loads itself (mini-ImageNet, FC100, tiered-ImageNet),
and a pickle can run any code when it is loaded. bomemeta's own archives never do; these need
`data.trust_pickles: true`, which says that you know where the files come from. CIFAR-FS (PNG files
in folders) and Omniglot (PNG files, checked by torchvision) need no such trust: learn2learn's
`*-bookkeeping*.pkl` index files are neither read nor written, the index is made in memory instead.

What differs from learn2learn, and why:

* it draws from global random states: they are seeded from the key around each draw, and put back;
* `get_tasksets("omniglot")` filters 1,100 / 100 / 423 classes but draws its tasks from all 1,623:
  test classes are trained on. Here its transforms are given the filtered sets. Its split is a
  shuffle by the global random state: seeded here, always the same;
* its `RandomClassRotation` turns all classes of an episode by the same angle. That is left as it
  is: `omniglot` turns by class;
* torchvision lists Omniglot's folders in the file system's order: they are sorted here, so that all
  machines draw the same.

All of a benchmark is held in memory by each process (mini-ImageNet about 5 GB as floats):
learn2learn's way.
"""

from __future__ import annotations

import contextlib
import functools
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch

from bomemeta.boundary import reason
from bomemeta.data.archives import data_folder
from bomemeta.data.class_images import check_size, episode_of
from bomemeta.data.episodes import Episode, EpisodeSpec, Split
from bomemeta.errors import DataError
from bomemeta.l2l import learn2learn as learn2learn
from bomemeta.registry import datasets

CLASS_SPLIT_KEY = (
    0,
)  # seeds learn2learn's shuffle of Omniglot's classes: any constant, but the same for ever


@dataclass(frozen=True, kw_only=True)
class LearnToLearnEpisodes:
    """`root`: the folder that learn2learn calls root; by default `BOMEMETA_DATA`. Subclasses say
    which benchmark.
    """

    root: str | None = None
    trust_pickles: bool = False

    benchmark: ClassVar[str]  # learn2learn's name
    files: ClassVar[
        tuple[str, ...]
    ]  # what must lie under root, or else learn2learn would try to download
    shape: ClassVar[tuple[int, int, int]]
    pickled: ClassVar[bool]
    largest_value: ClassVar[float] = 1.0  # of a white pixel as learn2learn gives it

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.shape

    def prepare(self) -> None:
        """Loads the benchmark. Raises DataError where files are missing, damaged, or pickles that
        are not trusted.
        """
        _load(self.benchmark, self._folder())

    def check(self, split: Split, spec: EpisodeSpec) -> None:
        """Raises DataError where the split has too few classes, or one of them too few images."""
        indices = _load(self.benchmark, self._folder())[split].labels_to_indices
        names = [str(label) for label in indices]
        check_size(
            self._name(),
            split,
            spec,
            names,
            np.array([len(of_class) for of_class in indices.values()], np.int64),
        )

    def episode(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> Episode:
        """The first `shots` images that learn2learn draws of a class are its support, the others
        its queries.
        """
        self.check(split, spec)
        tasks = _tasks(self.benchmark, self._folder(), split, spec.ways, spec.shots + spec.queries)
        with global_random_states(key):
            images, labels = tasks.sample()
        by_class = images[torch.argsort(labels, stable=True)].float() / self.largest_value
        ways = by_class.view(spec.ways, spec.shots + spec.queries, *self.shape)
        support, query = ways[:, : spec.shots], ways[:, spec.shots :]
        return episode_of(
            support.flatten(0, 1).contiguous(), query.flatten(0, 1).contiguous(), spec
        )

    @classmethod
    def _name(cls) -> str:
        return f"learn2learn/{cls.benchmark}"

    def _folder(self) -> Path:
        folder = data_folder(self._name(), self.root)
        if self.pickled and not self.trust_pickles:
            raise DataError(
                untrusted(self._name(), folder)
                + ". If you trust where they come from, set data.trust_pickles: true"
            )
        missing = [file for file in self.files if not (folder / file).exists()]
        if missing:
            raise DataError(
                f"{self._name()}: {folder} has no {', '.join(missing)}. Get it with `bomemeta data prepare {self._name()} "
                f"--root {folder}` on a machine with internet, or point data.root or BOMEMETA_DATA at a folder that has it"
            )
        return folder


@datasets.register("learn2learn/mini-imagenet")
@dataclass(frozen=True, kw_only=True)
class L2LMiniImagenet(LearnToLearnEpisodes):
    """100 ImageNet classes of 600 images (Vinyals et al. 2016; the split of Ravi and Larochelle
    2017: 64 / 16 / 20 classes).
    """

    benchmark = "mini-imagenet"
    files = tuple(f"mini-imagenet-cache-{mode}.pkl" for mode in ("train", "validation", "test"))
    shape = (3, 84, 84)
    pickled = True
    largest_value = 255.0


@datasets.register("learn2learn/tiered-imagenet")
@dataclass(frozen=True, kw_only=True)
class L2LTieredImagenet(LearnToLearnEpisodes):
    """608 ImageNet classes split by category (Ren et al. 2018): 351 / 97 / 160 classes. 12 GB."""

    benchmark = "tiered-imagenet"
    files = tuple(
        f"tiered-imagenet/{mode}_{part}.pkl"
        for mode in ("train", "val", "test")
        for part in ("images_png", "labels")
    )
    shape = (3, 84, 84)
    pickled = True


@datasets.register("learn2learn/fc100")
@dataclass(frozen=True, kw_only=True)
class L2LFC100(LearnToLearnEpisodes):
    """CIFAR-100 split by superclass (Oreshkin et al. 2018): 60 / 20 / 20 classes of 600 images."""

    benchmark = "fc100"
    files = tuple(f"FC100_{mode}.pickle" for mode in ("train", "val", "test"))
    shape = (3, 32, 32)
    pickled = True


@datasets.register("learn2learn/cifarfs")
@dataclass(frozen=True, kw_only=True)
class L2LCifarFS(LearnToLearnEpisodes):
    """CIFAR-100 split at random (Bertinetto et al. 2019): 64 / 16 / 20 classes of 600 images."""

    benchmark = "cifarfs"
    files = tuple(f"cifarfs/processed/{mode}" for mode in ("train", "val", "test"))
    shape = (3, 32, 32)
    pickled = False


@datasets.register("learn2learn/omniglot")
@dataclass(frozen=True, kw_only=True)
class L2LOmniglot(LearnToLearnEpisodes):
    """Omniglot with learn2learn's random split of 1,100 / 100 / 423 characters. The published split
    is `omniglot`'s.
    """

    benchmark = "omniglot"
    files = tuple(
        f"omniglot-py/images_{part}{kind}"
        for part in ("background", "evaluation")
        for kind in ("", ".zip")
    )
    shape = (1, 28, 28)
    pickled = False


def untrusted(name: str, folder: Path) -> str:
    """The sentence that says why a benchmark of pickles is refused."""
    return f"{name}: learn2learn keeps this benchmark as pickles (in {folder}), and loading a pickle can run any code in it"


@contextlib.contextmanager
def global_random_states(key: tuple[int, ...]) -> Iterator[None]:
    """Inside, Python's, NumPy's and torch's (CPU) global random states follow from `key`;
    afterwards they are what they were.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(key).generate_state(8)
    try:
        random.seed(int.from_bytes(seeds.astype("<u4").tobytes(), "little"))
        np.random.seed(seeds)
        # Not torch.manual_seed: that would reseed the accelerators too.
        torch.default_generator.manual_seed(int(seeds[0]) << 32 | int(seeds[1]))
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def load(benchmark: str, folder: Path) -> dict[Split, Any]:
    """learn2learn's MetaDataset of each split. Downloads what is absent and loads pickles: callers
    check both first.

    Raises DataError with learn2learn's own message where that fails.
    """
    l2l = learn2learn()
    try:
        # A file that learn2learn leaves open is not the caller's to hear about.
        with (
            _labels_as_index(l2l),
            _sorted_folders(),
            global_random_states(CLASS_SPLIT_KEY),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", ResourceWarning)
            tasksets = l2l.vision.benchmarks.get_tasksets(benchmark, root=str(folder))
    # Whatever a damaged file or a failed download makes learn2learn, torchvision, requests or
    # pickle raise.
    except Exception as error:
        raise DataError(
            f"learn2learn/{benchmark}: learn2learn cannot read or get its files in {folder}: {reason(error)}. "
            f"Delete what is damaged there and run `bomemeta data prepare learn2learn/{benchmark} --root {folder}` on a machine "
            f"with internet"
        ) from error
    return {
        "train": tasksets.train.dataset,
        "validation": tasksets.validation.dataset,
        "test": tasksets.test.dataset,
    }


_load = functools.cache(load)


@functools.lru_cache(maxsize=16)
def _tasks(benchmark: str, folder: Path, split: Split, ways: int, images_per_class: int) -> Any:
    """The benchmark's Taskset for one size of episode; `get_tasksets` itself would load all data
    anew for each size.
    """
    l2l = learn2learn()
    dataset = _load(benchmark, folder)[split]
    transforms = [
        l2l.data.transforms.NWays(dataset, ways),
        l2l.data.transforms.KShots(dataset, images_per_class),
        l2l.data.transforms.LoadData(dataset),
        l2l.data.transforms.RemapLabels(dataset),
        l2l.data.transforms.ConsecutiveLabels(dataset),
    ]
    if benchmark == "omniglot":
        transforms.append(
            l2l.vision.transforms.RandomClassRotation(dataset, [0.0, 90.0, 180.0, 270.0])
        )
    return l2l.data.Taskset(dataset, transforms)


@contextlib.contextmanager
def _labels_as_index(l2l: Any) -> Iterator[None]:
    """Inside, a MetaDataset's index comes from the labels in memory: no pickle on disk, no race for
    it, no pass over all images.
    """

    def index(self: Any, _path: str) -> None:
        self.create_bookkeeping(indices_to_labels=dict(enumerate(_labels(self.dataset))))

    with mock.patch.object(l2l.data.MetaDataset, "load_bookkeeping", index):
        yield


def _labels(dataset: Any) -> list[int]:
    """All labels of one of learn2learn's five data sets, in its order of images."""
    if type(dataset).__name__ == "FullOmniglot":
        background, evaluation = dataset.dataset.datasets
        offset = len(background._characters)
        of_evaluation = [label + offset for _, label in evaluation._flat_character_images]
        return [label for _, label in background._flat_character_images] + of_evaluation
    attribute = {
        "CIFARFS": "targets",
        "FC100": "labels",
        "TieredImagenet": "labels",
        "MiniImagenet": "y",
    }
    return [int(label) for label in getattr(dataset, attribute[type(dataset).__name__])]


@contextlib.contextmanager
def _sorted_folders() -> Iterator[None]:
    """Inside, torchvision's Omniglot lists folders and files by name."""
    import torchvision.datasets.omniglot as module

    def by_name(list_entries: Callable[..., list[str]]) -> Callable[..., list[str]]:
        return lambda *args, **kwargs: sorted(list_entries(*args, **kwargs))

    with (
        mock.patch.object(module, "list_dir", by_name(module.list_dir)),
        mock.patch.object(module, "list_files", by_name(module.list_files)),
    ):
        yield
