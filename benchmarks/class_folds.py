"""Settings of what is learned above frozen features, compared on classes held out in turn.

    python -m benchmarks.class_folds [linear:momentum:0.01:20:20:5:100 ...] [--config caltech101_pretrained]

A setting is MAP:OPTIMISER:STEP:SCALE:WAYS:SHOTS:STEPS: a linear map or a scale of each feature (`neck`), Adam or momentum 0.9,
and its step size; the number that the cosine is multiplied with in the loss; the episodes of training. The classes that are not for
the test are cut into four folds. Each is held out once, the map is trained on the other three, and the nearest class
mean by cosine of what it makes is compared with that of the features as they are, on the same episodes. No test class is seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bomemeta.assembly import build_problem
from bomemeta.config import load_config
from bomemeta.data.image_folder import ImageEpisodes
from bomemeta.intervals import half_width
from bomemeta.nets.neck import apply_neck, initial_neck
from bomemeta.problems.few_shot import FewShot

FOLDS, EPISODES = 4, 300
WAYS, QUERIES, TRAIN_QUERIES = 5, 15, 10
SHOTS = (1, 5)
SPLIT_SEED = 7  # of the folds and of their episodes
DEFAULTS = (
    "linear:adam:0.0001:10:5:5:200",
    "linear:momentum:0.03:20:20:5:100",
    "linear:momentum:0.01:20:20:5:100",
    "linear:momentum:0.01:20:20:1:100",
)
Mapping = Callable[[Tensor], Tensor]


class Fold(NamedTuple):
    kept: list[Tensor]  # rows of each class that is trained on
    held: Tensor  # rows of the classes held out
    episodes: dict[int, tuple[Tensor, Tensor]]  # of SHOTS: places in `held` [n, 5, shots], [n, 75]


def folds_of(classes: Sequence[Tensor]) -> list[Fold]:
    """`classes`: rows of each class."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(classes), generator=generator).tolist()
    found = []
    for fold in range(FOLDS):
        held = [classes[c] for c in order[fold::FOLDS]]
        kept = [classes[c] for place, c in enumerate(order) if place % FOLDS != fold]
        starts = torch.tensor([0, *map(len, held)]).cumsum(0)
        episodes = {}
        for shots in SHOTS:
            support, query = [], []
            for _ in range(EPISODES):
                chosen = torch.randperm(len(held), generator=generator)[:WAYS]
                drawn = torch.stack(
                    [
                        starts[c]
                        + torch.randperm(len(held[c]), generator=generator)[: shots + QUERIES]
                        for c in chosen
                    ]
                )
                support.append(drawn[:, :shots])
                query.append(drawn[:, shots:].flatten())
            episodes[shots] = (torch.stack(support), torch.stack(query))
        found.append(Fold(kept, torch.cat(held), episodes))
    return found


def accuracies(table: Tensor, fold: Fold, mapping: Mapping) -> dict[int, Tensor]:
    """Of SHOTS: `[EPISODES]`, of the nearest class mean by cosine of the mapped features."""
    with torch.no_grad():
        mapped = functional.normalize(mapping(table[fold.held]), dim=-1)
        kernel = mapped @ mapped.T
    labels = torch.arange(WAYS).repeat_interleave(QUERIES)
    found = {}
    for shots, (support, query) in fold.episodes.items():
        near = kernel[query[:, :, None], support.flatten(1)[:, None]]
        near = near.unflatten(2, (WAYS, shots)).mean(3)
        lengths = kernel[support[..., None], support[:, :, None]].mean((2, 3)).sqrt()
        right = (near / lengths[:, None]).argmax(2) == labels
        found[shots] = right.double().mean(1)
    return found


def trained(table: Tensor, kept: Sequence[Tensor], setting: str) -> Mapping:
    kind, optimiser, *numbers = setting.split(":")
    rate, scale = map(float, numbers[:2])
    ways, shots, steps = map(int, numbers[2:])
    if kind not in ("linear", "scale") or optimiser not in ("adam", "momentum"):
        raise SystemExit(f"{setting}: wanted linear or scale, and adam or momentum")
    neck: Any = kind
    x = initial_neck(neck, table.shape[1], table.dtype)
    for tensor in x.values():
        tensor.requires_grad_()
    moved: torch.optim.Optimizer = (
        torch.optim.Adam(x.values(), lr=rate)
        if optimiser == "adam"
        else torch.optim.SGD(x.values(), lr=rate, momentum=0.9)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(moved, steps)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(ways).repeat_interleave(TRAIN_QUERIES)
    for _ in range(steps):
        chosen = torch.randperm(len(kept), generator=generator)[:ways]
        rows = torch.stack(
            [
                kept[c][torch.randperm(len(kept[c]), generator=generator)[: shots + TRAIN_QUERIES]]
                for c in chosen
            ]
        )
        z = functional.normalize(apply_neck(neck, x, table[rows]), dim=-1)
        means = functional.normalize(z[:, :shots].mean(1), dim=-1)
        logits = scale * z[:, shots:].flatten(0, 1) @ means.T
        moved.zero_grad()
        functional.cross_entropy(logits, labels).backward()
        moved.step()
        schedule.step()
    return lambda features: apply_neck(neck, x, features)


def line(setting: str, differences: dict[int, list[Tensor]]) -> str:
    cells = []
    for folds in differences.values():
        together = torch.cat(folds)
        width = half_width(float(together.var()), len(together)) or 0.0
        each = " ".join(f"{100 * float(fold.mean()):+.2f}" for fold in folds)
        cells.append(f"{100 * float(together.mean()):+.2f} ± {100 * width:.2f} | {each}")
    return f"| {setting} | {' | '.join(cells)} |"


def compared(table: Tensor, classes: Sequence[Tensor], settings: Sequence[str]) -> list[str]:
    """Lines of Markdown, one a setting and the centred cosine first."""
    folds = folds_of(classes)
    plain = [accuracies(table, fold, lambda features: features) for fold in folds]
    lines = [
        "| setting | 1-shot | each fold | 5-shot | each fold |",
        "|---|---|---|---|---|",
    ]
    for setting in ("centred cosine, nothing learned", *settings):
        differences: dict[int, list[Tensor]] = {shots: [] for shots in SHOTS}
        for fold, before in zip(folds, plain, strict=True):
            mapping = centred(table[torch.cat(fold.kept)])
            if setting in settings:
                mapping = trained(table, fold.kept, setting)
            for shots, right in accuracies(table, fold, mapping).items():
                differences[shots].append(right - before[shots])
        lines.append(line(setting, differences))
        print(lines[-1], flush=True)
    return lines


def centred(features: Tensor) -> Mapping:
    mean = functional.normalize(features, dim=-1).mean(0)
    return lambda others: functional.normalize(others, dim=-1) - mean


def main(argv: Sequence[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", default=list(DEFAULTS))
    parser.add_argument("--config", default="caltech101_pretrained")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    problem = build_problem(load_config(options.config, ["workers=0"]))
    if not isinstance(problem, FewShot) or problem._table is None:
        raise SystemExit("wanted a problem few_shot that encodes each image once")
    data = problem.data
    assert isinstance(data, ImageEpisodes)
    classes = []
    for split in ("train", "validation"):
        rows = data._classes(split, problem.spec(split))
        pairs = zip(rows.start, rows.count, strict=True)
        classes += [torch.arange(int(first), int(first + count)) for first, count in pairs]
    lines = compared(torch.tensor(problem._table[:]), classes, options.settings)
    print("\n".join(lines))
    return lines


if __name__ == "__main__":
    main()
