"""Objects first: problems, solvers and data handed over from Python, as good as those of a config."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import bomemeta as bm
from bomemeta import signals
from bomemeta.config import Settings, differing_keys, load_config
from bomemeta.core.arguments import Recorded, fields_of, replaced, values_of
from bomemeta.distributed import by_value
from bomemeta.errors import CheckpointError, ConfigError
from bomemeta.keys import RunKeys
from bomemeta.registry import datasets, problems, solvers

REPO = Path(__file__).parents[1]

# The program of the README, as a script of its own: the class lives in `__main__`.
IDEAL = """
import sys
import torch
import bomemeta as bm


class Mine(bm.Problem):
    def __init__(self, tasks, curvature=1.0):
        self._count, self._curvature = tasks, curvature
        self.classes = torch.zeros(3)  # cloudpickle takes the word for torch.classes

    @property
    def num_tasks(self):
        return self._count

    def init_upper(self, generator):
        return {"x": torch.randn(3, generator=generator)}

    def load(self, task_ids, step, split):
        return {"goal": torch.stack([torch.full((3,), float(task)) for task in task_ids])}

    def init_lower(self, encoded, batch):
        return {"y": torch.zeros(3)}

    def upper_loss(self, encoded, lower, batch):
        return ((lower["y"] - batch["goal"]) ** 2).sum()

    def lower_loss(self, encoded, lower, batch):
        return self._curvature * ((lower["y"] - encoded["x"]) ** 2).sum()
"""
CALL = """
for workers in (0, 1):
    result = bm.train(
        Mine(tasks=16), bm.BOME(inner_steps=20, upper_lr=0.3), steps=3, workers=workers
    )
    print(result.upper_sha256, result.run_dir)
"""

namespace: dict[str, Any] = {"__name__": __name__}
exec(IDEAL, namespace)
Mine: Any = namespace["Mine"]
SMALL: dict[str, Any] = {"steps": 3, "log": {"tensorboard": False}}


def solver() -> Any:
    return bm.BOME(inner_steps=20, upper_lr=0.3)


@pytest.fixture(scope="module")
def digest() -> str:
    """The ideal program's x, trained here."""
    return bm.train(Mine(tasks=16), solver(), **SMALL).upper_sha256


def script(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    path = folder / "script.py"
    path.write_text(text)
    return subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=folder)


def test_the_ideal_program_runs_as_a_script(tmp_path: Path, digest: str) -> None:
    done = script(tmp_path, IDEAL + CALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [digest, "None"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["script.py"]


NOTEBOOK = [
    "import asyncio; assert asyncio.get_running_loop()",
    IDEAL,
    """
import os, signal
from bomemeta.report import Quiet

class Interrupts(Quiet):
    def step(self, step, metrics):
        if step == 0:
            os.kill(os.getpid(), signal.SIGINT)

try:
    bm.train(Mine(tasks=16), bm.BOME(), steps=9, workers=1, listener=Interrupts())
except KeyboardInterrupt:
    print("interrupted")
""",
    "import ray; assert not ray.is_initialized()",  # no actors, and no cluster, are left over
    "again = bm.train(Mine(tasks=16), bm.BOME(inner_steps=20, upper_lr=0.3), steps=3, workers=0)",
    "print(again.upper_sha256)",
]


def test_the_ideal_program_runs_in_a_notebook(tmp_path: Path, digest: str) -> None:
    """Real cells in a real kernel, which has a loop that runs: interrupted, and again."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = [nbformat.v4.new_code_cell(cell) for cell in NOTEBOOK]
    book = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(
        book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    reported = [
        output["text"].split()
        for cell in book.cells
        for output in cell["outputs"]
        if output.get("name") == "stdout"
    ]
    assert ["interrupted"] in reported
    assert reported[-1] == [digest]


def test_a_run_inside_a_running_loop(digest: str) -> None:
    async def cell() -> str:
        return bm.train(Mine(tasks=16), solver(), **SMALL).upper_sha256

    assert asyncio.run(cell()) == digest


def test_an_interrupted_run_leaves_nothing_behind_and_can_be_run_again(digest: str) -> None:
    class Breaks(Mine):  # type: ignore[misc]
        def upper_loss(self, *given: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bm.train(Breaks(16), solver(), **SMALL)
    assert bm.train(Mine(tasks=16), solver(), **SMALL).upper_sha256 == digest


def test_doctor_and_profile_take_the_same_arguments() -> None:
    report = bm.doctor(Mine(tasks=4), solver(), steps=10)
    assert report.ok, report.lines()
    found = bm.profile(Mine(tasks=4), solver(), steps=10, measured_steps=2, warm_up=1)
    assert found.tasks == 4
    # g = |y - x|^2: each of the 20 steps halves what is left of y's way, and of ITD's hypergradient.
    exact = bm.check(Mine(tasks=4), bm.ITD(inner_steps=20, inner_lr=0.25), steps=10, directions=1)
    assert exact.verdict == "OK"
    assert exact.numbers["relative_error"] == pytest.approx(2.0**-20, rel=1e-6)
    assert "shards" in inspect.signature(bm.doctor).parameters


def test_a_search_over_objects_is_checked_before_ray_is_started() -> None:
    spec = pytest.importorskip("bomemeta.tune.spec")
    base = load_config({"problem": weighed(), "solver": solver(), "steps": 4})
    file = {
        "base": base.to_dict(),
        "space": {"solver.upper_lr": {"uniform": [0.1, 0.5]}},
        "metric": "loss",
        "mode": "min",
        "report_every_steps": 2,
    }
    given = {"problem": base.problem, "solver": base.solver}
    search = spec.load_search(file, objects=given)
    trial = search.trial_config({"solver.upper_lr": 0.2})
    assert trial.problem is base.problem
    assert trial.solver == dataclasses.replace(base.solver, upper_lr=0.2)
    with pytest.raises(ConfigError, match=r"space: missing"):
        bm.tune(Mine(2), solver())


def test_nothing_is_kept_without_an_output_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    result = bm.train(Mine(tasks=2), solver(), checkpoint={"every_steps": 1}, **SMALL)
    assert (result.run_dir, result.steps, list(tmp_path.iterdir())) == (None, 3, [])
    assert result.upper["x"].shape == (3,)


def test_an_object_is_a_section_with_its_class_given() -> None:
    named = {
        "problem": {"name": "analytic", "case": "quadratic", "tasks": 2},
        "solver": {"name": "bome", "upper_lr": 0.3},
    }
    config = load_config(named | SMALL)
    given = load_config(
        {"problem": bm.Analytic(case="quadratic", tasks=2), "solver": bm.BOME(upper_lr=0.3)} | SMALL
    )
    assert given == config
    assert given.to_dict() == config.to_dict()
    assert bm.train(
        bm.Analytic(case="quadratic", tasks=2), bm.BOME(upper_lr=0.3), **SMALL
    ).upper_sha256 == (bm.train(named, **SMALL).upper_sha256)


def test_keys_and_objects_are_set_over_a_config() -> None:
    file = str(REPO / "configs" / "analytic_quadratic.yaml")
    result = bm.train(file, bm.BOME(upper_lr=0.3), overrides=["problem.tasks=2"], **SMALL)
    base = load_config(file, ["solver={name: bome, upper_lr: 0.3}", "problem.tasks=2", "steps=3"])
    assert result.upper_sha256 == bm.train(base).upper_sha256
    with pytest.raises(ConfigError, match="argument steps: steps: got 'x'"):
        bm.train(file, steps="x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"argument log: log\.every_step is not a key"):
        bm.train(file, log={"every_step": 3})


def test_an_override_makes_a_new_object_and_leaves_the_old_one() -> None:
    mine, own = Mine(4, curvature=2.0), bm.BOME(upper_lr=0.3)
    config = load_config({"problem": mine, "solver": own}, ["problem.tasks=3", "solver.eta=0.7"])
    assert (config.problem._count, config.problem._curvature, mine._count) == (3, 2.0, 4)
    assert config.solver == dataclasses.replace(own, eta=0.7)
    assert load_config(config).problem is config.problem  # nothing changed: the object itself


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bm.train(Mine(2), bm.BOME(inner_steps=-1)), "solver.inner_steps: got -1"),
        (lambda: bm.train(Mine, bm.BOME()), "got the class Mine, wanted a problem"),
        (lambda: bm.train(Mine(2), bm.BOME), "solver: got the class BOME"),
        (lambda: bm.train(Mine(2), steps=1), "solver: missing"),
        (lambda: bm.train(bm.BOME(), Mine(2)), "got BOME, wanted a problem"),
        (lambda: bm.train(Mine(2), Mine(2)), "wanted one whose class derives from bomemeta.Solver"),
        (lambda: bm.train(bm.FewShot(), bm.BOME(), steps=1), "data: missing"),
    ],
)
def test_a_wrong_argument_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert message in str(error.value)


class Weighed(Mine):
    """Fields that no config can hold."""

    def __init__(self, tasks: int, net: torch.nn.Module, goal: Any, link: Any = len) -> None:
        super().__init__(tasks)
        self.net, self.goal, self.link = net, goal, link


def weighed(scale: float = 1.0) -> Weighed:
    net = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(net.weight, scale)
    torch.nn.init.zeros_(net.bias)
    return Weighed(2, net, np.arange(3.0))


def test_a_folder_records_class_and_fields(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    bm.train(weighed(), solver(), output_dir=str(folder), **SMALL)
    section = yaml.safe_load((folder / "config.yaml").read_text())["problem"]
    assert section["class"] == "test_objects:Weighed"
    assert section["tasks"] == 2
    assert section["net"]["object"] == "torch.nn.modules.linear:Linear"
    assert len(section["goal"]["sha256"]) == 64
    assert section["link"] == {"object": "builtins:len"}


def test_a_run_of_objects_is_resumed_with_the_object_the_class_or_by_its_module(
    tmp_path: Path,
) -> None:
    whole = bm.train(Mine(tasks=3), solver(), **SMALL | {"steps": 6})
    for name, given in (("object", Mine(tasks=3)), ("class", Mine), ("module", None)):
        folder = str(tmp_path / name)
        bm.train(Mine(tasks=3), solver(), output_dir=folder, **SMALL)
        resumed = bm.resume(folder, problem=given, steps=6)
        assert resumed.upper_sha256 == whole.upper_sha256
        assert bm.evaluate(folder, problem=given).metrics["loss"] == resumed.metrics["loss"]
        assert bm.load(folder, problem=given).upper_sha256 == whole.upper_sha256


def test_what_is_missing_or_different_is_said(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    bm.train(weighed(), solver(), output_dir=folder, **SMALL)
    with pytest.raises(
        ConfigError, match=r"problem.net was an object of torch.*resume\(DIR, problem"
    ):
        bm.resume(folder, steps=4)
    with pytest.raises(CheckpointError, match=r"problem.net.sha256"):
        bm.resume(folder, problem=weighed(2.0), steps=4)
    assert bm.resume(folder, problem=weighed(), steps=4).steps == 4
    file = Path(folder) / "config.yaml"
    # Without its last line, the digest, as one edits a file on purpose.
    written = "".join(file.read_text().splitlines(keepends=True)[:-1])
    file.write_text(written.replace("test_objects:Weighed", "__main__:Gone"))
    with pytest.raises(ConfigError, match=r"class Gone of module __main__ is not to be found here"):
        bm.load(folder)
    file.write_text(written.replace("test_objects:Weighed", "no_such_module:Gone"))
    with pytest.raises(ConfigError, match=r"no_such_module cannot be imported.*problem=Gone"):
        bm.evaluate(folder)


def test_what_cannot_travel_is_named_at_once() -> None:
    mine = Mine(2)
    mine.parts = {"lock": [threading.Lock()]}
    with pytest.raises(ConfigError, match=r"^problem.parts\['lock'\]\[0\]: an object of lock"):
        bm.train(mine, solver(), workers=2, steps=1)


def test_modules_that_are_not_installed_travel_by_value() -> None:
    assert by_value.is_loose(sys.modules[__name__])
    assert not any(by_value.is_loose(sys.modules[name]) for name in ("torch", "json", "bomemeta"))


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_saves_and_is_raised(tmp_path: Path, number: int, error: type[Any]) -> None:
    folder = str(tmp_path / "run")

    asked: list[int] = []

    class Stops(Mine):  # type: ignore[misc]
        def load(self, task_ids: Any, step: int, split: str) -> Any:
            if step == 2 and not asked:
                asked.append(step)
                os.kill(os.getpid(), number)
            return super().load(task_ids, step, split)

    Stops.__qualname__ = "Mine"
    before = signal.getsignal(number)
    with pytest.raises(error) as raised:
        bm.train(Stops(3), solver(), output_dir=folder, **SMALL | {"steps": 6})
    assert signal.getsignal(number) is before
    if number == signal.SIGINT:
        assert "interrupted after 3 steps; bomemeta.resume(" in str(raised.value)
    else:
        assert raised.value.code == 143
    whole = bm.train(Mine(tasks=3), solver(), **SMALL | {"steps": 6})
    assert bm.resume(folder, problem=Mine(3), workers=0).upper_sha256 == whole.upper_sha256


def test_every_name_is_there_and_every_class_is_exported() -> None:
    assert set(bm.__all__) <= set(dir(bm))
    for name in bm.__all__:
        assert getattr(bm, name) is not None
    for registry in (solvers, problems, datasets):
        for name in registry.names():
            cls = registry.get(name)
            if cls.__module__.startswith("bomemeta."):
                assert getattr(bm, cls.__name__) is cls, name
                assert inspect.getdoc(cls), name


def test_the_typed_names_are_the_exported_ones() -> None:
    """Tools that read and do not run see the block under TYPE_CHECKING."""
    import ast

    tree = ast.parse(Path(str(bm.__file__)).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.asname
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed | {"__version__"} == set(bm.__all__)


def test_all_keys_are_keyword_arguments_with_their_defaults() -> None:
    assert set(RunKeys.__annotations__) == set(Settings.model_fields)
    for function in (bm.train, bm.resume, bm.evaluate, bm.check, bm.doctor, bm.profile, bm.tune):
        parameters = inspect.signature(function).parameters
        assert parameters["shards"].default == 2
        assert set(Settings.model_fields) <= set(parameters)


# Fields, read off any class.


@dataclasses.dataclass
class Data:
    a: int
    b: list[int] = dataclasses.field(default_factory=list)
    _c: int = 0


class Plain(Recorded):
    def __init__(self, a: int, /, b: Any = 2, *rest: int, c: str = "c", **more: int) -> None:
        self.own = a


class OfDataclass(Data):
    def __init__(self, width: int) -> None:
        super().__init__(a=width)


class Bare:
    def __init__(self, a: int, b: int = 3) -> None:
        self.a, self._hidden = a, b


def test_fields_are_read_off_any_class() -> None:
    assert [field.name for field in fields_of(Data)] == ["a", "b"]
    assert [(field.name, field.default) for field in fields_of(Plain)][1:] == [("b", 2), ("c", "c")]
    assert [field.name for field in fields_of(OfDataclass)] == ["width"]
    assert values_of(Data(1)) == {"a": 1, "b": []}
    assert values_of(Plain(1, c="d", z=9)) == {"a": 1, "b": 2, "c": "d", "z": 9}
    assert values_of(Bare(1)) == {"a": 1}
    assert values_of(replaced(Mine(4), {"tasks": 5})) == {"tasks": 5, "curvature": 1.0}
    with pytest.raises(TypeError, match="takes no arguments"):
        type("Nothing", (Recorded,), {})(3)


def test_classes_count_by_name_where_their_module_moves() -> None:
    config = load_config({"problem": Mine(2), "solver": solver()}).to_dict()
    moved = config | {"problem": config["problem"] | {"class": "elsewhere:Mine"}}
    other = config | {"problem": config["problem"] | {"class": "test_objects:Other"}}
    assert differing_keys(config, moved) == []
    assert [difference.key for difference in differing_keys(config, other)] == ["problem.class"]


def test_the_first_signal_is_the_one_that_is_raised() -> None:
    with signals.stop_on_signal(lambda text: None, lambda state: None) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        assert stop.signal == signal.SIGINT
