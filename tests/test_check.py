"""`bomemeta check`: closed forms are found, each kind of mistake gets its verdict, and the advice
is what cures it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from quadratics import SharedSynthetic
from toy import attached, one_thread
from typer.testing import CliRunner, Result

import bomemeta
from bomemeta.cli import app
from bomemeta.config import load_config
from bomemeta.core import tree
from bomemeta.core.inner import gradient_steps
from bomemeta.core.problem import LossGradient, Problem
from bomemeta.core.solver import LowerStates, StepResult
from bomemeta.core.upper import UpperVariable
from bomemeta.errors import CheckpointError, ConfigError
from bomemeta.hypercheck import CheckReport, check, kernels
from bomemeta.hypercheck.frozen import FrozenUpper, settle
from bomemeta.problems.analytic import Analytic
from bomemeta.registry import problems, solvers
from bomemeta.solvers.subbio import SubBiO
from bomemeta.solvers.upper_options import UpperOptions

LANCBIO = {"name": "lancbio", "inner_steps": 5, "inner_lr": 0.5, "subspace": 4}
SUBBIO = {"name": "subbio", "inner_steps": 5, "inner_lr": 0.5, "aux_lr": 0.5}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    with one_thread():
        yield


def quadratic(**fields: object) -> dict[str, object]:
    return {"name": "analytic", "case": "quadratic", "condition": 4.0, **fields}


def run(problem: dict[str, object], solver: dict[str, object], **options: object) -> CheckReport:
    config = {"problem": problem, "solver": solver, "steps": 10}
    if problem["name"] == "few_shot":
        config["data"] = {"dataset": "toy"}
    return check(config, **{"directions": 1, **options})


def message(report: CheckReport) -> str:
    return "\n".join([report.headline, *report.notes])


# Small problems with one mistake each, and solvers that are wrong in one way each.


@problems.register("check_toy")
@dataclass(kw_only=True)
class Small(Problem):
    """g = |y - x|^2 / 2, f = |y - 2|^2 / 2: y* = x, and the hypergradient is x - 2."""

    kind: Literal["honest", "detached", "closed_form", "unbounded", "stationary", "unrelated"] = (
        "honest"
    )

    @property
    def num_tasks(self) -> int:
        return 1

    def init_upper(self, generator: torch.Generator):
        return {"x": torch.ones(2, dtype=self.dtype)}

    def load(self, task_ids: Sequence[int], step: int, split: str):
        return {"task": torch.tensor(list(task_ids))}

    def init_lower(self, encoded, batch):
        return {"y": encoded["x"].new_zeros(2)}

    def upper_loss(self, encoded, lower, batch):
        loss = ((lower["y"] - 2) ** 2).sum() / 2
        return loss + encoded["x"].sum() if self.kind == "stationary" else loss

    def lower_loss(self, encoded, lower, batch):
        x, y = encoded["x"], lower["y"]
        if self.kind == "unrelated":
            x = torch.zeros_like(x)
        loss = ((y - (x.detach() if self.kind == "detached" else x)) ** 2).sum() / 2
        if self.kind == "unbounded":
            return y.sum() + 0 * loss
        return loss

    def loss_gradient(self, loss, encoded, lower, batch, in_encoded):
        if self.kind != "closed_form" or loss == "upper" or in_encoded:
            return None
        difference = lower["y"] - encoded["x"]
        return LossGradient((difference**2).sum(1) / 2, {"y": 1.1 * difference}, {})


@solvers.register("check_flipped")
@dataclass(frozen=True, kw_only=True)
class Flipped(SubBiO):
    """SubBiO uphill."""

    def step(self, upper, lower, run):
        inner = FrozenUpper(upper.params)
        result = super().step(inner, lower, run)
        upper.move(tree.unflatten(-inner.heard, upper.params), run.step, run.project_upper)
        return result


@solvers.register("check_silent")
@dataclass(frozen=True, kw_only=True)
class Silent(UpperOptions):
    """Never moves x."""

    def adapt(self, oracle, steps):
        return gradient_steps(oracle, oracle.init_lower(), 1, 0.1)

    def step(self, upper, lower, run):
        return StepResult(LowerStates.none(), {})


def test_reference_and_finite_differences_are_the_closed_form() -> None:
    report = run(quadratic(tasks=3), LANCBIO, tasks=3, directions=2)
    problem = attached(Analytic(case="quadratic", tasks=3, condition=4.0))
    x = problem.init_upper(torch.Generator().manual_seed(0))["x"]
    a, b, t = (problem._data[name] for name in ("A", "B", "t"))
    y = torch.linalg.solve(a, (x @ b)[..., None])[..., 0]
    v = torch.linalg.solve(a, (y - t)[..., None])
    exact = problem.ridge * x + (b @ v).mean(0)[:, 0]
    # Both solves are exact to rounding times the condition, 4.
    torch.testing.assert_close(
        torch.tensor(report.numbers["reference"]["direction"], dtype=torch.float64),
        exact,
        rtol=1e-11,
        atol=0,
    )
    assert report.numbers["reference"]["smallest"] == pytest.approx(0.25, rel=1e-9)
    assert report.numbers["reference"]["largest"] == pytest.approx(1.0, rel=1e-9)
    along = report.numbers["finite_differences"]
    assert [one["along"] for one in along] == ["reference", "random 1", "random 2"]
    # Phi is quadratic, so rounding alone is left: 1e-16 |Phi| over a step of about 1e-4.
    assert all(
        one["found"] == pytest.approx(one["implicit"], rel=1e-6, abs=1e-8) and one["error"] < 1e-6
        for one in along
    )


@pytest.mark.parametrize(
    "solver",
    [
        LANCBIO,
        {**LANCBIO, "warmup_steps": 2},
        SUBBIO,
        {"name": "itd", "inner_steps": 80, "inner_lr": 0.5},
    ],
)
def test_good_solvers_are_ok(solver: dict[str, object]) -> None:
    report = run(quadratic(), solver)
    assert (report.verdict, report.notes) == ("OK", [])
    # Settled to 1e-6 a step, which still shrinks by a tenth or more from step to step.
    assert report.numbers["relative_error"] < 1e-4


def test_bome_with_a_long_inner_loop_and_a_large_multiplier_is_ok() -> None:
    # The error is of the order of 1 / lambda, and lambda of the order of eta.
    solver = {"name": "bome", "inner_steps": 8, "inner_lr": 0.9, "lower_lr": 0.01, "eta": 50.0}
    assert run(quadratic(condition=2.0), solver).verdict == "OK"


def test_bome_with_a_short_inner_loop_is_poor_and_told_how_long_it_has_to_be() -> None:
    solver = {"name": "bome", "inner_steps": 1, "inner_lr": 0.01, "lower_lr": 0.01, "eta": 50.0}
    report = run(quadratic(condition=100.0), solver, settle_steps=3)
    assert report.verdict == "POOR"
    # 1 - (1 - 0.01 / 100)^T = 0.95, and with alpha = 1 the power of 0.99
    assert "solver.inner_steps=29956, or solver.inner_steps=299 with solver.inner_lr=1" in message(
        report
    )
    assert "T is too small" in message(report)
    keys = [set(trial["changes"]) for trial in report.numbers["trials"]]
    assert {"inner_steps"} in keys
    assert {"inner_steps", "inner_lr"} in keys
    assert "bome keeps lambda" in message(report)


def test_the_advised_inner_loop_cures() -> None:
    report = run(
        quadratic(condition=20.0),
        {"name": "itd", "inner_steps": 2, "inner_lr": 0.5},
        settle_steps=5,
    )
    assert report.verdict == "POOR"
    assert "what T inner steps see of the reference" in message(report)
    best = report.numbers["trials"][-1]
    assert list(best["changes"]) == ["inner_steps"]
    assert best["error"] < 0.1 < report.numbers["relative_error"]
    assert (
        f"Run again with solver.inner_steps={best['changes']['inner_steps']}: relative error"
        in report.headline
    )
    cured = run(
        quadratic(condition=20.0),
        {"name": "itd", "inner_lr": 0.5, **best["changes"]},
        settle_steps=5,
    )
    assert cured.verdict == "OK"


@pytest.mark.parametrize("most", [0, 1])
def test_trials_with_other_keys_can_be_bounded(most: int) -> None:
    solver = {"name": "itd", "inner_steps": 2, "inner_lr": 0.5}  # more than one trial helps it
    report = run(quadratic(condition=20.0), solver, settle_steps=5, trials=most)
    assert report.verdict == "POOR"
    assert len(report.numbers["trials"]) == most


def test_too_small_a_subspace_is_named() -> None:
    few_shot = {"name": "few_shot", "ways": 3, "queries": 2, "width": 4, "regularisation": 0.01}
    solver = {"name": "lancbio", "inner_steps": 400, "inner_lr": 0.3, "subspace": 1}
    report = run(few_shot, solver, tasks=1)
    assert report.verdict == "POOR"
    assert "y is not the reason" in message(report)
    assert "solver.subspace = 1" in message(report)
    assert "Run again with solver.subspace=4" in report.headline


def test_a_step_beyond_stability_is_named() -> None:
    report = run(quadratic(), {**LANCBIO, "inner_lr": 50.0})
    assert report.verdict == "UNDECIDED"
    assert "not finite" in report.headline
    assert "run again with solver.inner_lr=1" in message(report)
    assert "not below 2 / L = 2" in message(report)


def test_a_flipped_sign_is_wrong() -> None:
    report = run(quadratic(), {**SUBBIO, "name": "check_flipped"})
    assert report.verdict == "WRONG"
    assert report.numbers["cosine"] == pytest.approx(-1)
    assert "see whether the formula is right" in report.headline


def test_a_solver_that_never_moves_x_is_undecided() -> None:
    assert "did not call upper.move" in run(quadratic(), {"name": "check_silent"}).headline


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_shared_lower_problem(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(problems._classes, "check_shared", SharedSynthetic)
    problem = {
        "name": "check_shared",
        "tasks": blocks,
        "dim_upper": 4,
        "dim_lower": 12,
        "condition": 10.0,
        "pull": 2.0,
    }
    solver = {"name": "lancbio", "inner_steps": 10, "inner_lr": 0.15, "subspace": 12}
    report = run(problem, solver)
    exact = attached(
        SharedSynthetic(tasks=blocks, dim_upper=4, dim_lower=12, condition=10.0, pull=2.0)
    ).hypergradient(torch.zeros(4).double())
    torch.testing.assert_close(
        torch.tensor(report.numbers["reference"]["direction"], dtype=torch.float64),
        exact,
        rtol=1e-9,
        atol=0,
    )
    assert (report.verdict, report.numbers["tasks"]) == ("OK", blocks)


def test_analytic_cases() -> None:
    assert (
        run({"name": "analytic", "case": "coreset"}, {**LANCBIO, "inner_lr": 0.4}).verdict == "OK"
    )
    bome = {"name": "bome", "inner_steps": 3}
    degenerate = run({"name": "analytic", "case": "degenerate"}, bome, settle_steps=5)
    assert degenerate.verdict == "UNDECIDED"
    assert "singular" in degenerate.headline
    minimax = run({"name": "analytic", "case": "minimax"}, bome, settle_steps=5)
    assert minimax.verdict == "UNDECIDED"
    assert "edge of its admissible set" in minimax.headline


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("detached", "finite differences give"),
        ("closed_form", "differs from autograd's by 9"),
        ("unbounded", "was not solved"),
        ("stationary", "x is stationary"),
        ("unrelated", "x enters no loss"),
    ],
)
def test_what_is_wrong_with_a_problem_is_said(kind: str, reason: str) -> None:
    report = run({"name": "check_toy", "kind": kind}, LANCBIO, settle_steps=20)
    assert report.verdict == "UNDECIDED"
    assert reason in message(report)


def test_the_same_problem_without_a_mistake_is_ok() -> None:
    assert run({"name": "check_toy"}, LANCBIO).verdict == "OK"


def test_a_lower_variable_that_starts_at_its_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Small, "init_lower", lambda self, encoded, batch: {"y": encoded["x"].clone()}
    )
    assert run({"name": "check_toy"}, LANCBIO).verdict == "OK"


def test_fresh_few_shot_tasks() -> None:
    problem = {"name": "few_shot", "ways": 3, "queries": 2, "width": 4}
    report = run(problem, {"name": "lancbio", "inner_steps": 30, "inner_lr": 0.2, "subspace": 10})
    assert (report.verdict, report.numbers["tasks"], report.numbers["solver"]["steps"]) == (
        "OK",
        2,
        1,
    )
    # regularisation 1 is the smallest curvature: the head has more numbers than there are support
    # images
    assert report.numbers["reference"]["smallest"] == pytest.approx(1, rel=1e-6)


def test_a_schedule_is_checked_at_the_step_it_is_told() -> None:
    solver = {"name": "sl_bamm", "schedule": "s1", "p": 1.0, "lower_lr": 0.5, "aux_lr": 0.5}
    first, last = (run(quadratic(), solver, at_step=step, directions=0).numbers for step in (0, 9))
    assert (first["solver"]["metrics"]["mu"], last["solver"]["metrics"]["mu"]) == (
        0.9,
        pytest.approx(0.09),
    )
    assert last["relative_error"] < first["relative_error"]


def test_x_stands_still_while_the_solver_is_asked() -> None:
    upper = {"x": torch.ones(2, dtype=torch.float64)}
    frozen = FrozenUpper(upper)
    metrics = frozen.move({"x": torch.full((2,), 3.0)}, 0, lambda x: x)
    assert frozen.params["x"].tolist() == [1, 1]
    assert frozen.heard.tolist() == [3, 3]
    assert metrics["upper_update_norm"] == 0


class Alternating(UpperOptions):
    """0 in the first two steps, then 1 +- 0.5."""

    def step(self, upper: UpperVariable, lower: LowerStates, run) -> StepResult:
        self.asked.append(1)
        count = len(self.asked)
        upper.move(
            {"x": torch.tensor([0.0 if count <= 2 else 1 + 0.5 * (-1) ** count])}, 0, lambda x: x
        )
        return StepResult(LowerStates.none(), {})


def test_a_direction_that_does_not_settle_is_averaged_and_warm_up_left_out() -> None:
    solver = Alternating()
    object.__setattr__(solver, "asked", [])

    class Persistent:
        persistent = True
        tasks, step, steps = 1, 0, 18
        project_upper = staticmethod(lambda x: x)

    settled = settle(solver, {"x": torch.zeros(1)}, Persistent(), 18)  # type: ignore[arg-type]
    assert settled.steps == 18
    assert settled.direction.tolist() == [1.0]  # the last 4 of 16
    assert settled.spread == pytest.approx(0.5)


def test_ritz_values_and_conjugate_gradients() -> None:
    values = torch.linspace(-1, 5, 20, dtype=torch.float64)
    start = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, error = kernels.ritz_values(lambda u: values * u, start, 100)
    torch.testing.assert_close(found, values, rtol=0, atol=1e-10)
    assert error < 1e-10
    positive = values + 2
    v, steps = kernels.conjugate_gradients(lambda u: positive * u, start, 100, 1e-12)
    torch.testing.assert_close(v, start / positive, rtol=1e-9, atol=0)
    assert 10 < steps <= 25
    near = kernels.conjugate_gradients(lambda u: positive * u, start, 100, 0.0, goal=v)
    assert (near.v - v).norm() <= 0.01 * v.norm()
    assert near.steps < steps
    assert not kernels.conjugate_gradients(
        lambda u: -u, start, 100, 1e-12
    ).v.any()  # no positive curvature: no step


# The command


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check", *arguments])


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    solver = "solver: {name: lancbio, inner_steps: 5, inner_lr: 0.5, subspace: 4}\n"
    path.write_text(
        f"problem: {{name: analytic, case: quadratic, condition: 4.0}}\n{solver}steps: 3\n"
    )
    return str(path)


def test_command_says_ok_and_writes_json(config: str, tmp_path: Path) -> None:
    result = invoke(config, "--directions", "0", "--json", str(tmp_path / "numbers.json"))
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split(maxsplit=1)[1] == "lancbio on analytic: 1 task, 3 numbers in x, step 0"
    assert lines[-1].startswith("OK: relative error ")
    assert "finite differences along reference" in result.stderr
    written = json.loads((tmp_path / "numbers.json").read_text())
    assert (written["verdict"], len(written["reference"]["direction"])) == ("OK", 3)
    assert written["finite_differences"][0]["along"] == "reference"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers.json", "small.yaml"]


def test_command_exits_with_1_unless_ok(config: str, tmp_path: Path) -> None:
    result = invoke(config, "solver.inner_lr=50", "--json", str(tmp_path / "numbers.json"))
    assert (result.exit_code, result.stdout.count("UNDECIDED: ")) == (1, 1)
    assert json.loads((tmp_path / "numbers.json").read_text())["relative_error"] is None
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["solver.inner_step=3"], "Did you mean solver.inner_steps?"),
        (["--tasks", "0"], "--tasks"),
        (["--at-step", "3"], "--at-step: got 3, wanted 0 to 2"),
        (["--run", "nowhere"], "is not a run's folder"),
        (["--json", "no/such/folder.json", "--directions", "0"], "cannot be written"),
    ],
)
def test_command_refuses_what_it_cannot_do(config: str, arguments: list[str], message: str) -> None:
    result = invoke(config, *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_x_of_a_run(config: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trained = bomemeta.train(config, [f"output_dir={folder}"])
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    report = check(config, run_dir=folder, directions=0)
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    assert (report.verdict, report.numbers["step"]) == ("OK", 2)
    problem: Analytic = load_config(config).problem
    problem.attach(seed=0, dtype=torch.float64)
    a, b, t = (problem._data[name][0] for name in ("A", "B", "t"))
    x = trained.upper["x"].double()
    exact = problem.ridge * x + b @ torch.linalg.solve(a, torch.linalg.solve(a, x @ b) - t)
    found = torch.tensor(report.numbers["reference"]["direction"], dtype=torch.float64)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=0)
    with pytest.raises(CheckpointError, match="another shape"):
        check(config, ["problem.dim_upper=4"], run_dir=folder)


def test_wrong_arguments_are_refused(config: str) -> None:
    with pytest.raises(ConfigError, match="--tasks: got 0"):
        check(config, tasks=0)


def test_a_streams_memory_is_part_of_what_is_checked() -> None:
    """Soft targets and stored logits are in the batch as they are in training."""
    report = check(
        "continual_quickstart",
        [
            "problem.samples_per_task=20",
            "problem.hidden=2",
            "problem.layers=1",
            "problem.embedding=2",
        ],
        settle_steps=2,
        directions=0,
    )
    assert report.numbers["solver"]["steps"] == 2
