"""Heads of few-shot classification whose lower problem has a solution that can be written down or
computed to rounding: W*(x), a differentiable function of the support set's features.

    protonet   class means and squared distances (Snell et al., NeurIPS 2017)
    cosine     class means of length 1, and a scale (Chen et al., Meta-Baseline, ICCV 2021)
    r2d2       ridge regression on one-hot targets (Bertinetto et al., ICLR 2019)
    svm        the multi-class SVM of Crammer and Singer (Lee et al., MetaOptNet, CVPR 2019)
    logistic   logistic regression to convergence (Bertinetto et al., ICLR 2019, LR-D2)

Z are features `[..., n, d]` of the support set, E one-hot targets `[..., n, ways]`; leading axes are
tasks. Rows need not be sorted and classes need not be of one size. A head is `[..., d + 1, ways]`,
its last row the bias: logits are [z, 1] W.

The two without a closed form are solved without a graph, and then take ONE Newton step with one:
at a solution it moves nothing and its derivative is that of the implicit function theorem.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from bomemeta.core.tree import Params

SOLVED = ("protonet", "cosine", "r2d2", "svm", "logistic")

# Where cosine, r2d2 and svm start: their outputs lie about in [0, 1], and softmax needs more to be
# sure of a class of five.
START_SCALE = 5.0
# Newton steps of the logistic regression. Each is damped by the best of these factors; six halve the
# distance at the start, and at the end convergence is quadratic.
NEWTON_STEPS = 25
DAMPING = (1.0, 0.5, 0.25, 0.1, 0.02, 0.0)
# Accelerated projected gradient steps of the SVM's dual; the last step, on the constraints that are
# then active, is exact.
DUAL_STEPS = 250
# Added to the SVM's kernel: its dual is then strongly convex, whatever the features.
DUAL_RIDGE = 1e-3
# A dual variable below this share of its bound is at 0.
ACTIVE = 1e-6


def initial(head: str, regularisation: float, dtype: torch.dtype) -> Params:
    """What of x belongs to the head: logarithms of a scale and of the ridge weight, and a shift."""
    log_scale = torch.tensor(START_SCALE, dtype=torch.float64).log().to(dtype).reshape(1)
    if head in ("cosine", "svm"):
        return {"head.log_scale": log_scale}
    if head == "r2d2":
        log_ridge = torch.tensor(regularisation, dtype=torch.float64).log().to(dtype).reshape(1)
        return {
            "head.log_scale": log_scale,
            "head.shift": torch.zeros(1, dtype=dtype),
            "head.log_ridge": log_ridge,
        }
    return {}


def solution(
    head: str, upper: Params, support: Tensor, targets: Tensor, regularisation: float
) -> Tensor:
    """W*(x), `[..., d + 1, ways]`, of one task or of a stack."""
    if head == "protonet":
        return protonet(support, targets)
    if head == "cosine":
        directions = functional.normalize(class_means(support, targets), dim=-2)
        return _with_bias(directions * upper["head.log_scale"].exp())
    if head == "r2d2":
        weight = ridge_regression(support, targets, upper["head.log_ridge"].exp())
        return _with_bias(weight * upper["head.log_scale"].exp(), upper["head.shift"])
    if head == "svm":
        dual = svm_dual(support @ support.mT, targets, regularisation)
        return _with_bias(support.mT @ dual * upper["head.log_scale"].exp())
    dual = logistic_dual(support @ support.mT, targets, regularisation)
    return _with_bias(support.mT @ dual)


def targets(support: Tensor, sizes: Sequence[int]) -> Tensor:
    """One-hot labels `[..., n, ways]` of support features `[..., n, d]`, class after class."""
    counts = torch.tensor(sizes, device=support.device)
    labels = torch.arange(len(sizes), device=support.device).repeat_interleave(counts)
    rows = functional.one_hot(labels, len(sizes)).to(support.dtype)
    return rows.expand(*support.shape[:-2], *rows.shape)


def with_one(features: Tensor) -> Tensor:
    """[z, 1]: features `[..., n, d]` with the column that multiplies the bias."""
    return torch.cat([features, torch.ones_like(features[..., :1])], -1)


def class_means(support: Tensor, targets: Tensor) -> Tensor:
    """`[..., d, ways]`."""
    return support.mT @ targets / targets.sum(-2, keepdim=True)


def protonet(support: Tensor, targets: Tensor) -> Tensor:
    """-|z - p_c|^2 = 2 <z, p_c> - |p_c|^2 - |z|^2, and |z|^2 is the same for all classes."""
    means = class_means(support, targets)
    return torch.cat([2 * means, -means.square().sum(-2, keepdim=True)], -2)


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """A^-1 right, NaN where A is singular or not finite: what diverges is then named as such, with
    the step and the checkpoint before it. torch.linalg.solve would raise an error of LAPACK's.
    """
    found, info = torch.linalg.solve_ex(matrix, right)
    return torch.where((info == 0)[..., None, None], found, torch.nan)


def ridge_regression(support: Tensor, targets: Tensor, ridge: Tensor) -> Tensor:
    """argmin |Z W - E|^2 + ridge |W|^2 = Z' (Z Z' + ridge I)^-1 E, which inverts n x n and not
    d x d numbers.
    """
    kernel = support @ support.mT
    eye = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    dual: Tensor = _solved(kernel + ridge * eye, targets)
    return support.mT @ dual


def logistic_dual(kernel: Tensor, targets: Tensor, regularisation: float) -> Tensor:
    """A with W = Z' A the minimiser of mean CE(Z W) + (regularisation/2) |W|^2: the root of

    r(A) = regularisation A + (softmax(K A) - E) / n.
    """
    with torch.no_grad():
        at = torch.zeros_like(targets)
        for _ in range(NEWTON_STEPS):
            step = _newton(kernel, targets, regularisation, at)
            tries = torch.stack([at - factor * step for factor in DAMPING])
            losses = torch.stack([_loss(kernel, targets, regularisation, a) for a in tries])
            best = losses.argmin(0, keepdim=True)[..., None, None].expand(1, *at.shape)
            at = tries.gather(0, best)[0]
    residual = _residual(kernel, targets, regularisation, at)
    with torch.no_grad():
        jacobian = _jacobian(kernel, targets, regularisation, at)
    moved: Tensor = _solved(jacobian, residual.flatten(-2)[..., None])
    return at - moved.reshape(at.shape)


def svm_dual(kernel: Tensor, targets: Tensor, bound: float) -> Tensor:
    """alpha of the Crammer-Singer SVM with slack weight `bound`, W = Z' alpha:

        min 1/2 <alpha, K alpha> - <alpha, E>    with  sum_c alpha_nc = 0,  alpha_nc <= bound E_nc

    K with DUAL_RIDGE on its diagonal. alpha = bound E - beta with beta on the simplex of size
    `bound`, whose projection is known.
    """
    shape, ways = targets.shape, targets.shape[-1]
    eye = torch.eye(shape[-2], dtype=kernel.dtype, device=kernel.device)
    kernel = kernel + DUAL_RIDGE * eye
    with torch.no_grad():
        # The largest row sum bounds the largest eigenvalue.
        rate = 1 / kernel.abs().sum(-1).amax(-1)[..., None, None]
        beta = extrapolated = torch.full_like(targets, bound / ways)
        momentum = 1.0
        for _ in range(DUAL_STEPS):  # Beck and Teboulle, 2009
            grad = targets - kernel @ (bound * targets - extrapolated)
            moved = on_simplex(extrapolated - rate * grad, bound)
            following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            extrapolated = moved + (momentum - 1) / following * (moved - beta)
            beta, momentum = moved, following
        free = (beta > ACTIVE * bound).to(kernel.dtype)
    # On the free beta: K beta + nu = bound K E - E, sum_c beta_nc = bound; the others stay 0.
    block = torch.eye(ways, dtype=kernel.dtype, device=kernel.device)
    hessian = _kron(kernel, block)
    mask = free.flatten(-2)
    inside = mask[..., :, None] * hessian * mask[..., None, :] + torch.diag_embed(1 - mask)
    sums = _kron(eye, torch.ones_like(block[:1])).expand(*mask.shape[:-1], -1, -1)
    sums = sums * mask[..., None, :]
    matrix = torch.cat(
        [
            torch.cat([inside, sums.mT], -1),
            torch.cat([sums, torch.zeros_like(sums[..., : shape[-2]])], -1),
        ],
        -2,
    )
    right = torch.cat(
        [
            mask * (bound * (kernel @ targets) - targets).flatten(-2),
            torch.full_like(targets[..., 0], bound),
        ],
        -1,
    )
    solved: Tensor = _solved(matrix, right[..., None])[..., : mask.shape[-1], 0]
    return bound * targets - solved.reshape(shape)


def on_simplex(points: Tensor, size: float) -> Tensor:
    """The nearest points, row by row, that are >= 0 and sum to `size` (Held et al., 1974)."""
    ordered = points.sort(-1, descending=True).values
    count = torch.arange(1, points.shape[-1] + 1, dtype=points.dtype, device=points.device)
    shifts = (ordered.cumsum(-1) - size) / count
    inside = (ordered > shifts).to(points.dtype)
    # The last place that is inside: its shift is the one.
    shift = (shifts * inside * (inside.sum(-1, keepdim=True) == count)).sum(-1, keepdim=True)
    return (points - shift).clamp(min=0)


def _loss(kernel: Tensor, targets: Tensor, regularisation: float, at: Tensor) -> Tensor:
    logits = kernel @ at
    cross_entropy = (logits.logsumexp(-1) - (logits * targets).sum(-1)).mean(-1)
    return cross_entropy + regularisation / 2 * (at * logits).sum((-2, -1))


def _residual(kernel: Tensor, targets: Tensor, regularisation: float, at: Tensor) -> Tensor:
    return regularisation * at + (torch.softmax(kernel @ at, -1) - targets) / targets.shape[-2]


def _jacobian(kernel: Tensor, targets: Tensor, regularisation: float, at: Tensor) -> Tensor:
    """Of r in A, `[..., n ways, n ways]`."""
    p = torch.softmax(kernel @ at, -1)
    curvature = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]  # [..., n, ways, ways]
    # J[(n, c), (m, e)] = regularisation [same] + curvature[n, c, e] K[n, m] / n
    full = curvature[..., :, :, None, :] * kernel[..., :, None, :, None] / targets.shape[-2]
    size = p.shape[-2] * p.shape[-1]
    eye = torch.eye(size, dtype=p.dtype, device=p.device)
    return full.reshape(*p.shape[:-2], size, size) + regularisation * eye


def _newton(kernel: Tensor, targets: Tensor, regularisation: float, at: Tensor) -> Tensor:
    residual = _residual(kernel, targets, regularisation, at)
    jacobian = _jacobian(kernel, targets, regularisation, at)
    step: Tensor = _solved(jacobian, residual.flatten(-2)[..., None])
    return step.reshape(at.shape)


def _kron(a: Tensor, b: Tensor) -> Tensor:
    """The Kronecker product of `[..., n, m]` and `[p, q]`, `[..., n p, m q]`."""
    product = a[..., :, None, :, None] * b[:, None, :]
    return product.reshape(*a.shape[:-2], a.shape[-2] * b.shape[0], a.shape[-1] * b.shape[1])


def _with_bias(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    row = torch.zeros_like(weight[..., :1, :])
    return torch.cat([weight, row if bias is None else row + bias], -2)
