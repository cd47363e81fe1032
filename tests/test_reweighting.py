"""Problem `reweighting`: which samples there are, losses and the one-step hypergradient against plain
PyTorch, parts of a batch, and what is reported.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_promises import FEW_SHOT
from torch.func import functional_call
from torch.nn import functional
from toy import Bench, ToyLabelled

import bomemeta
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.oracle import Term
from bomemeta.data.labelled import LabelledArray
from bomemeta.errors import ConfigError, DataError
from bomemeta.problems.reweighting import Reweighting
from bomemeta.problems.reweighting_samples import Selection, samples
from bomemeta.registry import solvers

DATA = ToyLabelled()


def made(**fields: Any) -> Reweighting:
    given = {"clean": 30, "network": "mlp", "width": 4, "batch": 6, "clean_batch": 5, "noise": 0.3}
    problem = Reweighting(**{**given, **fields})
    problem.attach(seed=0, dtype=torch.float64, data=DATA)
    return problem


def cut(**fields: Any) -> Selection:
    return Selection(**{"train": None, "clean": 30, "labels": "own", "noise": 0.0, "imbalance": 1.0,
                  "seed": 0, **fields})  # fmt: skip


def test_clean_samples_are_balanced_and_no_training_ones() -> None:
    found, true = samples(DATA, cut()), DATA.examples("train").labels
    assert torch.bincount(true[found.clean]).tolist() == [10, 10, 10]
    assert not set(found.clean) & set(found.train)
    assert len(found.train) == 90
    assert not found.wrong.any()


def test_noise_changes_so_many_labels_and_none_to_itself() -> None:
    found, true = samples(DATA, cut(noise=0.4)), DATA.examples("train").labels.numpy()
    assert found.wrong.sum() == round(0.4 * 90)
    assert ((found.given != true[found.train]) == found.wrong).all()


def test_a_long_tail_has_the_counts_of_its_formula() -> None:
    found, true = samples(DATA, cut(imbalance=9.0)), DATA.examples("train").labels
    assert torch.bincount(true[found.train]).tolist() == [30, 10, round(30 / 9)]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"clean": 2}, r"problem.clean: got 2"),
        ({"train": 91}, r"problem.train: got 91"),
        ({"labels": "worse"}, r"problem.labels: got 'worse'"),
        ({"batch": 46}, r"problem.batch: got 46"),
        ({"network": "conv"}, r"problem.network: conv wants pictures"),
    ],
)
def test_what_does_not_fit_is_named(fields: dict[str, Any], match: str) -> None:
    with pytest.raises((ConfigError, DataError), match=match):
        made(**fields)


def block_of(problem: Reweighting, block: int, step: int = 0) -> dict[str, torch.Tensor]:
    return {name: tensor[0] for name, tensor in problem.load([block], step, "train").items()}


def test_scales_make_a_batch_the_mean_of_its_block_in_expectation() -> None:
    """For each sample: its chance of being drawn times its scale is its part of the whole mean."""
    problem = made(batch=20, clean_batch=None)
    steps, parts = 400, torch.zeros(90, dtype=torch.float64)
    for step in range(steps):
        for block in range(2):
            batch = block_of(problem, block, step)
            parts.index_add_(0, batch["rows"], batch["scale"] / 2)  # mean over the blocks
    assert float(parts.sum() / steps) == pytest.approx(1.0)
    assert float((parts / steps * 90 - 1).abs().max()) < 6 * (45 / 20 / steps) ** 0.5
    whole = made(batch=45, clean_batch=15)
    every = made(batch=None, clean_batch=None)
    for name, tensor in every.load(range(2), 0, "train").items():
        assert torch.equal(tensor, whole.load(range(2), 7, "train")[name])


def net_of(problem: Reweighting, y: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    return functional_call(problem.build().double(), y, (inputs,))


def by_hand(problem: Reweighting, x: Any, y: Any, batch: Any) -> torch.Tensor:
    """g of one block, written out."""
    losses = -net_of(problem, y, batch["inputs"]).log_softmax(1)
    own = losses.gather(1, batch["labels"][:, None])[:, 0]
    if problem.weights == "labels":
        own, weights = (x["logits"][batch["rows"]].softmax(1) * losses).sum(1), 1.0
    elif problem.weights == "sample":
        weights = 2 / (1 + (-x["weights"][batch["rows"]]).exp())
    else:
        one = functional.one_hot(batch["labels"], 3).double()
        put = own.detach()[:, None] if problem.weights == "loss_net" else torch.cat(
            [batch["inputs"], one], 1
        )  # fmt: skip
        hidden = (put @ x["hidden.weight"].T + x["hidden.bias"]).clamp(min=0)
        weights = 2 / (1 + (-(hidden @ x["weight"] + x["bias"])).exp())
    square = sum((tensor**2).sum() for tensor in y.values())
    return (batch["scale"] * weights * own).sum() + problem.decay / 2 * square


@pytest.mark.parametrize("weights", ["sample", "loss_net", "rater", "labels"])
def test_one_step_of_itd_is_the_plain_script(weights: str) -> None:
    """With `loss_net` this is Meta-Weight-Net's own step."""
    problem, lr = made(weights=weights, decay=0.01), 0.5
    bench = Bench(problem, solvers.get("itd")(inner_steps=1, inner_lr=lr, upper_lr=1.0), 1)
    x = {name: tensor.clone().requires_grad_() for name, tensor in bench.upper.params.items()}
    if "weight" in x:  # a zero layer would hide the others
        for params in (x, bench.upper.params):
            params["weight"].data.copy_(torch.linspace(-1, 1, 64))
    blocks = [block_of(problem, block) for block in range(2)]
    y = problem.init_lower({}, blocks[0])
    y = {name: tensor.requires_grad_() for name, tensor in y.items()}
    g = torch.stack([by_hand(problem, x, y, block) for block in blocks]).mean()
    slopes = torch.autograd.grad(g, list(y.values()), create_graph=True)
    moved = {name: y[name] - lr * slope for name, slope in zip(y, slopes, strict=True)}
    f = []
    for block in blocks:
        losses = -net_of(problem, moved, block["clean_inputs"]).log_softmax(1)
        own = losses.gather(1, block["clean_labels"][:, None])[:, 0]
        f.append((block["clean_scale"] * own).sum())
    expected = torch.autograd.grad(torch.stack(f).mean(), list(x.values()))
    before = {name: tensor.detach().clone() for name, tensor in x.items()}
    bench.advance()
    for (name, start), slope in zip(before.items(), expected, strict=True):
        assert torch.allclose(bench.upper.params[name], start - slope, rtol=1e-9, atol=1e-14)
        assert float(slope.abs().max()) > 0


@pytest.mark.parametrize("weights", ["sample", "loss_net", "rater", "labels"])
def test_parts_of_a_batch_add_up_to_it(weights: str) -> None:
    problem = made(weights=weights, decay=0.1)
    whole = problem.load(range(2), 0, "train")
    x = problem.init_upper(torch.Generator().manual_seed(0))

    def answers(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        oracle = LocalOracle(problem, x, batch, "loop")
        y = oracle.init_lower()
        total = oracle.total(Term("upper", y), Term("lower", y, 0.5))
        return [*total.values, *total.upper.values(), *total.lowers[1].values()]

    parts = problem.micro_batches(whole, 2)
    assert len(parts) == 3
    added = [torch.stack(each).sum(0) for each in zip(*map(answers, parts), strict=True)]
    assert all(torch.allclose(a, b) for a, b in zip(added, answers(whole), strict=True))


@pytest.mark.parametrize("weights", ["sample", "labels"])
def test_f1_is_of_the_labels_declared_wrong(weights: str) -> None:
    """Of 90 samples the first 20 in order are declared wrong, whatever they are."""
    problem = made(weights=weights)
    x = problem.init_upper(torch.Generator().manual_seed(0))
    for row in range(20):
        if weights == "sample":
            x["weights"][row] = -3.0
        else:
            x["logits"][row].neg_()
    batch = problem.load(range(2), 0, "test")
    oracle = LocalOracle(problem, x, batch, "loop", False)
    metrics = {n: float(v.mean()) for n, v in oracle.evaluate(oracle.init_lower()).items()}
    wrong = problem._samples.wrong
    both = int(wrong[:20].sum())
    expected = 2 * both / (20 + int(wrong.sum()))
    assert problem.summary(metrics)["f1"] == pytest.approx(expected)
    assert problem.summary(metrics)["precision"] == pytest.approx(both / 20)


def test_weights_come_to_tell_right_labels_from_wrong_ones(tmp_path: Any) -> None:
    """On rows around three centres a third of whose labels are wrong. And micro-batches end nearby."""
    job: dict[str, Any] = {
        "imports": FEW_SHOT["imports"],
        "problem": {
            "name": "reweighting", "clean": 30, "noise": 0.3, "network": "linear", "batch": None, "clean_batch": None,
        },
        "data": {"dataset": "toy_labelled"},
        "solver": {"name": "itd", "inner_steps": 1, "inner_lr": 0.3, "upper_lr": 300.0},
        "steps": 60, "log": {"tensorboard": False},
    }  # fmt: skip
    result = bomemeta.train(job, [f"output_dir={tmp_path / 'a'}"])
    assert result.metrics["mean_weight_right"] > result.metrics["mean_weight_wrong"] + 0.3
    assert result.metrics["f1"] > 0.6
    other = bomemeta.train(job, [f"output_dir={tmp_path / 'b'}", "micro_batch=16", "steps=5"])
    short = bomemeta.train(job, [f"output_dir={tmp_path / 'c'}", "steps=5"])
    assert torch.allclose(other.upper["weights"], short.upper["weights"], atol=1e-4)


@pytest.mark.parametrize("layout", ["first", "last", "grey", "flat"])
def test_pictures_of_any_layout_are_folded_as_they_lie(layout: str, tmp_path: Any) -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (40, 3, 8, 6), np.uint8)  # [n, C, H, W]
    pictures = pictures[:, :1] if layout == "grey" else pictures
    stored = {
        "first": pictures, "last": pictures.transpose(0, 2, 3, 1), "grey": pictures[:, 0],
        "flat": pictures.transpose(0, 2, 3, 1).reshape(40, -1),
    }[layout]  # fmt: skip
    y = np.arange(40) % 2
    np.savez(tmp_path / "a.npz", x_train=stored, y_train=y, x_test=stored[:8], y_test=y[:8])
    shape = [8, 6, 3] if layout == "flat" else None
    data = LabelledArray(path=str(tmp_path / "a.npz"), image_shape=shape)
    problem = Reweighting(clean=4, network="conv", width=2, batch=None, clean_batch=None, blocks=1)
    problem.attach(seed=0, dtype=torch.float64, data=data)
    moments = data.examples("train").moments()
    batch = problem.load([0], 0, "test")
    wanted = (torch.from_numpy(pictures[:8]).double() / 255 - moments.mean) / moments.deviation
    torch.testing.assert_close(batch["test_inputs"][0], wanted)


def test_rows_of_no_known_picture_are_said_to_be_such(tmp_path: Any) -> None:
    x, y = np.random.default_rng(0).random((40, 12)), np.arange(40) % 2
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    problem = Reweighting(clean=4, network="conv", batch=None, clean_batch=None)
    with pytest.raises(
        ConfigError, match=r"problem.network: conv wants pictures.*data.image_shape"
    ):
        problem.attach(
            seed=0, dtype=torch.float64, data=LabelledArray(path=str(tmp_path / "a.npz"))
        )
