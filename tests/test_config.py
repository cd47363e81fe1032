"""Configs: every kind of mistake is named where it was made, and a config survives the trip through
its dict.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field

from bomemeta.config import Config, differing_keys, load_config
from bomemeta.core.arguments import values_of
from bomemeta.document import find_config, shipped_configs
from bomemeta.errors import ConfigError
from bomemeta.imports import Imports
from bomemeta.registry import datasets, problems, solvers


@dataclass(frozen=True, kw_only=True)
class FakeSolver:
    inner_steps: Annotated[int, Field(ge=1)] = 10
    upper_lr: Annotated[float, Field(gt=0)] = 0.1
    barrier: Literal["global", "per_task"] = "global"
    betas: tuple[float, float] = (0.9, 0.999)
    decay: float | None = None
    _cache: int = 0
    derived: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.barrier == "per_task" and self.inner_steps == 1:
            raise ConfigError("barrier: per_task needs inner_steps >= 2")


@dataclass(frozen=True, kw_only=True)
class FakeProblem:
    ways: int
    schema: str = "plain"  # a name that pydantic's own model class would have


@dataclass(frozen=True, kw_only=True)
class FakeData:
    root: str | None = None
    rotations: bool = False


@dataclass(frozen=True, kw_only=True)
class OtherData(FakeData): ...


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry, cls in ((solvers, FakeSolver), (problems, FakeProblem), (datasets, FakeData)):
        monkeypatch.setattr(registry, "_loaded", True)
        monkeypatch.setattr(registry, "_classes", {"fake": cls})
    monkeypatch.setitem(datasets._classes, "learn2learn/fake", OtherData)


@pytest.fixture(autouse=True)
def forget_user_files() -> Iterator[None]:
    yield
    for name in [name for name in sys.modules if name.startswith("bomemeta_user")]:
        del sys.modules[name]


GOOD = """\
steps: 10
problem: {name: fake, ways: 5}
solver:
  name: fake
  inner_steps: 3
data: {dataset: learn2learn/fake, root: /somewhere}
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str, name: str = "a.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def message_of(source: Any, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(source, overrides)
    return str(error.value)


def test_defaults_are_filled_in_and_sections_build_their_class(write: Any) -> None:
    config = load_config(write(GOOD))
    assert config.steps == 10
    assert config.shards == 2
    assert config.evaluation.episodes == 600
    assert config.solver == FakeSolver(inner_steps=3)
    assert config.problem == FakeProblem(ways=5)
    assert config.data is not None
    assert config.to_dict()["data"]["dataset"] == "learn2learn/fake"
    assert values_of(config.solver) == {
        "inner_steps": 3, "upper_lr": 0.1, "barrier": "global", "betas": (0.9, 0.999), "decay": None,
    }  # fmt: skip


def test_round_trips_through_dict_json_yaml_and_pickle(write: Any) -> None:
    config = load_config(write(GOOD), ["solver.upper_lr=1e-3", "solver.betas=[0.5, 1]"])
    tree = config.to_dict()
    assert load_config(tree) == config
    assert load_config(json.loads(json.dumps(tree))).to_dict() == tree
    assert load_config(write(yaml.safe_dump(tree), "b.yaml")) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert load_config(config) == config
    assert load_config(config, ["steps=11"]).steps == 11


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "0.1e-2", ".1e-2", "+1e-3", "0.001"])
def test_numbers_that_yaml_1_1_reads_as_text_are_numbers(write: Any, text: str) -> None:
    assert load_config(write(GOOD), [f"solver.upper_lr={text}"]).solver.upper_lr == 0.001
    assert (
        load_config(write(GOOD.replace("inner_steps: 3", f"upper_lr: {text}"))).solver.upper_lr
        == 0.001
    )


def test_an_integer_is_a_float_and_keeps_that_type(write: Any) -> None:
    value = load_config(write(GOOD), ["solver.upper_lr=1"]).solver.upper_lr
    assert type(value) is float


@pytest.mark.parametrize(
    ("override", "got", "wanted"),
    [
        ("steps=ten", "'ten' (str)", "an integer >= 1 or null"),
        ("steps='3'", "'3' (str)", "an integer >= 1 or null. Leave the quotes out"),
        ("steps=true", "True (bool)", "an integer >= 1 or null"),
        ("steps=3.5", "3.5 (float)", "an integer >= 1 or null"),
        ("steps=0", "0 (int)", "an integer >= 1 or null"),
        ("seed=-1", "-1 (int)", "an integer >= 0"),
        ("workers=-1", "-1 (int)", "an integer >= 0 or auto"),
        ("dtype=float16", "'float16' (str)", "one of: float32, float64"),
        ("step_timeout_s=0", "0 (int)", "a number > 0"),
        ("step_timeout_s=.inf", "inf (float)", "a number > 0"),
        ("tasks_per_step=x", "'x' (str)", "an integer >= 1 or null"),
        ("imports=a.py", "'a.py' (str)", "a list (each a text)"),
        ("evaluation.episodes=x", "'x' (str)", "an integer >= 1"),
        ("solver.inner_steps=true", "True (bool)", "an integer >= 1"),
        ("solver.upper_lr=true", "True (bool)", "a number > 0"),
        ("solver.barrier=none", "'none' (str)", "one of: global, per_task"),
        ("solver.betas=[1]", "[1] (list)", "a list of length 2"),
        ("data.rotations=1", "1 (int)", "true or false"),
    ],
)  # fmt: skip
def test_wrong_values_say_key_got_and_wanted(
    write: Any, override: str, got: str, wanted: str
) -> None:
    key = override.partition("=")[0]
    assert (
        message_of(write(GOOD), override)
        == f"override {override!r}: {key}: got {got}, wanted {wanted}"
    )


def test_a_wrong_value_in_a_file_names_file_and_line(write: Any) -> None:
    path = write(GOOD.replace("inner_steps: 3", "inner_steps: 0"))
    assert message_of(path) == f"{path}:5: solver.inner_steps: got 0 (int), wanted an integer >= 1"


def test_an_unknown_key_names_the_line_and_the_nearest_key(write: Any) -> None:
    path = write(GOOD.replace("inner_steps", "inner_step"))
    assert (
        message_of(path)
        == f"{path}:5: solver.inner_step is not a key. Did you mean solver.inner_steps?"
    )
    path = write(GOOD + "step_timeout: 3\n")
    assert message_of(path) == f"{path}:7: step_timeout is not a key. Did you mean step_timeout_s?"
    path = write(GOOD + "evaluation:\n  episode: 3\n")
    assert (
        message_of(path)
        == f"{path}:8: evaluation.episode is not a key. Did you mean evaluation.episodes?"
    )


@pytest.mark.parametrize(
    "key", ["solver.inner_step", "solver._cache", "solver.derived", "shard", "log.zzz", "zzz.zzz"]
)
def test_an_unknown_key_in_an_override_names_the_override(write: Any, key: str) -> None:
    top = "zzz" if key == "zzz.zzz" else key
    assert message_of(write(GOOD), f"{key}=1").startswith(
        f"override '{key}=1': {top} is not a key. "
    )


@pytest.mark.parametrize(
    "override",
    ["steps", "=3", "solver.=3", ".x=1", "steps.more=3", "steps=[1", "seed={a: 1, a: 2}"],
)
def test_a_malformed_override_is_quoted(write: Any, override: str) -> None:
    assert message_of(write(GOOD), override).startswith(f"override {override!r}: ")


def test_another_class_takes_the_keys_that_it_has_too(write: Any) -> None:
    @solvers.register("fake_other")
    @dataclass(frozen=True, kw_only=True)
    class FakeOther:
        upper_lr: float = 0.5
        momentum: float = 0.9

    path = write(GOOD.replace("inner_steps: 3", "inner_steps: 3\n  upper_lr: 0.25"))
    config = load_config(path, ["solver.name=fake_other"])
    assert values_of(config.solver) == {"upper_lr": 0.25, "momentum": 0.9}
    assert message_of(path, "solver.name=fake_other", "solver.inner_steps=4").startswith(
        "override 'solver.inner_steps=4': "
    )
    assert message_of(path, "solver.name=fake_othr").startswith(
        "override 'solver.name=fake_othr': "
    )


def test_the_last_override_wins_and_places_follow_it(write: Any) -> None:
    assert load_config(write(GOOD), ["steps=3", "steps=4"]).steps == 4
    assert message_of(write(GOOD), "solver={name: fake, x: 1}").startswith(
        "override 'solver={name: fake, x: 1}': solver.x"
    )


def test_everything_wrong_is_reported_at_once_in_the_order_of_the_file(write: Any) -> None:
    path = write(
        "steps: x\nproblem: {name: fake}\nsolver:\n  name: fake\n  upper_lr: -1\nseedd: 1\n"
    )
    assert message_of(path).splitlines() == [
        f"{path}:1: steps: got 'x' (str), wanted an integer >= 1 or null",
        f"{path}:2: problem.ways is missing; wanted an integer",
        f"{path}:5: solver.upper_lr: got -1 (int), wanted a number > 0",
        f"{path}:6: seedd is not a key. Did you mean seed?",
    ]


def test_missing_sections_and_names(write: Any) -> None:
    path = write("steps: 3\nsolver:\n  inner_steps: 3\n")
    assert message_of(path).splitlines() == [
        f"{path}: problem: missing; wanted a mapping with `name:`, one of: fake",
        f"{path}:2: solver.name is missing; one of: fake",
    ]
    path = write("problem: fake\nsolver: {name: 3}\n")
    assert message_of(path).splitlines() == [
        f"{path}:1: problem: got 'fake' (str), wanted a mapping with `name:`, one of: fake",
        f"{path}:2: solver.name: got 3 (int), wanted one of: fake",
    ]


def test_an_unknown_class_names_the_nearest(write: Any) -> None:
    path = write(GOOD.replace("  name: fake", "  name: fakes"))
    assert message_of(path).startswith(
        f"{path}:4: solver.name: 'fakes' is not a solver. Did you mean fake?"
    )


def test_what_the_class_itself_refuses_is_reported_at_its_section(write: Any) -> None:
    path = write(GOOD.replace("inner_steps: 3", "inner_steps: 1\n  barrier: per_task"))
    assert message_of(path) == f"{path}:3: solver: barrier: per_task needs inner_steps >= 2"


@pytest.mark.parametrize(
    ("text", "line", "wanted_message"),
    [
        ("steps: 3\nsolver: [1\n", ":3", "not valid YAML"),
        ("steps: 3\nsteps: 4\n", ":2", "steps is given twice (first in line 1)"),
        ("solver:\n  a: 1\n  b: 2\n  a: 3\n", ":4", "a is given twice (first in line 2)"),
        ("- 1\n- 2\n", ":1", "a config is a mapping"),
        ("just text", ":1", "a config is a mapping"),
        ("", "", "the file is empty"),
        ("# only a comment\n", "", "the file is empty"),
        ("steps: !!python/object/apply:os.system [ls]\n", ":1", "not valid YAML"),
        ("a: &x [1]\nb: *x\n", ":1", "anchors (&name) are not supported"),
        ("a: 1\nb: *x\n", ":2", "aliases (*name) are not supported"),
        ("a: 1\n---\nb: 1\n", ":2", "not valid YAML"),
        ("a: !!int ''\n", ":1", "tags (!!name) are not supported"),
        ("a: " + "[" * 1200, ":1", "nested more than 20 deep"),
        ("a: 1\nsteps: 1e400\n", ":2", "1e400 is greater than any number of 64 bits"),
        ("steps: " + "9" * 6000, ":1", "an integer of 6000 digits"),
        ("a: \x07\n", "", "not valid YAML"),
    ],
)
def test_text_that_is_no_config_names_the_line(
    write: Any, text: str, line: str, wanted_message: str
) -> None:
    path = write(text)
    message = message_of(path)
    assert message.startswith(f"{path}{line}: ")
    assert wanted_message in message


def test_a_missing_file_suggests_the_nearest(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(GOOD, "quickstart.yaml")
    assert message_of(tmp_path / "quickstrt.yaml").endswith(
        f"Did you mean {tmp_path / 'quickstart.yaml'}?"
    )
    assert "There are: " in message_of(tmp_path / "zzz.yaml")
    assert message_of(tmp_path / "none" / "a.yaml").endswith(
        f"no .yaml file in {tmp_path / 'none'}"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    write(GOOD, "configs/other.yaml")
    for name in ("quickstart", "quickstart.yaml", "other", "other.yaml", "configs/other"):
        assert load_config(name).steps == 10
    assert message_of("othr").endswith("Did you mean configs/other.yaml?")


def test_a_config_that_comes_with_bomemeta_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart") == shipped_configs() / "quickstart.yaml"
    assert message_of("quickstrt").endswith("Did you mean quickstart?")
    assert message_of("configs/quickstart.yaml").endswith("Did you mean quickstart?")
    assert "quickstart, " in message_of("zzz")
    text = (shipped_configs() / "quickstart.yaml").read_text(encoding="utf-8")
    (tmp_path / "quickstart.yaml").write_text(text)
    assert find_config("quickstart") == Path("quickstart.yaml")  # the user's own file comes first


def test_result_keys_leave_out_what_cannot_change_the_result(write: Any) -> None:
    path = write(GOOD)
    a = load_config(path)
    aside = ["workers=3", "device=cpu", "data.root=/elsewhere", "log.every_steps=1", "checkpoint.keep=9",
             "evaluation.every_steps=5", "output_dir=x", "cpus_per_worker=2", "gpus_per_worker=0.5",
             "step_timeout_s=9", "address=auto"]  # fmt: skip
    assert differing_keys(a, load_config(path, aside)) == []
    counts = [
        "seed=1",
        "shards=4",
        "threads=2",
        "dtype=float64",
        "task_map=vmap",
        "solver.upper_lr=0.2",
        "steps=11",
    ]
    b = load_config(path, counts)
    assert {(key, x, y) for key, x, y in differing_keys(a, b)} == {
        ("seed", 0, 1), ("shards", 2, 4), ("threads", 1, 2), ("dtype", "float32", "float64"), 
        ("task_map", "auto", "vmap"), ("solver.upper_lr", 0.1, 0.2), ("steps", 10, 11),
    }  # fmt: skip
    assert ("data.dataset", "learn2learn/fake", "fake") in differing_keys(
        a, load_config(path, ["data.dataset=fake"])
    )
    assert ("data.dataset", "learn2learn/fake", None) in differing_keys(
        a, load_config(path, ["data=null"])
    )


USER_FILE = """\
from __future__ import annotations
from dataclasses import dataclass
from bomemeta.registry import solvers

@solvers.register("mine")
@dataclass(frozen=True, kw_only=True)
class Mine:
    power: float = 2.0

def kernel(x):
    return x ** 2
"""


def test_imports_start_at_the_config_and_register_before_names_are_looked_up(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(USER_FILE, "my-solver.py")
    text = (
        "imports: [my-solver.py]\nsteps: 1\nproblem: {name: fake, ways: 2}\nsolver: {name: mine}\n"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_config(write(text))
    assert config.imports == [str(tmp_path / "my-solver.py")]
    assert config.solver.power == 2.0
    assert load_config(config.to_dict()) == config
    assert config.result_keys()["imports"] == ["my-solver.py"]
    kernel = sys.modules["bomemeta_user.my_solver"].kernel
    assert pickle.loads(pickle.dumps(kernel)) is kernel  # by reference, as Ray sends it
    overridden = load_config(
        write(text), ["imports=[../my-solver.py, json]"]
    )  # typed here, so it starts here
    assert overridden.imports == [str(tmp_path / "my-solver.py"), "json"]


def test_the_same_text_runs_once_and_a_changed_text_again(write: Any) -> None:
    from bomemeta.imports import execute_imports, read_imports

    path = write("RUNS = object()\n", "once.py")
    execute_imports(read_imports([str(path)]))
    first = sys.modules["bomemeta_user.once"].RUNS
    execute_imports(read_imports([str(path)]))
    assert sys.modules["bomemeta_user.once"].RUNS is first
    path.write_text("RUNS = 2\n")
    imports = read_imports([str(path)])
    path.unlink()  # a worker on another machine never sees the file
    execute_imports(pickle.loads(pickle.dumps(imports)))
    assert sys.modules["bomemeta_user.once"].RUNS == 2


@pytest.mark.parametrize(
    ("source", "line", "cause"),
    [
        ("x = 1\ny = 1 / 0\n", 2, ZeroDivisionError),
        ("x = 1\n\ny = = 2\n", 3, SyntaxError),
        ("import nowhere_x", 1, ImportError),
    ],
)
def test_an_error_in_a_users_file_names_its_line(
    write: Any, source: str, line: int, cause: type[Exception]
) -> None:
    path = write(source, "bad.py")
    with pytest.raises(ConfigError) as error:
        load_config({"imports": [str(path)]})
    assert str(error.value).startswith(
        f"imports: {path}:{line}: {cause.__name__}"
        if cause is not ImportError
        else f"imports: {path}:1: "
    )
    assert isinstance(error.value.__cause__, cause)
    assert "bomemeta_user.bad" not in sys.modules


def test_a_class_of_an_earlier_configs_import_travels_with_its_file(write: Any) -> None:
    write(USER_FILE, "my-solver.py")
    text = "steps: 1\nproblem: {name: fake, ways: 2}\nsolver: {name: mine}\n"
    first = load_config(write("imports: [my-solver.py]\n" + text))
    second = load_config(write(text))
    assert type(second.solver) is type(first.solver)
    sent = pickle.dumps((Imports.of(second.imports, [second.solver]), second.solver))
    del sys.modules["bomemeta_user.my_solver"]  # as in a worker
    assert type(pickle.loads(sent)[1]).__name__ == type(first.solver).__name__


def test_imports_that_cannot_be_found(write: Any, tmp_path: Path) -> None:
    assert message_of({"imports": [str(tmp_path / "no.py")]}).startswith(
        f"imports: cannot read {tmp_path / 'no.py'}: No such"
    )
    assert "module 'no_such_module' cannot be imported: ModuleNotFoundError" in message_of(
        {"imports": ["no_such_module"]}
    )
    (tmp_path / "x").mkdir()
    entries = [str(write("", "twin.py")), str(write("", "x/twin.py"))]
    assert "would both be the module bomemeta_user.twin" in message_of({"imports": entries})


def test_a_class_whose_fields_cannot_be_keys_is_refused(write: Any) -> None:
    class NoDataclass: ...

    @dataclass
    class Odd:
        thing: Config | NoDataclass

    @dataclass
    class Lost:
        thing: int

    Odd.__annotations__["thing"] = NoDataclass
    Lost.__annotations__["thing"] = "Nowhere"
    solvers._classes.update(odd=Odd, lost=Lost)
    assert "solver.thing is missing; wanted a value" in message_of(
        write(GOOD), "solver={name: odd}"
    )
    assert "solver.thing: got 3" in message_of(write(GOOD), "solver={name: odd, thing: 3}")
    assert "cannot be a config key" in message_of(write(GOOD), "solver={name: lost}")


def test_a_key_of_earlier_versions_has_no_effect_and_says_so(write: Any) -> None:
    path = write(GOOD + "load_ahead: auto\n")
    plain = load_config(path)  # as every run folder of earlier versions has it
    with pytest.warns(UserWarning, match="load_ahead has no effect any more.*Take the key out"):
        asked = load_config(path, ["load_ahead=true"])
    assert asked == plain
    assert "load_ahead" not in plain.to_dict()
    assert differing_keys({**plain.to_dict(), "load_ahead": True}, plain) == []
