"""What problem `few_shot` refuses at the start: settings, data and networks that do not fit each
other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bomemeta.errors import ConfigError
from bomemeta.nets.sources import check_source
from bomemeta.problems.few_shot_heads import SOLVED

if TYPE_CHECKING:
    from bomemeta.problems.few_shot import FewShot

HEAD_ALONE = {"neck": "none", "micro_batch": None, "head": "prototype", "auxiliary_weight": 0.0}


def check_fields(problem: FewShot) -> None:
    """Raises ConfigError where settings contradict each other."""
    check_source(problem.backbone)
    if problem.head in SOLVED and problem.head != "protonet" and not problem.regularisation > 0:
        raise ConfigError(f"regularisation: got 0; head {problem.head} needs a number > 0")
    if problem.form != "network":
        return
    for field, plain in HEAD_ALONE.items():
        if getattr(problem, field) != plain:
            raise ConfigError(f"{field}: belongs to form head; form is network")
    if problem.test_ways not in (None, problem.ways):
        raise ConfigError(
            f"test_ways: got {problem.test_ways} and ways {problem.ways}; the network of form network has one output "
            "per way: use form head"
        )
    if problem.trainable == "none":
        raise ConfigError("trainable: none leaves form network no y; use form head")


def check_source_fits(problem: FewShot) -> None:
    """Raises ConfigError where the data set has no episodes, or images too small for the backbone."""
    if not hasattr(problem.data, "episode"):
        raise ConfigError(
            f"data.dataset: problem few_shot draws episodes, which {type(problem.data).__name__} does not have; use glyphs, omniglot, "
            "image_folder or one of learn2learn's"
        )
    _, height, width = problem.data.image_shape
    if problem.backbone == "conv4" and min(height, width) < 16:
        raise ConfigError(
            f"problem.backbone: conv4 halves its input four times and got images of {height}x{width}; it needs 16x16 or more"
        )


def check_network(problem: FewShot) -> None:
    """Raises ConfigError where the network, once built, does not fit `micro_batch` or `dropout`."""
    if problem.micro_batch is not None and problem.network.mixes:
        raise ConfigError(
            "problem.micro_batch: with BatchNorm statistics of the task an image's features depend on all "
            "images of the task; set problem.batch_norm=running, or take micro_batch out"
        )
    if problem.dropout != "key":
        return
    if problem.micro_batch is not None:
        raise ConfigError(
            "problem.dropout: key draws in every pass of the backbone, and problem.micro_batch passes twice; take one out"
        )
    if not problem.network.drops_out:
        raise ConfigError(
            "problem.dropout: key, but the backbone has no layer of torch.nn's dropouts; take it out"
        )
