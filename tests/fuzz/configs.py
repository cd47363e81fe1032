"""Configs, overrides and tune files: texts that are refused in words or read as they say."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import yaml

from fuzz import mutate
from fuzz.outcome import Silent

BASES = (
    """problem: {name: analytic, case: quadratic, tasks: 2}
solver: {name: bome, inner_steps: 2, upper_lr: 0.1}
steps: 2
seed: 0
log: {tensorboard: false}
""",
    """problem:
  name: analytic
  case: minimax
solver:
  name: sl_bamm
steps: 3
tasks_per_step: 1
shards: 2
dtype: float64
threads: 1
workers: 0
output_dir: out
evaluation:
  episodes: 3
  every_steps: 2
checkpoint: {every_steps: 1, keep: 2}
log: {every_steps: 1, tensorboard: false}
""",
    """problem: {name: continual, stream: permuted, tasks: 2, samples_per_task: 20, test_samples_per_task: 10,
  method: plain, objective: er, hidden: 8, layers: 1}
solver: {name: lower_only, inner_lr: 0.05}
data: {dataset: digits}
imports: []
log: {tensorboard: false}
""",
    """problem: {name: hyper_cleaning, train: 30, validation: 10, selection: 10, noise: 0.5}
data: {dataset: digits}
solver: {name: bome, inner_steps: 2, inner_lr: 0.1, lower_lr: 0.1, upper_lr: 1.0}
steps: 2
log: {tensorboard: false}
""",
    """problem: {name: few_shot, ways: 5, shots: 1, width: 8, queries: 3}
data: {dataset: omniglot, root: /nonexistent}
solver: {name: bome, barrier: per_task, inner_steps: 3, inner_lr: 0.2, upper_optimizer: adam, upper_schedule: cosine}
steps: 30
""",
)
TUNE = """base:
  problem: {name: analytic, case: quadratic, tasks: 2}
  solver: {name: bome, inner_steps: 2}
  steps: 4
overrides: {seed: 1, log.tensorboard: false}
space:
  solver.upper_lr: {loguniform: [1e-3, 1e-1]}
  solver.inner_steps: {choice: [1, 2]}
metric: upper_loss
mode: min
trials: 2
report_every_steps: 2
scheduler: asha
asha: {grace_steps: 2, reduction: 2.0}
seed: 0
"""
PATHS = ("output_dir", "data.path", "data.root")


def config(rng: random.Random, folder: Path) -> None:
    """A file, changed, and run where that is quick."""
    from bomemeta.config import load_config

    source = mutate.text(rng, rng.choice(BASES))
    path = folder / "config.yaml"
    path.write_bytes(source.encode("utf-8", "surrogatepass"))
    found = load_config(path)
    _compare(yaml.load(source, yaml.BaseLoader), found.to_dict(), folder)
    _try(found, folder, rng)


def override(rng: random.Random, folder: Path) -> None:
    """One to three `key=value` over a config."""
    from bomemeta.config import load_config

    base = yaml.load(rng.choice(BASES), yaml.SafeLoader)
    # Not 1.1's numbers of the base: the loader of the test would read them too.
    keys = [*_keys(base), "nosuch", "solver", "problem", "data.path", "data.root", "imports", "threads",
            "max_workers", "step_timeout_s", "evaluation.inner_steps", "backup_after", ""]  # fmt: skip
    texts = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        key, value = rng.choice(keys), mutate.scalar(rng)
        if rng.random() < 0.1:
            key = rng.choice(
                (f"{key}.x", f".{key}", f"{key}.", key.replace(".", ""), mutate.scalar(rng))
            )
        texts.append(rng.choice((f"{key}={value}", f"{key}={value}", f"{key} = {value}", key)))
    found = load_config(base, texts)
    typed: dict[str, str] = {}
    for each in texts:
        key, _, value = each.partition("=")
        typed = {
            old: kept for old, kept in typed.items() if not f"{old}.".startswith(f"{key.strip()}.")
        }
        typed[key.strip()] = value
    result = found.to_dict()
    for key, value in typed.items():
        _compare_at(key, yaml.load(value, yaml.BaseLoader), _at(result, key), Path.cwd())
    _try(found, folder, rng)


def tune(rng: random.Random, folder: Path) -> None:
    """A tune file, changed."""
    from bomemeta.tune.spec import load_search

    source = mutate.text(rng, TUNE)
    path = folder / "tune.yaml"
    path.write_bytes(source.encode("utf-8", "surrogatepass"))
    search = load_search(path)
    typed = yaml.load(source, yaml.BaseLoader)
    written = search.to_dict()
    for key in ("trials", "seed", "mode", "metric", "scheduler", "report_every_steps"):
        if key in typed:
            _compare_at(key, typed[key], written[key], folder)
    if isinstance(typed.get("base"), dict):
        _compare(typed["base"], search.config.to_dict(), folder, skip=("seed", "log"))


def _try(found: Any, folder: Path, rng: random.Random) -> None:
    """Builds what was accepted, and now and then trains it, a step or two."""
    from bomemeta import api
    from bomemeta.assembly import build_problem, build_solver

    values = found.to_dict()
    if (values["data"] or {}).get("dataset") not in (
        None,
        "digits",
        "labelled_array",
    ) or rng.random() < 0.5:
        return
    problem = build_problem(found)
    build_solver(found, problem)
    if values["problem"]["name"] != "analytic" or rng.random() < 0.5:
        return
    values["evaluation"]["episodes"] = min(values["evaluation"]["episodes"], 2)
    values.update(
        workers=0,
        device="cpu",
        output_dir=str(folder / "run"),
        seeds=1,
        steps=min(values["steps"], 2),
    )
    values["log"]["tensorboard"] = False
    result = api.train(values)
    if not (folder / "run" / "result.json").is_file() or result.steps != values["steps"]:
        raise Silent("a run said that it was done, and left no result")


def _compare(
    typed: Any, found: Any, folder: Path, above: str = "", skip: tuple[str, ...] = ()
) -> None:
    if not isinstance(typed, dict):
        return
    for key, value in typed.items():
        name = f"{above}{key}"
        if name in skip or not isinstance(found, dict) or key not in found:
            continue
        if isinstance(value, dict):
            _compare(value, found[key], folder, f"{name}.", skip)
        else:
            _compare_at(name, value, found[key], folder)


def _compare_at(key: str, typed: Any, found: Any, folder: Path) -> None:
    """Raises Silent where a value is not what its text says to somebody who knows no YAML."""
    if not isinstance(typed, str) or isinstance(found, dict | list | tuple):
        return
    if key in PATHS and isinstance(found, str):
        meant = Path(typed).expanduser()
        if "://" not in typed:
            meant = folder / meant
        same = found.rstrip("/") in (typed.rstrip("/"), str(meant.absolute()))
        nowhere = typed == "" or (typed == "/" and key == "output_dir")
        if nowhere or not (same or Path(found).resolve() == meant.resolve()):
            raise Silent(f"{key}: {typed!r} became {found!r}")
        if re.search(r"\$|^~|^\w+:/", found) and not re.match(
            r"(s3|gs|gcs|abfs|hdfs)://\w|file:///\w", found
        ):
            raise Silent(f"{key}: {typed!r} was taken for {found!r}")
        return
    if not _means(typed, found):
        raise Silent(f"{key}: {typed[:40]!r} became {str(found)[:40]!r}")


def _means(typed: str, found: Any) -> bool:
    if isinstance(found, bool):
        return typed.lower() == str(found).lower()
    if found is None:
        return typed.lower() in ("", "null", "~")
    if isinstance(found, str):
        return typed == found
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", typed):
        return False
    if isinstance(found, int):
        return re.fullmatch(r"[-+]?\d+", typed) is not None and int(typed) == found
    zero = not re.search(r"[1-9]", re.split("[eE]", typed)[0])
    return float(typed) == found and (found != 0 or zero)


def _keys(values: dict[str, Any], above: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in values.items():
        keys.append(f"{above}{key}")
        if isinstance(value, dict):
            keys += _keys(value, f"{above}{key}.")
    return keys


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return {}
        values = values[part]
    return values
