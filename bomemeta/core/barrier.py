"""BOME's dynamic barrier: how hard the constraint q <= 0 pushes back at this step.

Source: Liu, Ye, Wright, Stone, Liu, "BOME! Bilevel Optimization Made Easy", NeurIPS 2022. In the
paper's letters

    phi    = eta |grad q|^2   or   eta max(q, 0)
    lambda = max( (phi - <grad f, grad q>) / |grad q|^2, 0 ),    0 where grad q = 0
    step   = grad f + lambda grad q
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Phi = Literal["grad_norm", "gap"]


class Barrier(NamedTuple):
    """Shapes [] for one barrier over all tasks, [B] for one per task."""

    multiplier: Tensor  # lambda, the number to look at; unbounded where grad q is small
    # lambda * |grad q|: what multiplies the UNIT vector along grad q; bounded even where lambda is
    # not
    force: Tensor
    sq_norm: Tensor  # |grad q|^2

    def weights(self) -> Tensor:
        """What multiplies grad q itself, force / |grad q|, 0 where grad q = 0: the projection form
        of lambda.
        """
        norm = self.sq_norm.sqrt()
        return torch.where(norm > 0, self.force / norm, 0.0)


def control(phi: Phi, eta: float, gap: Tensor, sq_norm: Tensor) -> Tensor:
    """phi, the rate at which the step is asked to reduce q (first order: by exactly step size times
    phi).
    """
    return eta * sq_norm if phi == "grad_norm" else eta * gap.clamp_min(0.0)


def barrier(phi: Phi, eta: float, gap: Tensor, inner: Tensor, sq_norm: Tensor) -> Barrier:
    """The dynamic barrier from `gap` = q, `inner` = <grad f, grad q> and `sq_norm` = |grad q|^2,
    all of one shape, [] or [B].

    Written for the unit vector u = grad q / |grad q|: force = max(phi/|grad q| - <grad f, u>, 0),
    so that grad f + force * u = (grad f - <grad f, u> u) + (phi/|grad q|) u stays bounded where
    |grad q| tends to 0. There is no epsilon in the denominator: it would be a hidden cap on lambda.
    """
    positive = sq_norm > 0
    excess = (control(phi, eta, gap, sq_norm) - inner).clamp_min(0.0)
    # grad q == 0: the constraint is met to first order and asks for no force
    return Barrier(
        torch.where(positive, excess / sq_norm, 0.0),
        torch.where(positive, excess / sq_norm.sqrt(), 0.0),
        sq_norm,
    )


class Stationarity(NamedTuple):
    """The two parts of K = |grad f|^2 - max(-<grad f, grad q>, 0)^2 / |grad q|^2 + max(q, 0); K = 0
    at a stationary point.
    """

    gradient: Tensor  # the part of grad f that no lambda >= 0 cancels, squared
    gap: Tensor  # how far the lower problem is from solved


def stationarity(
    sq_norm_upper: Tensor, gap: Tensor, inner: Tensor, sq_norm: Tensor
) -> Stationarity:
    """K of the BOME paper's analysis, from |grad f|^2, q, <grad f, grad q> and |grad q|^2."""
    safe = torch.where(sq_norm > 0, sq_norm, torch.ones_like(sq_norm))
    # inner <= 0 wherever it enters, so grad q = 0 gives 0 / 1
    cancelled = (-inner).clamp_min(0.0) ** 2 / safe
    return Stationarity((sq_norm_upper - cancelled).clamp_min(0.0), gap.clamp_min(0.0))
