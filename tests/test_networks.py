"""Networks that were not written for us: from objects, functions and names, frozen, adapted and
pretrained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from toy import attached

import bomemeta
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.oracle import Term
from bomemeta.data import feature_cache
from bomemeta.data.image_folder import ImageFolder
from bomemeta.errors import ConfigError
from bomemeta.nets import adapters
from bomemeta.nets.backbone import Backbone
from bomemeta.nets.backbones import Conv4
from bomemeta.nets.sources import build_module, check_source, load_weights
from bomemeta.problems import few_shot_heads as heads
from bomemeta.problems.few_shot import FewShot

SMALL: dict[str, Any] = {"ways": 3, "queries": 2, "test_queries": 2}
SHAPE = (1, 28, 28)


def small_net() -> nn.Module:
    """As somebody writes it: BatchNorm, dropout, pooling, a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Conv2d(4, 6, 1),
        nn.BatchNorm2d(6),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 8),
    )


def trained_net() -> nn.Module:
    """With running statistics that are not those of a new layer."""
    torch.manual_seed(3)
    net = small_net().train()
    with torch.no_grad():
        net(torch.rand(8, *SHAPE))
    return net


def images(n: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_a_module_s_weights_are_kept_and_it_is_not_touched() -> None:
    net = trained_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    problem = attached(FewShot(**SMALL, backbone=net, batch_norm="running"))
    x = problem.init_upper(torch.Generator().manual_seed(5))
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(x[name], parameter.detach().double())
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    assert isinstance(net[1], nn.BatchNorm2d)
    # The module that comes out has the buffers, and computes what torch's own does in eval mode.
    out = problem.module({name: tensor + 0.1 for name, tensor in x.items()})
    plain = trained_net().double().eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter += 0.1
    torch.testing.assert_close(out(images()), plain(images()))
    assert set(out.state_dict()) == set(before)


def test_task_statistics_are_those_of_training_mode() -> None:
    net = small_net().double()
    net[6].p = 0.0  # dropout is off here
    x_net = Backbone(build_module(net, 1, 4, torch.Generator()), "all", "transductive")
    x = x_net.initial(1, torch.Generator())
    torch.testing.assert_close(x_net.features(x, images()), net.train()(images()))
    # Inductive: the first rows as if they were alone.
    rows = x_net.features(x, images(), 4)
    torch.testing.assert_close(rows[:4], net(images()[:4]))
    assert not torch.allclose(rows[4:], x_net.features(x, images())[4:])


@pytest.mark.parametrize("norms", ["transductive", "inductive", "running"])
def test_ordinary_modules_under_loop_and_vmap(norms: Any) -> None:
    problem = attached(FewShot(**SMALL, backbone=trained_net(), batch_norm=norms))
    x = problem.init_upper(torch.Generator().manual_seed(1))
    batch = problem.load(range(3), 0, "train")
    found = []
    for task_map in ("loop", "vmap"):
        oracle = LocalOracle(problem, x, batch, task_map)  # type: ignore[arg-type]
        found.append(oracle.total(Term("upper", oracle.init_lower())).upper)
    torch.testing.assert_close(found[0], found[1])


class Raises(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        if images.sum() > 0:  # a branch on values: refused under vmap
            return images
        raise ValueError("not for me")


def test_a_layer_that_fails_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), Raises(), nn.Flatten())
    with pytest.raises(ConfigError, match=r"layer 1 \(Raises\) fails on images .*not for me"):
        attached(FewShot(**SMALL, backbone=nn.Sequential(nn.ReLU(), Raises(), nn.Flatten())))
    positive = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Softplus(), Raises(), nn.Flatten())
    problem = attached(FewShot(**SMALL, backbone=positive))
    x, batch = problem.init_upper(torch.Generator()), problem.load(range(2), 0, "train")
    LocalOracle(problem, x, batch, "loop")
    with pytest.raises(ConfigError, match=r"layer 2 \(Raises\) fails"):
        LocalOracle(problem, x, batch, "vmap")
    with pytest.raises(ConfigError, match=r"got an output of shape .* wanted features \[n, d\]"):
        attached(FewShot(**SMALL, backbone=net[0]))


def test_sources() -> None:
    first, again = (
        build_module("torchvision/resnet18", 3, 0, torch.Generator().manual_seed(1))
        for _ in range(2)
    )
    assert isinstance(first.fc, nn.Identity)
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    made = build_module("test_networks:small_net", 1, 0, torch.Generator().manual_seed(1))
    same = build_module(small_net, 1, 0, torch.Generator().manual_seed(1))
    assert torch.equal(made[0].weight, same[0].weight)
    for bad, match in (
        ("conv5", "got 'conv5'; wanted conv4.* Did you mean conv4"),
        (7, "got 7; wanted conv4"),
    ):
        with pytest.raises(ConfigError, match=match):
            check_source(bad)
    for bad, match in (
        ("torchvision/resnet81", "no classifier 'resnet81'. Did you mean torchvision/resnet18"),
        ("nowhere:made", "nowhere:made cannot be imported here"),
        ("test_networks:SHAPE", "is tuple; wanted a function"),
        ("test_networks:images", "gave Tensor; wanted an nn.Module"),
    ):
        with pytest.raises(ConfigError, match=match):
            build_module(bad, 1, 0, torch.Generator())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_from_a_file(tmp_path: Path, suffix: str) -> None:
    state = {f"module.{name}": tensor for name, tensor in trained_net().state_dict().items()}
    if suffix == ".pt":
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.pt")
        torch.save({"epoch": 3}, tmp_path / "no.pt")
        with pytest.raises(ConfigError, match="holds dict; wanted tensors by name"):
            load_weights(small_net(), str(tmp_path / "no.pt"))
    else:
        save = pytest.importorskip(
            "safetensors.torch", reason="the package safetensors is not here"
        )
        save.save_file(state, str(tmp_path / "w.safetensors"))
    net = small_net()
    file = str(tmp_path / f"w{suffix}")
    if suffix == ".pt":
        torch.save({"state_dict": {**state, "module.fc.weight": torch.zeros(2)}}, file)
        assert load_weights(net, file) == [
            f"weights: {file} has entries that the backbone has not: fc.weight"
        ]
    else:
        assert load_weights(net, file) == []
    for name, tensor in trained_net().state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor)
    net = nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.ReLU(), nn.BatchNorm2d(2, affine=True), nn.Linear(2, 2)
    )
    with pytest.raises(
        ConfigError,
        match=r"missing: 2.weight, 2.bias, .*; of another shape: 0.weight \(4, 1, 3, 3\) for .*; not in the",
    ):
        load_weights(net, file)
    with pytest.raises(ConfigError, match="does not exist"):
        load_weights(net, str(tmp_path / "none.pt"))
    (tmp_path / "bad.pt").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"bad.pt cannot be read"):
        load_weights(net, str(tmp_path / "bad.pt"))


def test_trainable_patterns() -> None:
    def names(trainable: Any) -> Sequence[str]:
        return Backbone(small_net(), trainable, "running").names

    assert names("none") == []
    assert names(["9.*"]) == ["9.weight", "9.bias"]
    assert names("*.bias") == ["0.bias", "1.bias", "4.bias", "5.bias", "9.bias"]
    assert len(names("all")) == 10
    with pytest.raises(ConfigError, match=r"no parameter is called 'fc.*'; wanted all, none"):
        names(["fc.*"])
    with pytest.raises(ConfigError, match=r"without problem\.weights conv4 and resnet12"):
        Backbone(Conv4(1, 4), "all", "running")
    with pytest.raises(ConfigError, match=r"layer 1 \(BatchNorm2d\) keeps no running"):
        Backbone(
            nn.Sequential(nn.ReLU(), nn.BatchNorm2d(2, track_running_stats=False)), "all", "running"
        )


@pytest.mark.parametrize("trainable", ["adapters", "film"])
def test_adapters_start_as_the_network_and_merge(trainable: Any) -> None:
    net = Backbone(trained_net().double(), trainable, "running")
    x = net.initial(2, torch.Generator().manual_seed(1))
    plain = trained_net().double().eval()
    torch.testing.assert_close(net.features(x, images()), plain(images()))
    if trainable == "adapters":
        assert x["0.lora_a"].shape == (2, 9)
        assert x["0.lora_b"].shape == (4, 2)
        assert set(x) == {f"{i}.lora_{ab}" for i in (0, 4, 9) for ab in "ab"}
    else:
        assert set(x) == {f"{i}.film_{what}" for i in (1, 5) for what in ("scale", "shift")}
    moved = {name: tensor + 0.3 for name, tensor in x.items()}
    with torch.no_grad():  # by hand, on an ordinary module
        for i in (0, 4, 9) if trainable == "adapters" else (1, 5):
            if trainable == "adapters":
                change = moved[f"{i}.lora_b"] @ moved[f"{i}.lora_a"]
                plain[i].weight += change.reshape(plain[i].weight.shape)
            else:
                plain[i].weight *= 1 + moved[f"{i}.film_scale"]
                plain[i].bias += moved[f"{i}.film_shift"]
    torch.testing.assert_close(net.features(moved, images()), plain(images()))
    torch.testing.assert_close(net.filled(moved)(images()), plain(images()))
    assert adapters.adapted_layers(small_net(), "lora") == ["0", "4", "9"]


def total(problem: FewShot, x: dict[str, Tensor]) -> Any:
    batch = problem.load(range(3), 0, "train")
    oracle = LocalOracle(problem, x, batch, "loop")
    at = {name: tensor + 0.1 for name, tensor in oracle.init_lower().items()}
    return oracle.total(Term("upper", at), Term("lower", at, 0.7))


@pytest.mark.parametrize("trainable", ["all", "adapters", ["9.*"]])
def test_micro_batches_change_nothing_but_rounding(trainable: Any) -> None:
    keys = {
        **SMALL, "backbone": trained_net(), "batch_norm": "running", "trainable": trainable,
        "neck": "scale", "head": "r2d2",
    }  # fmt: skip
    whole, parts = (attached(FewShot(**keys, micro_batch=size)) for size in (None, 4))
    x = whole.init_upper(torch.Generator().manual_seed(1))
    a, b = total(whole, x), total(parts, x)
    torch.testing.assert_close(a.upper, b.upper)
    torch.testing.assert_close(a.values, b.values)
    with pytest.raises(
        ConfigError, match=r"problem.micro_batch: with BatchNorm statistics of the task"
    ):
        attached(FewShot(**SMALL, backbone=trained_net(), micro_batch=4))


def test_only_what_is_trained_is_x() -> None:
    problem = attached(
        FewShot(
            **SMALL, backbone=trained_net(), batch_norm="running", trainable="none", neck="linear"
        )
    )
    x = problem.init_upper(torch.Generator())
    assert {name: tuple(tensor.shape) for name, tensor in x.items()} == {
        "neck.weight": (8, 8), "neck.bias": (8,),
    }  # fmt: skip
    assert total(problem, x).upper["neck.weight"].abs().sum() > 0
    with pytest.raises(ConfigError, match="head prototype has nothing to learn either"):
        attached(FewShot(**SMALL, backbone=trained_net(), trainable="none"))


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageFolder:
    monkeypatch.setenv("BOMEMETA_CACHE", str(tmp_path / "cache"))
    for c in range(12):
        for i in range(5):
            path = tmp_path / "root" / f"c{c}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng([c, i]).integers(0, 256, (28, 28), np.uint8)
            Image.fromarray(noise // 2 + 10 * c).save(path)
    return ImageFolder(tmp_path / "root", size=28, channels=1, split=[1 / 3, 1 / 3, 1 / 3])


def test_frozen_features_are_computed_once_per_image(
    photographs: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {
        **SMALL,
        "backbone": trained_net(),
        "batch_norm": "running",
        "trainable": "none",
        "neck": "scale",
    }
    passes: list[int] = []
    original = Backbone.features
    monkeypatch.setattr(
        Backbone, "features",
        lambda self, x, images, *rest: passes.append(len(images)) or original(self, x, images, *rest),
    )  # fmt: skip
    cached = FewShot(**keys)
    cached.attach(seed=0, dtype=torch.float64, data=photographs)
    assert sum(passes) == 60 + 2  # and two images of the probe
    passes.clear()
    x = cached.init_upper(torch.Generator())
    batch = cached.load(range(3), 0, "train")
    assert batch["support"].shape == (3, 3, 8)
    again = FewShot(**keys)
    again.attach(seed=0, dtype=torch.float64, data=photographs)
    LocalOracle(again, x, batch, "loop")
    assert sum(passes) == 2  # the probe alone: features come from the disk
    # The same as with images in every episode.
    monkeypatch.setattr("bomemeta.problems.few_shot.has_rows", lambda data: False)
    plain = FewShot(**keys)
    plain.attach(seed=0, dtype=torch.float64, data=photographs)
    assert plain.load(range(3), 0, "train")["support"].shape == (3, 3, *SHAPE)
    a, b = total(cached, x), total(plain, x)
    torch.testing.assert_close(a.upper, b.upper)
    torch.testing.assert_close(a.values, b.values)


def test_augmented_images_are_not_encoded_once(photographs: ImageFolder) -> None:
    assert feature_cache.has_rows(photographs)
    moved = ImageFolder(photographs.root, size=28, channels=1, augmentation="flip_crop")
    assert not feature_cache.has_rows(moved)


@pytest.mark.parametrize("head", heads.SOLVED)
def test_heads_with_a_solution_train(head: str, tmp_path: Path) -> None:
    """Their gradients against differences, closed forms against autograd, and a short run with more
    ways in training than in testing.
    """
    problem = attached(FewShot(ways=3, queries=2, width=4, head=head, shots=2))
    x = problem.init_upper(torch.Generator().manual_seed(1))
    closed = total(problem, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FewShot, "loss_gradient", lambda *_, **__: None)
        readable = total(problem, x)
    torch.testing.assert_close(closed.upper, readable.upper)
    torch.testing.assert_close(closed.lowers, readable.lowers)
    along = {name: torch.randn_like(tensor) for name, tensor in x.items()}
    eps = 1e-6
    ends = [
        total(problem, {n: t + sign * eps * along[n] for n, t in x.items()}) for sign in (1, -1)
    ]
    plus, minus = (float(end.values[0].sum() + 0.7 * end.values[1].sum()) for end in ends)
    slope = sum(float((closed.upper[n] * along[n]).sum()) for n in x)
    # an SVM is piecewise smooth: a difference may cross an edge
    assert slope == pytest.approx((plus - minus) / (2 * eps), rel=1e-3, abs=1e-6)
    config = {
        "problem": {
            "name": "few_shot", "ways": 7, "test_ways": 3, "queries": 2, "test_queries": 2, "width": 4,
            "head": head,
        },
        "data": {"dataset": "glyphs"},
        "solver": {"name": "bome", "barrier": "per_task", "inner_steps": 1, "barrier_steps": 0},
        "steps": 2, "tasks_per_step": 2, "evaluation": {"episodes": 4}, "log": {"tensorboard": False},
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    result = bomemeta.train(config)
    assert 0 <= result.metrics["test_accuracy"] <= 1


def test_without_steps_of_y_the_hypergradient_is_exact() -> None:
    """ProtoNet by any solver: the direction of x is the gradient of CE(-|z - p|^2), by autograd."""
    problem = attached(FewShot(ways=3, queries=2, width=4, head="protonet", feature_scale=None))
    x = problem.init_upper(torch.Generator().manual_seed(1))
    batch = problem.load(range(2), 0, "train")
    oracle = LocalOracle(problem, x, batch, "loop")
    found = oracle.total(Term("upper", oracle.init_lower()))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in x.items()}
    loss = torch.zeros((), dtype=torch.float64)
    for task in range(2):
        both = torch.cat([batch["support"][task], batch["query"][task]])
        z = problem._backbone(leaves, both, None)
        logits = -(torch.cdist(z[3:], z[:3]) ** 2)
        loss = loss + nn.functional.cross_entropy(logits, batch["query_labels"][task])
    wanted = torch.autograd.grad(loss, list(leaves.values()))
    torch.testing.assert_close(list(found.upper.values()), list(wanted), rtol=1e-5, atol=1e-8)


def test_wrong_combinations_are_named() -> None:
    for keys, match in (
        ({"form": "network", "test_ways": 3}, "test_ways: got 3 and ways 5"),
        ({"form": "network", "neck": "scale"}, "neck: belongs to form head"),
        ({"head": "svm", "regularisation": 0.0}, "head svm needs a number > 0"),
        ({"backbone": "conv5"}, "got 'conv5'"),
    ):
        with pytest.raises(ConfigError, match=match):
            FewShot(**keys)  # type: ignore[arg-type]


def test_pretrained_package() -> None:
    pytest.importorskip(
        "efficientnet_lite_pytorch", reason="the extra `pretrained` is not installed"
    )
    module = build_module("bomemeta.nets.pretrained:efficientnet_lite0", 3, 0, torch.Generator())
    net = Backbone(module, "none", "running")
    assert net.features({}, torch.zeros(1, 3, 64, 64)).shape == (1, 1280)
