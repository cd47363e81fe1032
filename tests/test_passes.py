"""What was written out to be fast, against the readable version that it stands for."""

import pytest
import torch
from test_oracle import make, random_like

from bomemeta.core import tree
from bomemeta.core.inner import gradient_steps
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.oracle import Oracle, Term
from bomemeta.nets import build_backbone, conv4_passes
from bomemeta.nets.conv4_passes import Conv4Passes
from bomemeta.problems.few_shot import FewShot

HEADS = ["prototype", "ridge", "span"]


def network(channels: int, dtype: torch.dtype) -> torch.nn.Module:
    net = build_backbone("conv4", channels, 5, torch.Generator().manual_seed(0)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():  # BatchNorm's scales of both signs and shifts other than 0
        parameter.data += torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return net


@pytest.mark.parametrize(("channels", "size", "pieces"), [(1, 28, 1), (1, 28, 3), (3, 21, 4)])
def test_conv4_passes_equal_autograd(channels, size, pieces, monkeypatch):
    """Sides of 21 leave a row and a column out of every pool, but not out of the statistics; 7
    images do not fill whole pieces.
    """
    per_image = 8 * 5 * size**2
    monkeypatch.setattr(conv4_passes, "PIECE_BYTES", per_image * -(-7 // pieces))
    net = network(channels, torch.float64)
    images = torch.rand(
        2, 7, channels, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    wanted = torch.stack([net(task) for task in images])
    cotangent = torch.randn(
        wanted.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    wanted.backward(cotangent)
    upper = {name: tensor.detach() for name, tensor in net.named_parameters()} | {
        "another": torch.zeros(1)
    }
    passes = Conv4Passes(upper, images)
    assert len(passes._kept[0][0].pieces) == pieces
    torch.testing.assert_close(passes.features, wanted.detach())
    for _ in range(2):  # it may be asked again
        found = passes.pull_back(cotangent)
        torch.testing.assert_close(
            found, {name: tensor.grad for name, tensor in net.named_parameters()}
        )


def test_a_blank_image_and_a_dead_channel_are_as_under_autograd():
    """Patches without variance: what BatchNorm divides by is then its eps alone, in both."""
    net = network(1, torch.float64)
    images = torch.zeros(1, 4, 1, 28, 28, dtype=torch.float64)
    upper = {name: tensor.detach() for name, tensor in net.named_parameters()}
    passes = Conv4Passes(upper, images)
    torch.testing.assert_close(passes.features[0], net(images[0]).detach())
    assert all(
        tensor.isfinite().all()
        for tensor in passes.pull_back(torch.ones_like(passes.features)).values()
    )


def test_single_precision_is_as_near_to_double_as_autograds():
    net = network(1, torch.float64)
    images = (
        torch.rand(
            1, 10, 1, 28, 28, generator=torch.Generator().manual_seed(2), dtype=torch.float64
        )
        > 0.9
    ).double()
    upper = {name: tensor.detach() for name, tensor in net.named_parameters()}
    exact = Conv4Passes(upper, images).features[0]
    with torch.no_grad():
        plain = (net.float()(images[0].float()) - exact).abs().max()
    ours = (
        (
            Conv4Passes(
                {name: tensor.float() for name, tensor in upper.items()}, images.float()
            ).features[0]
            - exact
        )
        .abs()
        .max()
    )
    assert ours < 10 * plain  # both are some roundings; one bit's worth of luck is a factor of 2


@pytest.mark.parametrize("head", HEADS)
def test_encoding_of_a_stack_equals_encode_of_each_task(head, monkeypatch):
    problem, upper, fast, lower = make(head)
    assert fast._encoding is not None
    monkeypatch.setattr(FewShot, "encode_tasks", lambda *_: None)
    plain = LocalOracle(problem, upper, fast.batch, "loop")
    assert plain._encoding is None
    torch.testing.assert_close(fast.encoded, plain.encoded)
    terms = (
        Term("upper", lower, 0.3),
        Term("lower", lower, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)),
    )
    torch.testing.assert_close(fast.total(*terms).upper, plain.total(*terms).upper)
    v = random_like(lower, 4)
    torch.testing.assert_close(
        fast.adjoint(lower, v, ("lower", 1.0)).upper, plain.adjoint(lower, v, ("lower", 1.0)).upper
    )


@pytest.mark.parametrize("head", HEADS)
def test_closed_total_equals_autograd(head, monkeypatch):
    _, _, oracle, lower = make(head)
    other = tree.axpy(0.3, random_like(lower, 5), lower)
    weight = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    terms = (
        Term("upper", lower),
        Term("lower", lower, weight),
        Term("lower", other, -weight, in_y=False),
    )
    closed = oracle.total(*terms)
    monkeypatch.setattr(FewShot, "loss_gradient", lambda *_: None)
    plain = oracle.total(*terms)
    torch.testing.assert_close(closed.values, plain.values)
    torch.testing.assert_close(closed.lowers, plain.lowers)
    torch.testing.assert_close(closed.upper, plain.upper)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_lower_steps_are_steps_along_the_gradient(head, steps):
    _, _, oracle, lower = make(head)
    before = oracle.gradient_evaluations
    fast = gradient_steps(oracle, lower, steps, 0.05)
    assert oracle.gradient_evaluations == before + steps
    torch.testing.assert_close(fast, Oracle.descended(oracle, lower, steps, 0.05))
    if steps == 0:
        torch.testing.assert_close(fast, lower, rtol=0, atol=0)
