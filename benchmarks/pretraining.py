"""A config's backbone, trained from scratch to tell its training classes apart, before it is meta-trained.

    python -m benchmarks.pretraining CONFIG problem.weights=FILE.safetensors [KEY=VALUE...] --epochs 20

The network, the image folder with its split and the seed are the config's; FILE is where the weights go, with the running
statistics of their BatchNorms. `bomemeta train CONFIG problem.weights=FILE ...` goes on from there, with
`problem.batch_norm: running`. No image of a validation or test class is trained on.

Cross-entropy over the training classes of a linear layer on the features, of smoothed targets; SGD with Nesterov's momentum,
a step size that rises for an epoch and falls as a cosine; images mirrored, moved and enlarged at random. After every fifth
epoch and the last: the nearest class mean by cosine on 5-way episodes of the validation classes. FILE.state has what the
same command resumes from, after each epoch; another command is refused.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.centroids import right
from bomemeta.config import Config, load_config
from bomemeta.data.episodes import EpisodeSpec
from bomemeta.data.image_folder import ImageEpisodes
from bomemeta.nets.sources import build_module

BATCH, MOMENTUM, DECAY, SMOOTHING = 64, 0.9, 5e-4, 0.1  # as ResNets' trainings have them
WAYS, QUERIES, EPISODES = 5, 15, 200
AT_ONCE = 100  # images in a pass without gradients
LOOK = 5  # epochs between two looks at the validation classes


def moved(images: Tensor, generator: torch.Generator, zoom: tuple[float, float]) -> Tensor:
    """Each of `[n, C, H, W]` mirrored or not, a part of it of `zoom` times its side brought to full
    size; what lies outside the image is its reflection.
    """
    count = len(images)
    scale = zoom[0] + (zoom[1] - zoom[0]) * torch.rand(count, generator=generator)
    mirror = torch.randint(2, (count,), generator=generator) * 2 - 1
    room = (1 - scale).abs() + 0.1  # the middle of the part, from that of the image
    shift = (torch.rand(count, 2, generator=generator) * 2 - 1) * room[:, None]
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0], transform[:, 1, 1], transform[:, :, 2] = scale * mirror, scale, shift
    grid = functional.affine_grid(transform, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def coloured(images: Tensor, generator: torch.Generator, strength: float = 0.3) -> Tensor:
    """Brightness and contrast of each normalised image changed."""
    factor, offset = (
        ((torch.rand(len(images), generator=generator) * 2 - 1) * strength)[:, None, None, None]
        for _ in range(2)
    )
    return images * (1 + factor) + offset


def validated(module: nn.Module, data: ImageEpisodes, shots: int) -> float:
    """Accuracy of the nearest class mean by cosine on episodes of the validation classes."""
    spec = EpisodeSpec(WAYS, shots, QUERIES)
    draws = [data.rows("validation", spec, (0, 1, e)) for e in range(EPISODES)]
    rows = np.unique(np.concatenate([np.r_[d.support.ravel(), d.query.ravel()] for d in draws]))
    module.eval()
    with torch.no_grad():
        parts = [
            module(data.images(rows[at : at + AT_ONCE])) for at in range(0, len(rows), AT_ONCE)
        ]
    module.train()
    table = torch.cat(parts)
    support, query = (
        table[torch.from_numpy(np.searchsorted(rows, np.stack([d.ravel() for d in part])))]
        for part in zip(*((d.support, d.query) for d in draws), strict=True)
    )
    return float(right("cosine", support, query, WAYS, table.new_zeros(())).mean())


class Training:
    """A network, what is trained above it and how far it is."""

    def __init__(self, config: Config, options: argparse.Namespace) -> None:
        problem, self.data = config.problem, config.data
        self.generator = torch.Generator().manual_seed(config.seed)
        channels = self.data.image_shape[0]
        self.module = build_module(
            problem.backbone, channels, problem.width, self.generator, running=True
        )
        rows = self.data.table.splits["train"]
        self.rows = np.concatenate(
            [np.arange(a, a + n) for a, n in zip(rows.start, rows.count, strict=True)]
        )
        self.labels = torch.from_numpy(np.repeat(np.arange(len(rows.count)), rows.count))
        self.module.eval()
        with torch.no_grad():
            width = self.module(torch.zeros(2, *self.data.image_shape)).shape[1]
        self.linear = nn.Linear(width, len(rows.count))
        nn.init.normal_(self.linear.weight, std=0.01, generator=self.generator)
        nn.init.zeros_(self.linear.bias)
        parameters = [*self.module.parameters(), *self.linear.parameters()]
        self.optimizer = torch.optim.SGD(
            parameters, options.lr, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True
        )
        self.options, self.epoch, self.cpu_s = options, 0, 0.0
        own = {name: getattr(options, name) for name in ("epochs", "lr", "zoom")}
        self.asked = json.dumps(
            {"config": config.to_dict(), **own, "data": self.data.digest}, sort_keys=True
        )

    def run_epoch(self) -> float:
        """Once over the images of training; their mean loss."""
        began, total = time.process_time(), 0.0
        order = torch.randperm(len(self.rows), generator=self.generator)
        batches = [part for part in order.split(BATCH) if len(part) > 1]
        self.module.train()
        for number, part in enumerate(batches):
            at = self.epoch + number / len(batches)
            share = min(at, (1 + math.cos(math.pi * at / self.options.epochs)) / 2)
            self.optimizer.param_groups[0]["lr"] = self.options.lr * max(share, 1e-3)
            images = self.data.images(self.rows[part.numpy()])
            images = coloured(moved(images, self.generator, self.options.zoom), self.generator)
            logits = self.linear(self.module(images))
            loss = functional.cross_entropy(logits, self.labels[part], label_smoothing=SMOOTHING)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += float(loss.detach()) * len(part)
        self.epoch += 1
        self.cpu_s += time.process_time() - began
        return total / len(self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(),
            "linear": self.linear.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
            "cpu_s": self.cpu_s,
            "asked": self.asked,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("module", "linear", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.epoch, self.cpu_s = state["epoch"], state["cpu_s"]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--zoom", type=float, nargs=2, default=(0.6, 1.0), help="of the side")
    options = parser.parse_args(argv)
    config = load_config(options.config, options.overrides)
    if not isinstance(config.data, ImageEpisodes) or config.problem.weights is None:
        raise SystemExit("wanted a config of an image folder, and problem.weights=FILE.safetensors")
    torch.set_num_threads(config.threads or 1)
    file = Path(config.problem.weights).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = file.with_name(f"{file.name}.state")
    training = Training(config, options)
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        if state.get("asked") != training.asked:
            raise SystemExit(
                f"{kept} is of another config, of other options or of other images: take another file for problem.weights, or "
                "remove it"
            )
        training.load_state_dict(state)
    found: dict[str, Any] = {"epoch": training.epoch}
    while training.epoch < options.epochs:
        found = {"loss": training.run_epoch(), "epoch": training.epoch, "cpu_s": training.cpu_s}
        if training.epoch % LOOK == 0 or training.epoch == options.epochs:
            for shots in (1, 5):
                accuracy = validated(training.module, training.data, shots)
                found[f"validation_{shots}shot"] = accuracy
        print(json.dumps({k: round(v, 4) for k, v in found.items()}), flush=True)
        part = kept.with_name(f"{kept.name}.part")
        torch.save(training.state_dict(), part)
        part.replace(kept)
    weights = {name: tensor.contiguous() for name, tensor in training.module.state_dict().items()}
    save_file(weights, file)
    return found


if __name__ == "__main__":
    main()
