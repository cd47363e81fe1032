"""Searches with real Ray Tune: ASHA, PBT, trials with workers of their own, deaths of trials and of
the driver, clusters without room.

The reference is the plain serial run with a trial's config: whatever happened to the trial, x has
its bits.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter
from test_promises import wait_for

import bomemeta
from bomemeta import checkpoint as checkpoints
from bomemeta.checkpoint import upper_sha256
from bomemeta.config import load_config
from bomemeta.errors import ClusterError, ConfigError
from bomemeta.extras import installed
from bomemeta.metrics import RunFolder, read_metrics
from bomemeta.sections import label
from bomemeta.tune.space import KINDS, Domain, flat, read_space
from bomemeta.tune.spec import TuneSettings, load_search
from bomemeta.validation import phrase

ROOT = Path(__file__).parents[1]
DOOMED = str(Path(__file__).with_name("doomed.py"))
STEPS, EVERY = 12, 4
# Lower variables that persist, with momentum: everything that a checkpoint must hold.
BASE: dict[str, Any] = {
    "imports": [DOOMED],
    "problem": {"name": "doomed_analytic", "case": "quadratic", "tasks": 5},
    "solver": {
        "name": "bome", "inner_steps": 4, "upper_optimizer": "momentum", "lower_momentum": 0.5, "upper_lr": 0.03, "lower_lr": 0.05,
    },
    "steps": STEPS, "tasks_per_step": 4, "shards": 3, "dtype": "float64", "cpus_per_worker": 0.5,
}  # fmt: skip
FILE: dict[str, Any] = {
    "base": BASE,
    "space": {"solver.upper_lr": {"loguniform": [1e-3, 1e-1]}},
    "metric": "upper_error",
    "mode": "min",
    "report_every_steps": EVERY,
}


def changed(file: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**file, **changes}


def based(**changes: Any) -> dict[str, Any]:
    """FILE with keys of the base config set, as in problem={"doom_step": 5}."""
    sections = {
        key: {**BASE[key], **value} if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return changed(FILE, base={**BASE, **sections})


def plain(values: dict[str, Any], folder: Path, *overrides: str) -> bomemeta.Result:
    """The undisturbed serial run with a trial's values."""
    texts = [
        f"{key}={json.dumps(value)}"
        for key, value in values.items()
        if not key.startswith("problem.doom")
    ]
    return bomemeta.train(
        BASE, [*texts, f"output_dir={folder}", "log.tensorboard=false", *overrides]
    )


# The space


@pytest.mark.parametrize(
    ("domain", "ends"),
    [
        ({"uniform": [-1, 2.5]}, [-1, 2.5]),
        ({"loguniform": [1e-4, 0.1]}, [1e-4, 0.1]),
        ({"quniform": [0, 1, 0.25]}, [0, 1]),
        ({"randint": [1, 10]}, [1, 9]),
        ({"lograndint": [1, 100]}, [1, 99]),
        ({"choice": ["sgd", 3]}, ["sgd", 3]),
        ({"grid": [True]}, [True]),
    ],
)
def test_ends_of_a_domain(domain: dict[str, Any], ends: list[Any]) -> None:
    wrong: list[Any] = []
    space = read_space({"solver": {"a": domain}, "solver.b": domain}, wrong)
    assert (wrong, set(space)) == ([], {"solver.a", "solver.b"})
    assert space["solver.a"] == space["solver.b"]
    assert space["solver.a"].ends() == ends


def test_every_kind_has_a_test_and_words() -> None:
    assert set(KINDS) == {
        "uniform",
        "loguniform",
        "quniform",
        "randint",
        "lograndint",
        "choice",
        "grid",
    }
    assert all(kind.wanted for kind in KINDS.values())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.1, "got 0.1 (float), wanted one of uniform"),
        ({"log": [1, 2]}, "got 'log' (str), wanted one of uniform"),
        ({"uniform": [1, 2], "grid": [1]}, "wanted one of uniform"),
        ({"uniform": [2, 1]}, "got uniform: [2, 1] (list), wanted [a, b] with a < b"),
        ({"loguniform": [0, 1]}, "wanted [a, b] with 0 < a < b"),
        ({"loguniform": [1]}, "wanted [a, b] with 0 < a < b"),
        ({"uniform": [True, 2]}, "wanted [a, b] with a < b"),
        ({"uniform": [0, math.inf]}, "wanted [a, b] with a < b"),
        ({"randint": [1, 2.5]}, "wanted [a, b] of integers"),
        ({"quniform": [0, 1, 2]}, "0 < q <= b - a"),
        ({"choice": []}, "wanted a list of values"),
        ({"grid": "ab"}, "wanted a list of values"),
    ],
)
def test_a_wrong_domain_names_key_got_and_wanted(value: Any, message: str) -> None:
    wrong: list[Any] = []
    assert read_space({"solver": {"upper_lr": value}, "seed": {"grid": [1]}}, wrong).keys() == {
        "seed"
    }
    ((path, text),) = wrong
    assert path == ("solver", "upper_lr")
    assert text.startswith("space.solver.upper_lr: ")
    assert message in text


def test_a_multiplied_value_stays_in_its_domain() -> None:
    assert Domain("loguniform", (0.1, 1.0)).within(1.2) == 1.0
    assert Domain("uniform", (0.0, 1.0)).within(0.4) == 0.4
    assert Domain("randint", (2, 6)).within(5.4) == 5
    assert Domain("randint", (2, 6)).within(7) == 5
    assert Domain("quniform", (0.0, 1.0, 0.25)).within(0.6) == 0.5
    assert Domain("choice", (1, 2)).within(2) == 2


def test_flat_and_dotted_keys_are_the_same() -> None:
    assert flat({"a": {"b": {"c": 1}, "d.e": 2}, "f": {}}) == {"a.b.c": 1, "a.d.e": 2, "f": {}}


# The file


def test_all_that_is_wrong_is_said_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(
        f"base: {{imports: [{DOOMED}], problem: {{name: analytic, case: coreset}}, solver: {{name: bome}}, steps: 10}}\n"
        "space:\n"
        "  solver.uper_lr: {loguniform: [1e-4, 1e-1]}\n"
        "  solver:\n"
        "    inner_lr: {uniform: [-1, 1]}\n"
        "  workers: {choice: [1, 2]}\n"
        "  steps: {choice: [10, 20]}\n"
        "  solver.eta: {normal: [0, 1]}\n"
        "metric: upper_loss\n"
        "mode: min\n"
        "report_every_steps: 3\n"
        "asha: {grace_steps: 4}\n"
    )
    with pytest.raises(ConfigError) as error:
        load_search(file)
    lines = str(error.value).splitlines()
    wanted = [
        ":8: space.solver.eta: got 'normal' (str), wanted one of uniform",
        ":3: space.solver.uper_lr: solver.uper_lr is not a key. Did you mean solver.upper_lr?",
        ":5: space.solver.inner_lr: solver.inner_lr: got -1 (int), wanted a number > 0",
        ":6: space.workers: not to be searched over: it cannot change a trial's result",
        ":7: space.steps: not to be searched over: a scheduler compares trials of one length",
        ":11: report_every_steps: got 3, wanted a divisor of the run's steps, 10",
        ":12: asha.grace_steps: got 4, wanted a multiple of report_every_steps, 3",
    ]
    assert [line.startswith(f"{file}{text}") for line, text in zip(lines, wanted, strict=True)] == [
        True
    ] * len(wanted), lines


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": "x"}, "metrics is not a key. Did you mean metric?"),
        ({"trials": 0}, "trials: got 0 (int), wanted an integer >= 1"),
        ({"scheduler": "bohb"}, "scheduler: got 'bohb' (str), wanted one of: asha, pbt, none"),
        ({"space": {}}, "space: got {}, wanted at least one key"),
        ({"base": "quickstrat"}, "Did you mean configs/quickstart.yaml?"),
        ({"overrides": {"seeds": 3}}, "base: has seeds: 3, wanted 1"),
        ({"overrides": {"solver.inner_stepz": 3}}, "base: solver.inner_stepz is not a key"),
        (
            {"scheduler": "pbt", "space": {"seed": {"grid": [1, 2]}}},
            "space.seed: pbt changes it while a trial runs",
        ),
        (
            {"scheduler": "pbt", "space": {"solver.barrier": {"choice": ["global"]}}},
            "for numbers of the solver alone",
        ),
        ({"scheduler": "pbt", "trials": 1}, "trials: got 1, wanted at least 2 for scheduler: pbt"),
    ],
)
def test_what_no_search_can_be_made_of(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_search(changed(FILE, **changes))


def test_a_search_as_written_is_the_same_search(tmp_path: Path) -> None:
    search = load_search(ROOT / "configs" / "tune_quickstart.yaml", ["trials=2"])
    assert (search.name, search.settings.trials, search.config.steps) == ("tune_quickstart", 2, 40)
    again = load_search(yaml.safe_load(yaml.safe_dump(search.to_dict())))
    assert again.to_dict() == search.to_dict()
    assert again.config == search.config


CLEANING = sorted((ROOT / "configs" / "tune").glob("hyper_cleaning_*.yaml"))


@pytest.mark.parametrize("path", CLEANING, ids=lambda path: path.stem)
def test_searches_that_are_compared_cost_the_same(path: Path) -> None:
    search = load_search(path)
    settings = search.settings
    assert (settings.trials, settings.metric, settings.scheduler) == (
        8,
        "selection_accuracy",
        "none",
    )
    steps, solver = search.config.steps, search.base["solver"]
    assert settings.report_every_steps == steps
    assert not {"name", "inner_steps", "aux_steps"} & {key.split(".")[1] for key in search.space}
    small = {"train": 200, "validation": 100, "selection": 50}
    result = bomemeta.train(
        {**search.base, "problem": search.base["problem"] | small, "data": {"dataset": "digits"}},
        ["steps=2", "solver.upper_lr=1", "log.tensorboard=false", "output_dir=null"],
    )
    counts = result.metrics
    cost = counts["gradient_evaluations"] + 2 * counts.get("hessian_products", 0.0)
    assert steps is not None
    assert 380 <= cost / 2 * steps <= 400, (solver, cost / 2)


def test_compared_searches_are_of_bome_and_nine_baselines() -> None:
    names = [load_search(path).base["solver"]["name"] for path in CLEANING]
    assert len({*names}) == 10
    assert {"bome", "itd", "aid_cg", "soba", "f2sa"} < {*names}


def test_an_override_that_names_another_solver_leaves_out_the_old_keys() -> None:
    search = load_search(
        {
            **FILE,
            "overrides": {"solver": {"name": "itd", "inner_lr": 0.2}},
            "space": {"solver.upper_lr": {"loguniform": [1e-3, 1e-1]}},
        }
    )
    assert search.base["solver"]["name"] == "itd"
    assert search.base["solver"]["inner_lr"] == 0.2
    assert "lower_lr" not in search.base["solver"]


def test_same_seed_same_trials() -> None:
    from bomemeta.tune.search import sampled

    search = load_search(
        changed(
            FILE,
            trials=3,
            space={**FILE["space"], "solver.barrier": {"grid": ["global", "per_task"]}},
        )
    )
    trials = sampled(search)
    assert [trial["solver.barrier"] for trial in trials] == ["global", "per_task"] * 3
    assert len({trial["solver.upper_lr"] for trial in trials}) == 6
    assert all(1e-3 <= trial["solver.upper_lr"] <= 1e-1 for trial in trials)
    assert sampled(search) == trials
    assert sampled(load_search(changed(search.to_dict(), seed=1))) != trials


def test_another_solver_takes_the_base_files_keys_alone() -> None:
    search = load_search(changed(FILE, space={"solver.name": {"choice": ["bome", "soba"]}}))
    config = search.trial_config({"solver.name": "soba"})
    # upper_lr is in the file; inner_steps is bome's alone, and bome's default inner_lr does not
    # come along.
    assert (label(config.solver), config.solver.upper_lr) == ("soba", 0.03)
    assert config == load_config({**BASE, "imports": search.base["imports"]}, ["solver.name=soba"])


def test_asha_remembers_what_trials_reported_before_the_driver_was_lost(tmp_path: Path) -> None:
    from pyarrow.fs import LocalFileSystem

    from bomemeta.tune.schedulers import Halving

    kept = SimpleNamespace(storage_filesystem=LocalFileSystem(), trial_fs_path=str(tmp_path))
    old, new = (
        SimpleNamespace(trial_id=f"a_{number}", last_result=last, storage=kept)
        for number, last in enumerate([{"steps": EVERY}, {}])
    )
    lines = [
        {"step": 2},
        {"step": EVERY - 1, "upper_error": 1.0},
        {"step": 2 * EVERY - 1, "upper_error": 9.0},
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    for remembered, action in (([old, new], "STOP"), ([new], "CONTINUE")):
        scheduler = Halving(STEPS, EVERY, 2.0)
        scheduler.set_search_properties("upper_error", "min")
        for trial in remembered:
            scheduler.on_trial_add(None, trial)
        assert scheduler.on_trial_result(None, new, {"steps": EVERY, "upper_error": 2.0}) == action


def test_documentation_lists_the_keys_of_a_tune_file() -> None:
    text = (
        (ROOT / "docs" / "tune.md")
        .read_text(encoding="utf-8")
        .partition("## Keys")[2]
        .partition("\n## ")[0]
    )
    cells = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    documented = {row[0].strip("`"): tuple(row[1:3]) for row in cells}
    schema = TypeAdapter(TuneSettings).json_schema()
    wanted: dict[str, tuple[str, str]] = {}
    for key, field in TuneSettings.model_fields.items():
        below = {key: (field, schema["properties"][key])}
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            parts = schema["$defs"][field.annotation.__name__]["properties"]
            below = {
                f"{key}.{name}": (part, parts[name])
                for name, part in field.annotation.model_fields.items()
            }
        for name, (part, wish) in below.items():
            default = "must be given" if part.is_required() else json.dumps(part.default).strip('"')
            wanted[name] = (default, phrase(wish, schema) or "")
    assert documented == wanted
    kinds = re.findall(r"`(\w+): \[", (ROOT / "docs" / "tune.md").read_text(encoding="utf-8"))
    assert set(kinds) >= set(KINDS)


# Real searches


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """One local cluster for the whole file, of more CPUs than there are cores."""
    from bomemeta.distributed import cluster

    with cluster.local(cluster.RayOptions(workers=4), print):
        yield


def search(
    file: dict[str, Any], folder: Path, lines: list[str], *overrides: str, **rest: Any
) -> Any:
    from bomemeta.tune import tune

    return tune(file, [f"output_dir={folder}", *overrides], say=lines.append, **rest)


def events(folder: Path) -> Counter[tuple[str, int]]:
    """How often each tag is written at each step, in all event files below a folder."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = sorted(folder.rglob("events.out.tfevents.*"))
    return Counter(
        (value.tag, event.step)
        for file in files
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    )


def test_asha_with_workers_and_a_trial_that_is_killed(ray_cluster: None, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    problem = {
        "doom_step": 6,
        "doom_mark": str(tmp_path / "mark"),
        "group_folder": str(seen),
        "group_size": 3,
    }
    file = changed(
        based(problem=problem, workers=2, shards=4),
        space={
            "solver.upper_lr": {"grid": [0.1, 0.001]},
            "solver.inner_lr": {"uniform": [0.08, 0.12]},
        },
        trials=1,
        concurrent=1,
        asha={"grace_steps": EVERY, "reduction": 2.0},
        driver_cpus=0.5,
    )
    from bomemeta.tune.search import sampled

    lines: list[str] = []
    result = search(file, tmp_path / "out", lines)
    assert (tmp_path / "mark.0").exists()
    assert len([line for line in lines if line.startswith("trial 1/2 was lost (")]) == 1, lines
    assert [(row.trial, row.ended, row.steps) for row in result.rows] == [
        (1, "done", STEPS),
        (2, "stopped", EVERY),
    ]
    assert [row.values for row in result.rows] == sampled(load_search(file))

    best = result.rows[0]
    assert result.best == best
    assert len(best.lineage) == 1
    serial = bomemeta.train(
        result.best_config,
        [
            f"output_dir={tmp_path / 'best'}",
            "workers=0",
            "problem.doom_step=null",
            "problem.group_folder=null",
        ],
    )
    assert serial.upper_sha256 == best.upper_sha256
    assert serial.metrics["upper_error"] == best.metric
    run = tmp_path / "out" / best.run_dir
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(STEPS))
    assert (
        json.loads((run / "result.json").read_text())["first_step"] == EVERY
    )  # the report before the kill

    # The trial itself and two workers, in a placement group of their own.
    groups = Counter(file.name.partition("-")[0] for file in seen.iterdir())
    assert groups
    assert min(groups.values()) >= 3

    for row in result.rows:
        written = events(tmp_path / "out" / "trials" / f"trial-0{row.trial}")
        assert set(written.values()) == {1}, {
            tag: count for tag, count in written.items() if count > 1
        }
        assert {step for tag, step in written if tag == "ray/tune/upper_error"} == set(
            range(EVERY, row.steps + 1, EVERY)
        )
    assert "| 1     | done    | 12    |" in (tmp_path / "out" / "results.md").read_text()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["best"] == 1


def replayed(lineage: list[dict[str, Any]], folder: Path) -> str:
    """Serial runs with each part's values, each from the checkpoint of the one before at the step
    where the part begins.
    """
    before: Path | None = None
    for number, part in enumerate(lineage):
        overrides = [f"{key}={json.dumps(value)}" for key, value in part["values"].items()]
        settings = load_config(
            BASE,
            [
                *overrides,
                "log.tensorboard=false",
                f"checkpoint.every_steps={EVERY}",
                "checkpoint.keep=9",
            ],
        )
        run = RunFolder(folder / str(number))
        run.path.mkdir(parents=True)
        run.write_config(settings)
        if before is not None:
            saved = checkpoints.load(before / "checkpoints" / f"step_{part['from_step']:08d}.pt")
            checkpoints.save(run.checkpoints, saved._replace(config=settings.to_dict()), keep=9)
        sha256 = bomemeta.resume(run.path).upper_sha256
        before = run.path
    return sha256


@pytest.mark.slow(reason="its trials start one after another: pytest -m slow -k pbt")
def test_pbt_continues_from_another_trial_with_other_values(
    ray_cluster: None, tmp_path: Path
) -> None:
    file = changed(
        FILE,
        space={
            "solver.upper_lr": {"loguniform": [1e-3, 1e-1]},
            "solver.inner_steps": {"choice": [3, 4, 5]},
        },
        trials=2,
        scheduler="pbt",
        pbt={"every_steps": EVERY, "quantile": 0.5, "together": True},
        driver_cpus=0.5,
    )
    lines: list[str] = []
    result = search(file, tmp_path / "out", lines)
    assert [row.ended for row in result.rows] == ["done", "done"], lines
    # At each change the worse of the two continues from the better one.
    assert max(len(row.lineage) for row in result.rows) > 1
    for row in result.rows:
        assert [part["from_step"] for part in row.lineage] == sorted(
            {part["from_step"] for part in row.lineage}
        )
        assert row.lineage[-1]["values"] == row.values
        assert replayed(row.lineage, tmp_path / f"replayed-{row.trial}") == row.upper_sha256
    text = (tmp_path / "out" / "best.yaml").read_text()
    assert ("does not repeat the trial" in text) == (len(result.rows[0].lineage) > 1)


def test_trainable_in_a_tuner_of_ones_own(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Tune's own callback for MLflow, where that is installed."""
    from ray import tune

    callbacks: list[Any] = []
    if installed("mlflow"):
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        store = (tmp_path / "store").as_uri()
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        callbacks.append(MLflowLoggerCallback(tracking_uri=store, experiment_name="own"))

    file = based(problem={"doom_step": 9, "doom_mark": str(tmp_path / "mark")})["base"]
    function = bomemeta.tune.trainable(
        file, ["solver.inner_steps=3"], report_every_steps=EVERY, driver_cpus=0.5
    )
    tuner = tune.Tuner(
        function,
        param_space={"solver": {"upper_lr": tune.grid_search([0.02])}},
        run_config=tune.RunConfig(
            name="own",
            storage_path=str(tmp_path),
            failure_config=tune.FailureConfig(max_failures=1),
            callbacks=callbacks,
            verbose=0,
        ),
    )
    (result,) = tuner.fit()
    assert (tmp_path / "mark.0").exists()
    if callbacks:
        import mlflow

        client = mlflow.MlflowClient(store)
        (run,) = client.search_runs([client.get_experiment_by_name("own").experiment_id])
        reported = client.get_metric_history(run.info.run_id, "upper_error")
        assert reported[-1].value == result.metrics["upper_error"]
        assert len(reported) >= STEPS // EVERY
    metrics = result.metrics
    assert (result.error, metrics["steps"], metrics["ended"]) == (None, STEPS, "done")
    assert (
        metrics["upper_sha256"]
        == plain(
            {"solver.upper_lr": 0.02, "solver.inner_steps": 3}, tmp_path / "plain"
        ).upper_sha256
    )
    # Complete: what a trial reports is all that it takes.
    with result.checkpoint.as_directory() as directory:
        saved = checkpoints.load_latest(Path(directory)).checkpoint
    assert (saved.step, sorted(saved.lower), upper_sha256(saved.upper)) == (
        STEPS,
        list(range(5)),
        metrics["upper_sha256"],
    )


def test_a_search_resumes_after_ctrl_c_of_its_driver(ray_cluster: None, tmp_path: Path) -> None:
    """Trial 1 is done; trial 2 stands still in the middle. After `kill -9`: tests/test_s3.py."""
    problem = {"doom": "wait", "doom_mark": str(tmp_path / "mark")}
    file = changed(
        based(problem=problem),
        space={"problem.doom_step": {"grid": [99, 6]}, "solver.upper_lr": {"grid": [0.03]}},
        trials=1,
        concurrent=1,
        scheduler="none",
        driver_cpus=0.5,
    )
    path, out = tmp_path / "search.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(file))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "bomemeta", "tune", str(path), f"output_dir={out}"]
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for((tmp_path / "mark.0").exists, process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert "trial 1/2 step 12: upper_error" in output, output
    assert f"--resume {out}`" in output.splitlines()[-1], output
    assert "Traceback" not in output
    assert not (out / "results.json").exists()

    lines: list[str] = []
    with pytest.raises(
        ConfigError, match=r"holds another search, with other seed\. Set these back"
    ):
        search(file, out, lines, "seed=3")
    result = search(file, out, lines)
    assert [(row.trial, row.ended) for row in sorted(result.rows, key=lambda row: row.trial)] == [
        (1, "done"),
        (2, "done"),
    ], lines
    assert any(line.startswith("trial 2/2 resumes at step 4") for line in lines), lines
    reference = plain({"solver.upper_lr": 0.03}, tmp_path / "plain")
    assert {row.upper_sha256 for row in result.rows} == {reference.upper_sha256}
    assert {row.metric for row in result.rows} == {reference.metrics["upper_error"]}

    before = {file: file.read_bytes() for file in out.iterdir() if file.is_file()}
    with pytest.raises(ConfigError, match="holds this search, finished"):
        search(file, out, lines)
    assert {file: file.read_bytes() for file in out.iterdir() if file.is_file()} == before


def test_a_trial_that_diverges_is_no_reason_to_stop(ray_cluster: None, tmp_path: Path) -> None:
    file = changed(
        FILE,
        space={"solver.upper_lr": {"grid": [1e120, 0.03]}},
        trials=1,
        concurrent=1,
        driver_cpus=0.5,
    )
    lines: list[str] = []
    result = search(file, tmp_path / "out", lines)
    assert [(row.trial, row.ended) for row in result.rows] == [(2, "done"), (1, "diverged")]
    assert result.rows[1].metric is None
    assert "DivergenceError: step" in (result.rows[1].reason or "")
    assert any(line.startswith("trial 1/2 diverged after ") for line in lines), lines
    assert (
        (tmp_path / "out" / result.rows[1].run_dir / "error.txt")
        .read_text()
        .startswith("Traceback")
    )


def test_a_metric_that_is_not_reported_ends_the_search(ray_cluster: None, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(
        ConfigError,
        match=r"trial 1: SearchError: metric: got 'validation_loss', wanted one of .*upper_error",
    ):
        search(
            changed(FILE, metric="validation_loss", concurrent=1, driver_cpus=0.5),
            tmp_path / "out",
            lines,
        )
    assert not any("trial 2/" in line and "begins" in line for line in lines), lines
    assert not (tmp_path / "out" / "results.json").exists()


def test_bundles_without_a_place_are_reported_at_once(ray_cluster: None, tmp_path: Path) -> None:
    began = time.monotonic()
    too_many = based(workers=9)
    with pytest.raises(
        ClusterError,
        match=r"bundle 8 of 10 of a trial, of worker 7, fits nowhere: wanted 0\.5 CPU on one node",
    ):
        search(changed(too_many, driver_cpus=1.0), tmp_path / "out", [])
    with pytest.raises(
        ClusterError,
        match=r"bundle 2 of 3 of a trial, of worker 1, fits nowhere: wanted 0\.5 CPU and 1 GPU",
    ):
        search(based(workers=2, gpus_per_worker=1.0), tmp_path / "out", [])
    with pytest.raises(
        ClusterError,
        match=r"bundle 1 of 2 of a trial, of the trial itself, fits nowhere: wanted 64 CPU",
    ):
        search(changed(based(workers=1), driver_cpus=64.0), tmp_path / "out", [])
    with pytest.raises(ClusterError, match="bundle 8 of 10"):
        bomemeta.tune.trainable(too_many["base"], report_every_steps=EVERY)
    assert not (tmp_path / "out").exists()
    assert time.monotonic() - began < 60  # Ray itself never answers
