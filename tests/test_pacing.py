"""Steps in which x stands still: a warm start of y on g alone, and several moves of y to one of x. Each
solver against plain scripts, and against the same solver without these steps where they come to the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import DIM, SAMPLES, Drawn, Plain, grad, leaf
from quadratics import Synthetic
from toy import Bench, attached

import bomemeta
from bomemeta.assembly import trainer_of
from bomemeta.checkpoint import upper_sha256
from bomemeta.distributed import cluster
from bomemeta.errors import ConfigError
from bomemeta.metrics import read_metrics
from bomemeta.registry import solvers
from bomemeta.solvers.pacing import Paced

LR = 0.1
# Not what other tests have registered.
OURS = [name for name in solvers.names() if solvers.get(name).__module__.startswith("bomemeta.")]
PACED = [name for name in OURS if issubclass(solvers.get(name), Paced)]
# Solvers whose y only follows g: their steps without x are inner steps of the next one with x.
FOLLOWERS = ["ctn", "stocbio", "aid_cg", "aid_neumann", "amigo_cg", "amigo_gd", "subbio", "f2sa"]


def options(name: str, **more: Any) -> dict[str, Any]:
    found = {"inner_steps": 2, "inner_lr": LR, "lower_lr": LR, "upper_lr": 0.05}
    found |= {"sl_bamm": {"schedule": "constant", "mu": 0.5}}.get(name, {})
    found |= {"lancbio": {"subspace": 3}}.get(name, {})
    return {k: v for k, v in found.items() if k in solvers.get(name).__dataclass_fields__} | more


def bench(name: str, problem: Any, steps: int, **more: Any) -> Bench:
    return Bench(problem, solvers.get(name)(**options(name, **more)), steps)


def whole() -> Drawn:
    """Every step's batch is all the data."""
    return Drawn(size=SAMPLES)


def start_of_y() -> torch.Tensor:
    return torch.full((DIM,), 0.5, dtype=torch.float64)


def test_which_solvers_have_the_keys() -> None:
    assert set(PACED) >= {*FOLLOWERS, "bome", "itd", "vpbgd", "soba", "sl_bamm", "lancbio"}
    assert not {"maml", "anil", "lower_only", "agem"} & set(PACED)


@pytest.mark.parametrize("name", PACED)
def test_a_warm_start_is_sgd_on_g_over_the_steps_own_batches(name: str) -> None:
    problem = Drawn()
    found = bench(
        name, problem, 6, warm_start_steps=3, **({"subspace": 1} if name == "lancbio" else {})
    )
    x, y = found.x().clone(), start_of_y()
    for step in range(3):
        at = leaf(y)
        value = Plain(problem, step).g(x, at)
        (slope,) = grad(value, at)
        y = y - LR * slope
        metrics = found.advance().metrics
        assert metrics["upper_steps"] == 0
        assert metrics["lower_loss"] == pytest.approx(float(value.detach()), rel=1e-12)
        assert "learning_rate" not in metrics
        assert torch.equal(found.x(), x)
        assert torch.allclose(found.y(), y, rtol=1e-12)
    metrics = found.advance().metrics
    assert metrics["upper_steps"] == 1
    assert metrics["learning_rate"] == pytest.approx(0.05)


@pytest.mark.parametrize("name", PACED)
@pytest.mark.parametrize("kind", ["shared", "tasks"])
def test_after_a_warm_start_the_run_is_one_from_that_y(name: str, kind: str) -> None:
    """Schedules, penalties and what is measured now and then begin there: with the bits of a run that is
    given that y.
    """
    more: dict[str, Any] = {"upper_schedule": "cosine", "upper_warmup_steps": 2}

    def problem() -> Any:
        return (
            whole()
            if kind == "shared"
            else attached(Synthetic(tasks=3, dim_lower=5, dim_upper=4, condition=5.0))
        )

    warm = bench(name, problem(), 7, warm_start_steps=2, **more)
    plain = bench(name, problem(), 5, **more)
    warm.advance()
    plain.lower = warm.advance().lower
    for _ in range(5):
        mine, theirs = warm.advance().metrics, plain.advance().metrics
        assert mine.pop("upper_steps") == plain.step
        assert mine == theirs
        assert torch.equal(warm.x(), plain.x())
        assert torch.equal(warm.y(), plain.y())


@pytest.mark.parametrize("name", FOLLOWERS)
def test_steps_between_are_inner_steps_of_the_next(name: str) -> None:
    """Where y follows g (f2sa: y and z f + l g and g), `upper_every` 3 of 2 inner steps is one of 6: on
    the full batch the same numbers.
    """
    paced, plain = bench(name, whole(), 9, upper_every=3), bench(name, whole(), 3, inner_steps=6)
    for _ in range(3):
        before = paced.x().clone()
        for _ in range(2):
            paced.advance()
            assert torch.equal(paced.x(), before)
        paced.advance()
        plain.advance()
        assert torch.allclose(paced.x(), plain.x(), rtol=1e-12)
        assert torch.allclose(paced.y(), plain.y(), rtol=1e-12)


@pytest.mark.parametrize("phi", ["grad_norm", "gap"])
def test_bome_between_is_its_barrier_in_y_alone(phi: Any) -> None:
    problem = Drawn()
    found = bench("bome", problem, 4, upper_every=4, phi=phi, barrier="global", eta=0.5)
    x, y = found.x().clone(), start_of_y()
    for step in range(3):
        plain, at = Plain(problem, step), leaf(y)
        (of_f,), (of_g,) = grad(plain.f(x, at), at), grad(plain.g(x, at), at)
        solved = y
        for _ in range(2):
            point = leaf(solved)
            solved = solved - LR * grad(plain.g(x, point), point)[0]
        square = (of_g**2).sum()
        gap = (plain.g(x, y) - plain.g(x, solved)).clamp_min(0)
        target = 0.5 * (square if phi == "grad_norm" else gap)
        weight = ((target - (of_f * of_g).sum()) / square).clamp_min(0)
        y = y - LR * (of_f + weight * of_g)
        assert found.advance().metrics["multiplier"] == pytest.approx(float(weight), rel=1e-9)
        assert torch.allclose(found.y(), y, rtol=1e-10)
        assert torch.equal(found.x(), x)


def test_vpbgd_between_moves_z_and_y() -> None:
    problem = Drawn()
    found = bench("vpbgd", problem, 4, upper_every=4, penalty=2.0)
    x, y, z = found.x().clone(), start_of_y(), start_of_y()
    for step in range(3):
        plain = Plain(problem, step)
        for _ in range(2):
            at = leaf(z)
            z = z - LR * grad(plain.g(x, at), at)[0]
        at = leaf(y)
        y = y - LR * grad(plain.f(x, at) + 2 * plain.g(x, at), at)[0]
        found.advance()
        assert torch.allclose(found.y(), y, rtol=1e-10)
    row = torch.tensor(found.lower.handles[0])
    assert torch.allclose(row[DIM:], z - y, rtol=1e-9)  # y, then z - y


@pytest.mark.parametrize(("name", "mu"), [("soba", 0.0), ("sl_bamm", 0.5)])
def test_single_loops_move_y_and_v_between(name: str, mu: float) -> None:
    """v enters x's next step: compared there, by its closed form."""
    problem, steps = whole(), 3
    more = {"aux_lr": LR} if name == "soba" else {"aux_lr": LR, "order": "jacobi"}
    found = bench(name, problem, steps, upper_every=3, **more)
    plain, x, y, v = Plain(problem, 0), found.x().clone(), start_of_y(), torch.zeros(DIM).double()
    for step in range(steps):
        px, at = leaf(x), leaf(y)
        f, psi = plain.f(px, at), mu * plain.f(px, at) + (1 - mu) * plain.g(px, at)
        (of_f,) = grad(f, at, graph=True)
        (of_psi,) = grad(psi, at, graph=True)
        image, cross = torch.autograd.grad((of_psi * v).sum(), (at, px))
        y, v = y - LR * of_psi.detach(), v - LR * (image - of_f.detach())
        if step == 2:
            x = x + 0.05 * cross
        found.advance()
        assert torch.allclose(found.x(), x, rtol=1e-10)
        assert torch.allclose(found.y(), y, rtol=1e-10)


def test_itd_goes_back_through_its_last_steps_only() -> None:
    problem = whole()
    found = bench("itd", problem, 2, upper_every=2)
    plain, x, y = Plain(problem, 0), leaf(found.x()), start_of_y()
    for _ in range(2):
        at = leaf(y)
        y = y - LR * grad(plain.g(x.detach(), at), at)[0]
    at = leaf(y)
    for _ in range(2):
        at = at - LR * grad(plain.g(x, at), at, graph=True)[0]
    (direction,) = grad(plain.f(x, at), x)
    found.finish()
    assert torch.allclose(found.x(), x.detach() - 0.05 * direction, rtol=1e-10)


def test_lancbio_keeps_its_basis_between() -> None:
    """The Krylov space grows with the steps of x: y is as after `inner_steps` 6, the space as after 2."""
    paced, plain = (
        bench("lancbio", whole(), 6, upper_every=3),
        bench("lancbio", whole(), 2, inner_steps=6),
    )
    paced.finish()
    plain.finish()
    assert torch.allclose(paced.x(), plain.x(), rtol=1e-10)
    size = torch.tensor(paced.lower.handles[0]) - torch.tensor(plain.lower.handles[0])
    assert float(size.abs().max()) < 1e-9


def test_an_optimiser_of_y_continues_through_all_of_them() -> None:
    """adam's count of steps is that of y's, with x or without."""
    problem = whole()
    found = bench("bome", problem, 5, warm_start_steps=2, upper_every=3, lower_optimizer="adam")
    found.finish()
    layout = [(group, name) for group, name, _ in found.lower.layout]
    sizes = [torch.Size(shape).numel() for *_, shape in found.lower.layout]
    place = layout.index(("adam", "steps"))
    assert float(found.lower.handles[0][sum(sizes[:place])]) == 5


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("bome", {"warm_start_steps": 5}, r"first does in step 6 .* the run has 5"),
        ("amigo_cg", {"warm_start_steps": 2, "upper_every": 4}, r"first does in step 6"),
        ("itd", {"warm_start": False, "upper_every": 2}, r"solver\.warm_start: got false"),
    ],
)
def test_what_would_never_move_x_is_refused(name: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(name, whole(), 5, **keys)


@pytest.mark.parametrize("name", ["bome", "lancbio"])
def test_fresh_tasks_are_refused(name: str) -> None:
    for key, value in {"warm_start_steps": 1, "upper_every": 2}.items():
        solver = solvers.get(name)(**{key: value})
        with pytest.raises(ConfigError, match=rf"solver\.{key}: got {value}"):
            solver.check(Fresh())


class Fresh(Drawn):
    num_tasks = None  # type: ignore[assignment]


SMALL = [
    "problem.width=8", "problem.layers=1", "problem.heads=2", "problem.context=8", "problem.sequences=2",
    "problem.target_sequences=4", "problem.test_sequences=6", "data.domain_bytes=5000", "log.tensorboard=false",
    "solver.warm_start_steps=2", "solver.upper_every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """One for both runs, which join it: a cluster takes seconds to start."""
    with cluster.local(cluster.RayOptions(workers=2, cpus_per_worker=0.5), print):
        yield


@pytest.mark.parametrize("name", ["bome", "amigo_cg"])
def test_the_bits_are_those_of_ray_and_of_a_resumed_run(
    name: str, ray_cluster: None, tmp_path: Path
) -> None:
    solver = ["solver.inner_lr=0.5", "solver.lower_optimizer=adam"]
    solver += (
        ["solver.inner_optimizer=momentum", "solver.inner_momentum=0.5"] if name == "bome" else []
    )

    def run(where: str, *keys: str) -> bomemeta.Result:
        return bomemeta.train(
            "mixing_quickstart",
            [f"solver={{name: {name}}}", *SMALL, *solver, f"output_dir={tmp_path / where}", *keys],
        )

    straight = run("serial", "steps=7", "workers=0")
    there = run("ray", "steps=7", "workers=2", "cpus_per_worker=0.5")
    assert there.upper_sha256 == straight.upper_sha256
    assert resumed(straight) == [straight.upper_sha256] * 2


def resumed(straight: bomemeta.Result) -> list[str]:
    """The run's x where it resumes from checkpoints within the warm start and between two steps of x."""
    assert straight.config is not None
    found = []
    for cut in (1, 5):
        with trainer_of(straight.config) as first, trainer_of(straight.config) as second:
            first.advance(cut)
            second.restore(first.checkpoint())
            second.advance(7)
            found.append(upper_sha256(dict(second.state.upper.params)))
    return found


@pytest.mark.parametrize("name", ["bome", "amigo_cg"])
def test_doctor_counts_the_steps_without_x_as_a_run_has_them(name: str, tmp_path: Path) -> None:
    keys = [f"solver={{name: {name}}}", *SMALL, "solver.inner_lr=0.5", "steps=9", "workers=0"]
    report = bomemeta.doctor("mixing_quickstart", overrides=keys)
    kinds = report.values["steps_without_x"]
    assert [kind["steps"] for kind in kinds.values()] == [2, 4]
    assert any("x moves in 3 of 9 steps" in finding.text for finding in report.findings)
    done = bomemeta.train("mixing_quickstart", [*keys, f"output_dir={tmp_path / 'run'}"])
    assert done.run_dir is not None
    lines = read_metrics(done.run_dir / "metrics.jsonl")
    for kind, step in zip(kinds.values(), (1, 4), strict=True):
        # A dry step has all blocks in one shard; the run has two.
        assert kind["reduces"] == lines[step]["reduces"]
        assert 2 * kind["bytes_reduced"] == lines[step]["bytes_reduced"]
        assert kind["step_s"] > 0
    assert report.values["traffic"]["up"] == lines[3]["bytes_reduced"]
