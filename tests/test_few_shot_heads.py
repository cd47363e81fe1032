"""Heads with a solution: closed forms, scikit-learn as the independent oracle, derivatives by finite
differences.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import NearestCentroid
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.nn import functional

from bomemeta.problems import few_shot_heads as heads

# Four classes of unequal size, in no order.
LABELS = torch.tensor([0, 2, 1, 3, 2, 0, 1, 1, 3, 2])
RHO = 0.3


def support(seed: int = 0, d: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, d, generator=generator, dtype=torch.float64)
    z = centres[LABELS] + 0.8 * torch.randn(
        len(LABELS), d, generator=generator, dtype=torch.float64
    )
    return z, functional.one_hot(LABELS, 4).double()


def x_of(head: str) -> dict[str, Tensor]:
    return heads.initial(head, RHO, torch.float64)


def logits(head: str, z: Tensor, targets: Tensor, query: Tensor) -> Tensor:
    w = heads.solution(head, x_of(head), z, targets, RHO)
    return heads.with_one(query) @ w


def test_protonet_is_the_nearest_centroid() -> None:
    z, targets = support()
    query, _ = support(1)
    found = logits("protonet", z, targets, query)
    centroids = NearestCentroid().fit(z.numpy(), LABELS.numpy())
    assert (found.argmax(1).numpy() == centroids.predict(query.numpy())).all()
    distance = torch.cdist(query, torch.tensor(centroids.centroids_)) ** 2
    torch.testing.assert_close(
        found.log_softmax(1), (-distance).log_softmax(1), rtol=1e-10, atol=1e-10
    )


def test_cosine_is_the_nearest_direction() -> None:
    z, targets = support()
    query, _ = support(1)
    centroids = torch.tensor(NearestCentroid().fit(z.numpy(), LABELS.numpy()).centroids_)
    similarity = functional.cosine_similarity(query[:, None], centroids, dim=-1)
    length = query.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        logits("cosine", z, targets, query), heads.START_SCALE * length * similarity
    )


def test_ridge_regression_is_scikit_learns() -> None:
    z, targets = support()
    theirs = Ridge(alpha=RHO, fit_intercept=False, tol=1e-12).fit(z.numpy(), targets.numpy())
    ours = heads.ridge_regression(z, targets, torch.tensor(RHO, dtype=torch.float64))
    np.testing.assert_allclose(ours.numpy(), theirs.coef_.T, rtol=1e-8, atol=1e-10)
    wide = heads.solution("r2d2", x_of("r2d2"), z, targets, RHO)
    torch.testing.assert_close(wide[:-1], heads.START_SCALE * ours)
    assert (wide[-1] == 0).all()


def test_logistic_regression_is_scikit_learns() -> None:
    z, targets = support()
    theirs = LogisticRegression(
        C=1 / (len(z) * RHO), fit_intercept=False, tol=1e-12, max_iter=10_000, solver="newton-cg"
    ).fit(z.numpy(), LABELS.numpy())
    ours = heads.solution("logistic", {}, z, targets, RHO)[:-1]
    # Their softmax has one weight vector per class, as ours: the penalty makes it unique.
    np.testing.assert_allclose(ours.T.numpy(), theirs.coef_, atol=1e-7)


@pytest.mark.parametrize("rho", [1e-3, 1.0, 30.0])
def test_logistic_regression_converges_whatever_the_penalty(rho: float) -> None:
    z, targets = support()
    kernel = 16 * z @ z.mT
    a = heads.logistic_dual(kernel, targets, rho)
    assert heads._residual(kernel, targets, rho, a).abs().max() < 1e-10


@pytest.mark.parametrize("bound", [0.1, 1.0, 10.0])
def test_svm_is_scikit_learns(bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "DUAL_RIDGE", 1e-8)  # theirs has none
    z, targets = support()
    theirs = LinearSVC(
        C=bound, multi_class="crammer_singer", fit_intercept=False, tol=1e-10, max_iter=1_000_000
    ).fit(z.numpy(), LABELS.numpy())
    alpha = heads.svm_dual(z @ z.mT, targets, bound)
    np.testing.assert_allclose((z.mT @ alpha).T.numpy(), theirs.coef_, atol=1e-5)


@pytest.mark.parametrize("bound", [0.05, 1.0, 20.0])
def test_svm_meets_its_optimality_conditions(bound: float) -> None:
    z, targets = support(3)
    alpha = heads.svm_dual(z @ z.mT, targets, bound)
    beta = bound * targets - alpha
    assert beta.min() > -1e-9
    torch.testing.assert_close(alpha.sum(1), torch.zeros(len(z), dtype=torch.float64))
    kernel = z @ z.mT + heads.DUAL_RIDGE * torch.eye(len(z), dtype=torch.float64)
    grad = targets - kernel @ alpha  # of the objective in beta
    # On a row's simplex a linear function is least where beta is: its free entries are the row's least.
    assert ((grad - grad.min(1, keepdim=True).values) * beta).max() < 1e-7 * max(bound, 1)


def test_projection_onto_the_simplex() -> None:
    points = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = heads.on_simplex(points, 0.7)
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(1), torch.full((50,), 0.7, dtype=torch.float64))
    other = 0.7 * torch.softmax(
        torch.randn(200, 1, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64), -1
    )
    assert ((other - points).square().sum(-1) >= (found - points).square().sum(-1)).all()


@pytest.mark.parametrize("head", heads.SOLVED)
def test_derivatives_of_the_solutions(head: str) -> None:
    z, targets = support()
    x = {name: tensor.requires_grad_() for name, tensor in x_of(head).items()}
    inputs = (z.requires_grad_(), *x.values())

    def solved(z: Tensor, *own: Tensor) -> Tensor:
        return heads.solution(head, dict(zip(x, own, strict=True)), z, targets, RHO)

    # of an SVM's support vectors none is at the edge here, so it is differentiable
    assert torch.autograd.gradcheck(solved, inputs, atol=1e-5, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("head", heads.SOLVED)
def test_a_stack_and_vmap_give_what_each_task_gives(head: str) -> None:
    both = [support(seed) for seed in (0, 1)]
    z, targets = (torch.stack(parts) for parts in zip(*both, strict=True))

    def solved(z: Tensor, targets: Tensor) -> Tensor:
        return heads.solution(head, x_of(head), z, targets, RHO)

    each = torch.stack([solved(*one) for one in both])
    torch.testing.assert_close(solved(z, targets), each)
    torch.testing.assert_close(torch.vmap(solved)(z, targets), each)
