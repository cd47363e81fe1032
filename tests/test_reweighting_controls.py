"""The controls of problem `reweighting`: each is what it says, on a small configuration, against plain
PyTorch; and the table.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import yaml
from torch.func import functional_call
from torch.nn import functional

from bomemeta.assembly import build_problem, trainer_of
from bomemeta.config import load_config

SMALL: dict[str, Any] = {
    "problem": {"name": "reweighting", "clean": 30, "network": "mlp", "width": 4, "batch": 6, "clean_batch": 5, "noise": 0.3,
                "decay": 0.01},
    "imports": [toy.__file__],
    "data": {"dataset": "toy_labelled"},
    "solver": {"name": "itd", "inner_steps": 2, "inner_lr": 0.2, "upper_lr": 50.0},
    "steps": 6, "shards": 2, "dtype": "float64",
}  # fmt: skip
STEPS, EVERY, FINE = 6, 2, 3


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))


def descended(problem: Any, y: Any, steps: int, lr: float, clean: bool) -> Any:
    """Plain SGD over the same batches, two steps on each step's batch."""
    net = problem.build().double()
    for step in range(steps):
        blocks = [
            {name: tensor[0] for name, tensor in problem.load([block], step, "train").items()}
            for block in range(problem.blocks)
        ]
        for _ in range(2):
            y = {name: tensor.detach().requires_grad_() for name, tensor in y.items()}
            losses = []
            for batch in blocks:
                inputs, labels, scale = (
                    batch[f"clean_{name}" if clean else name]
                    for name in ("inputs", "labels", "scale")
                )
                each = functional.cross_entropy(
                    functional_call(net, y, (inputs,)), labels, reduction="none"
                )
                losses.append((scale * each).sum())
            square = sum((tensor**2).sum() for tensor in y.values())
            loss = torch.stack(losses).mean() + 0.01 / 2 * square
            slopes = torch.autograd.grad(loss, list(y.values()))
            y = {name: tensor - lr * g for (name, tensor), g in zip(y.items(), slopes, strict=True)}
    return {name: tensor.detach() for name, tensor in y.items()}


def test_each_control_is_what_it_says() -> None:
    from benchmarks.reweighting import Plan, Record, of_seed, summaries

    runs = of_seed(SMALL, [], 0, Plan(STEPS, STEPS, EVERY, FINE, 0.05), Record())
    problem: Any = build_problem(load_config(SMALL, ["seed=0"]))
    start = problem.init_lower({}, {"scale": torch.zeros(1, dtype=torch.float64)})
    plain = descended(problem, start, STEPS, 0.2, clean=False)
    wanted = {
        "plain": plain,
        "clean": descended(problem, start, STEPS, 0.2, clean=True),
        "fine_tuned": descended(problem, plain, FINE, 0.05, clean=True),
    }
    tests = problem.data.examples("test")
    inputs = (
        tests.rows(torch.arange(30), torch.float64) - problem._moments.mean
    ) / problem._moments.deviation
    for name, y in wanted.items():
        logits = functional_call(problem.build().double(), y, (inputs,))
        last = runs[name][-1]
        loss = functional.cross_entropy(logits, tests.labels)
        assert last["test_loss"] == pytest.approx(float(loss), rel=1e-9), name
        accuracy = (logits.argmax(1) == tests.labels).double().mean()
        assert last["test_accuracy"] == pytest.approx(float(accuracy)), name
    assert runs["fine_tuned"][: len(runs["plain"])] == runs["plain"]
    assert [point["step"] for point in runs["plain"]] == [2, 4, 6]
    assert [point["step"] for point in runs["mwn"]] == [4, 8, 12]  # as many steps of y
    found = summaries(runs)
    best = max(point["clean_accuracy"] for point in runs["plain"])
    chosen = next(point for point in runs["plain"] if point["clean_accuracy"] == best)
    assert found["stopped"]["last_test_accuracy"] == chosen["test_accuracy"]
    assert found["stopped"]["step"] == chosen["step"]
    assert found["clean"]["best_test_loss"] == min(point["test_loss"] for point in runs["clean"])


def test_mwn_is_its_own_config() -> None:
    from benchmarks.reweighting import MWN, Plan, Record, of_seed

    runs = of_seed(SMALL, [], 1, Plan(2, 2, 2, 1), Record())
    keys = [
        "problem.weights=loss_net",
        "solver.inner_steps=1",
        "steps=4",
        "seed=1",
        "workers=0",
        *MWN,
    ]
    with trainer_of(load_config(SMALL, keys)) as trainer:
        from bomemeta.evaluation import own_metrics

        trainer.advance(4)
        last = {name: x for name, x in runs["mwn"][-1].items() if not name.startswith("f1_")}
        assert last == {"step": 4.0, **own_metrics(trainer)}


def test_first_by_a_score_are_as_many_as_are_wrong() -> None:
    from benchmarks.reweighting import SIGNALS, Plan, Record, first_wrong, of_seed, signals_table

    wrong = torch.tensor([True, False, True, False])
    assert first_wrong(torch.tensor([3.0, 2.0, 1.0, 0.0]), wrong) == 0.5
    assert first_wrong(torch.tensor([3.0, 0.0, 1.0, 0.5]), wrong) == 1
    runs = of_seed(SMALL, [], 0, Plan(2, 2, 2, 1), Record())
    # One point: the means are its own.
    for name in ("loss", "weight"):
        assert runs["learned"][-1][f"f1_{name}"] == runs["learned"][-1][f"f1_mean_{name}"]
    assert runs["plain"][-1]["f1_loss"] == runs["plain"][-1]["f1"]
    text = signals_table([runs])
    assert (text.count("| learned |"), text.count("| plain |")) == (len(SIGNALS), 2)


def test_the_table_has_paired_differences(tmp_path: Path) -> None:
    from benchmarks.reweighting import main

    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    steps = [
        "--config",
        str(tmp_path / "small.yaml"),
        "--seeds",
        "2",
        "--steps",
        "2",
        "--every",
        "1",
    ]
    result = main([*steps, "--set", "problem.noise=0.4", "--out", str(tmp_path / "out")])
    written = json.loads((tmp_path / "out" / "table.json").read_text())
    rows = {row["label"]: row for row in written["comparison"]["rows"]["last_test_loss"]}
    assert set(rows) == {"learned", "mwn", "plain", "stopped", "clean", "fine_tuned"}
    seeds = result["seeds"]
    differences = [
        seeds[s]["fine_tuned"]["last_test_loss"] - seeds[s]["learned"]["last_test_loss"]
        for s in (0, 1)
    ]
    found = rows["fine_tuned"]["difference"]["mean"]
    assert found["value"] == pytest.approx(statistics.fmean(differences))
    half = 12.7062 * statistics.stdev(differences) / 2**0.5  # Student's t, one degree of freedom
    assert found["half_width"] == pytest.approx(half, rel=1e-4)
    assert "fine_tuned" in (tmp_path / "out" / "table.md").read_text()


def test_an_ended_run_is_read_and_controls_may_have_more_steps(tmp_path: Path) -> None:
    from benchmarks.reweighting import Plan, Record, of_seed

    file, plan = tmp_path / "curves.json", Plan(2, 4, 1, 1)
    keys = ["solver.upper_lr=40.0"]  # which the runs without a step of x do not get
    found = of_seed(SMALL, keys, 0, plan, Record(file, {"plan": 1}))
    assert [point["step"] for point in found["plain"]] == [2, 4]
    assert [point["step"] for point in found["learned"]] == [1, 2]
    there = json.loads(file.read_text())
    there["curves"]["0"]["mwn"] = [{"read": 1.0}]
    file.write_text(json.dumps(there))
    again = of_seed(SMALL, keys, 0, plan, Record(file, {"plan": 1}))
    assert again == {**found, "mwn": [{"read": 1.0}]}
    with pytest.raises(SystemExit, match=r"--out: .*curves.json was made with .*another folder"):
        Record(file, {"plan": 2})
