"""Second-order products asked for one by one, as the mathematics has them: what the oracle's fused
calls are compared with.

Finite differences vouch for this function in test_oracle.py.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bomemeta.core import tree
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.tree import Params


class Curvature(NamedTuple):
    """First- and second-order products of a sum of terms psi at one y, for a direction u in y."""

    values: list[Tensor]  # per term, [B], without its weight
    lower: Params  # grad_y psi [B, ...]
    lower_product: Params  # (d2 psi / dy2) u [B, ...]
    upper_product: Params  # (d2 psi / dx dy) u, summed over tasks


def curvature(
    oracle: LocalOracle,
    at: Params,
    direction: Params,
    *terms: tuple[Literal["upper", "lower"], float | Tensor],
) -> Curvature:
    """grad_y, Hessian and cross product of psi = sum of `(loss, weight)` terms at y = `at`, along u
    = `direction`.

    One double backward of <grad_y psi, u> gives both second-order products; the cross product costs
    one pull-back more.
    """
    encoded = tree.leaves(oracle.encoded) if oracle._encodes else oracle._leaves
    leaf = tree.leaves(at)
    values = [oracle._values(loss, encoded, leaf) for loss, _ in terms]
    psi = torch.stack(
        [(value * weight).sum() for value, (_, weight) in zip(values, terms, strict=True)]
    ).sum()
    grads = torch.autograd.grad(psi, list(leaf.values()), create_graph=True, materialize_grads=True)
    along = torch.stack(
        [(grad * direction[name]).sum() for name, grad in zip(leaf, grads, strict=True)]
    ).sum()
    inputs = [*leaf.values(), *encoded.values()]
    # A loss that is linear in y has no second derivative at all, and torch no graph to go back
    # through.
    products = (
        torch.autograd.grad(along, inputs, materialize_grads=True)
        if along.requires_grad
        else tuple(torch.zeros_like(tensor) for tensor in inputs)
    )
    cotangent = products[len(leaf) :]
    upper = oracle._in_x(cotangent)
    return Curvature(
        [value.detach() for value in values],
        {name: grad.detach() for name, grad in zip(leaf, grads, strict=True)},
        dict(zip(leaf, products, strict=False)),
        upper,
    )
