"""Part `jax`: the same steps in plain JAX, jit and vmap over tasks, as a user who wants speed would
write them: BOME's prototype head, ANIL and MAML of second order on the four-layer network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.device.sizes import Say, Sizes, device_here, ms, ratio, timed
from benchmarks.device.steps import INNER_STEPS, OnDevice, episodes, few_shot_step
from benchmarks.device.workers import Absent
from bomemeta.core.upper import UpperVariable
from bomemeta.registry import solvers

SCALE, RHO, ADAPT, BARRIER, LR = 4.0, 1.0, 5, 5, 0.2  # FewShot's and BOME's defaults, as in `steps`


def jax_steps(sizes: Sizes, say: Say) -> None:
    try:
        import jax
    except ImportError as error:
        raise Absent(f"jax is not installed here ({error})") from error
    jax.config.update("jax_default_matmul_precision", "float32")
    device = device_here()
    problem = episodes("conv4", sizes, device)
    network = OnDevice(form="network", width=sizes.width)
    network.attach(seed=0, dtype=torch.float32, data=problem.data)
    network.batch = problem.batch
    peers = _peers(problem)
    ours = {"prototype": few_shot_step(problem, sizes, device)}
    for name in ("anil", "maml"):
        solver = solvers.get(name)(inner_steps=INNER_STEPS, inner_lr=LR, upper_lr=1e-3)
        ours[name] = few_shot_step(network, sizes, device, solver)
    for name, (step, upper) in ours.items():
        row: dict[str, Any] = {"step": name, "jax_on": jax.devices()[0].device_kind}
        try:
            theirs, kernel = peers[name]
            row["difference"] = _difference(step, upper, theirs, kernel)
            taken = timed({"ours": step, "jax": theirs}, sizes, device)
            row |= {"ours_ms": ms(taken["ours"]), "jax_ms": ms(taken["jax"]),
                    "ours_over_jax": ratio(taken["ours"], taken["jax"])}  # fmt: skip
        except (RuntimeError, ImportError) as error:
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        say(row)


Peer = tuple[Callable[[], None], Callable[[], torch.Tensor]]


def _difference(
    step: Callable[[], None],
    upper: UpperVariable,
    theirs: Callable[[], None],
    kernel: Callable[[], torch.Tensor],
) -> float:
    """How far apart the first layer is after one step of each, over how far it came: that both are
    the same step.
    """
    start = kernel()
    step()
    theirs()
    first = next(tensor for tensor in upper.params.values() if tensor.ndim == 4)
    return float((kernel() - first).norm() / (first - start).norm())


def _peers(problem: OnDevice) -> dict[str, Peer]:
    """Steps that keep their own x and move it by SGD, each ending when the device is done; and
    their first layer's weights, as torch has them.
    """
    import jax
    import jax.numpy as jnp

    def array(tensor: torch.Tensor) -> Any:
        return jnp.asarray(tensor.cpu().numpy())

    upper = problem.init_upper(torch.Generator().manual_seed(0))
    kernels = [array(t).transpose(2, 3, 1, 0) for t in upper.values() if t.ndim == 4]
    norms = [(jnp.ones(k.shape[-1]), jnp.zeros(k.shape[-1])) for k in kernels]
    data = {
        name: array(t.movedim(2, -1)) if t.ndim == 5 else array(t)
        for name, t in problem.batch.items()
    }
    ways = problem.ways

    def features(x: Any, images: Any) -> Any:
        hidden = images
        for kernel, (scale, shift) in x:
            hidden = jax.lax.conv_general_dilated(
                hidden, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            mean, var = hidden.mean((0, 1, 2)), hidden.var((0, 1, 2))
            hidden = (hidden - mean) * jax.lax.rsqrt(var + 1e-5) * scale + shift
            hidden = jax.lax.reduce_window(
                jax.nn.relu(hidden), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
            )
        return hidden.reshape(len(images), -1)

    def ce(logits: Any, labels: Any) -> Any:
        return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()

    def bome_task(x: Any, task: Any) -> Any:
        """The scalar whose gradient in x is a task's direction."""
        shots = len(task["support"])
        z = features(x, jnp.concatenate([task["support"], task["query"]]))
        z = SCALE * z / jnp.linalg.norm(z, axis=1, keepdims=True)
        zs, zq = z[:shots], z[shots:]
        one = jax.nn.one_hot(task["support_labels"], ways)
        prior = (zs.T @ one) / one.sum(0)

        def g(w: Any, zs: Any, prior: Any) -> Any:
            return ce(zs @ w, task["support_labels"]) + RHO / 2 * ((w - prior) ** 2).sum()

        def f(w: Any, zq: Any) -> Any:
            return ce(zq @ w, task["query_labels"])

        held = jax.lax.stop_gradient((zs, prior, zq))

        def down(w: Any, steps: int) -> Any:
            return jax.lax.fori_loop(
                0, steps, lambda _, w: w - LR * jax.grad(g)(w, held[0], held[1]), w
            )

        def barrier(w: Any) -> Any:
            df, dg = jax.grad(f)(w, held[2]), jax.grad(g)(w, held[0], held[1])
            square = (dg**2).sum()
            ratio = 0.5 - (df * dg).sum() / jnp.where(square > 0, square, 1.0)
            lam = jnp.where(square > 0, jnp.maximum(ratio, 0.0), 0.0)
            return df + lam * dg, lam

        def lower(_: int, w: Any) -> Any:
            direction, lam = barrier(w)
            return w - LR / (1 + lam) * direction

        at = down(held[1], ADAPT)
        solved = down(at, INNER_STEPS)
        at = jax.lax.stop_gradient(jax.lax.fori_loop(0, BARRIER, lower, at))
        solved, lam = jax.lax.stop_gradient((solved, barrier(at)[1]))
        return f(at, zq) + lam * (g(at, zs, prior) - g(solved, zs, prior))

    def anil_task(x: Any, task: Any) -> Any:
        body, head = x
        support, query = features(body, task["support"]), features(body, task["query"])

        def loss(head: Any) -> Any:
            return ce(support @ head[0] + head[1], task["support_labels"])

        for _ in range(INNER_STEPS):
            head = jax.tree.map(lambda w, d: w - LR * d, head, jax.grad(loss)(head))
        return ce(query @ head[0] + head[1], task["query_labels"])

    def maml_task(x: Any, task: Any) -> Any:
        def loss(x: Any, part: str) -> Any:
            body, head = x
            z = features(body, task[part])
            return ce(z @ head[0] + head[1], task[f"{part}_labels"])

        y = x
        for _ in range(INNER_STEPS):
            y = jax.tree.map(lambda w, d: w - LR * d, y, jax.grad(loss)(y, "support"))
        return loss(y, "query")

    body = list(zip(kernels, norms, strict=True))
    width = features(body, data["support"][0]).shape[1]
    whole = (body, (jnp.zeros((width, ways)), jnp.zeros(ways)))

    def step_of(task_loss: Any, x: Any) -> Peer:
        @jax.jit
        def moved(x: Any) -> Any:
            def mean(x: Any) -> Any:
                return jax.vmap(task_loss, (None, 0))(x, data).mean()

            return jax.tree.map(lambda w, d: w - 1e-3 * d, x, jax.grad(mean)(x))

        state = [x]

        def step() -> None:
            state[0] = jax.block_until_ready(moved(state[0]))

        def kernel() -> torch.Tensor:
            found = np.array(jax.tree.leaves(state[0])[0])
            return torch.from_numpy(found).permute(3, 2, 0, 1)

        return step, kernel

    return {
        "prototype": step_of(bome_task, body),
        "anil": step_of(anil_task, whole),
        "maml": step_of(maml_task, whole),
    }
