"""What a run is made of: keys, and the objects of the sections `problem:`, `solver:` and `data:`.

Everything that is wrong with a config is reported at once, each line with its location, the key,
what was got and wanted.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from bomemeta.document import (
    Document,
    absolute_imports,
    apply_overrides,
    document_of,
    find_config,
    read_document,
)
from bomemeta.errors import ConfigError
from bomemeta.imports import is_file_entry, load_imports
from bomemeta.sections import (
    CLASS,
    SECTIONS,
    GivenObject,
    forget_other_classes_keys,
    plain,
    read_section,
    section_of,
    take_objects,
)
from bomemeta.validation import ConfigIssue, check

# Keys of registered classes that say where something lies and not what is computed.
_PLACES_ON_DISK = frozenset({"data.root", "data.path", "data.cache"})


# A key that cannot change a run's result, and so may differ on resume.
_RESULT_NEUTRAL = Field(json_schema_extra={"changes_result": False})
_Positive = Annotated[int, Field(ge=1)]
_NotNegative = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Evaluation(_Record):
    """How the result is measured: `episodes` at the end, `validation_episodes` every `every_steps`
    (None: never). `solve_steps`: steps on g alone, after which problems whose y persists are judged
    once more (None: they are not).
    """

    episodes: _Positive = 600
    every_steps: _Positive | None = None
    validation_episodes: _Positive = 100
    inner_steps: _NotNegative | None = None  # None: as many as in training
    solve_steps: _Positive | None = None
    examine_steps: _NotNegative | None = None  # None: 10 T, at most 1,000 or T; 0: no such metrics


class Checkpointing(_Record):
    every_steps: _Positive = 200
    keep: _Positive = 2


class Logging(_Record):
    every_steps: _Positive = 20
    tensorboard: bool = True
    to: list[Literal["mlflow", "wandb"]] = []


class Settings(_Record):
    """The keys that every run has, whatever its problem and solver. Times are in seconds."""

    imports: list[str] = []
    seed: _NotNegative = 0
    seeds: Annotated[_Positive, _RESULT_NEUTRAL] = 1
    steps: _Positive | None = None
    tasks_per_step: _Positive | None = None
    shards: _Positive = 2
    dtype: Literal["float32", "float64"] = "float32"
    compute_dtype: Literal["bfloat16"] | None = None
    micro_batch: _Positive | None = None
    device: Annotated[Literal["auto", "cpu", "cuda"], _RESULT_NEUTRAL] = "auto"
    task_map: Literal["auto", "loop", "vmap"] = "auto"
    workers: Annotated[_NotNegative | Literal["auto"], _RESULT_NEUTRAL] = 0
    min_workers: Annotated[_Positive, _RESULT_NEUTRAL] = 1  # workers: auto
    max_workers: Annotated[_Positive | None, _RESULT_NEUTRAL] = (
        None  # workers: auto; None: as many as shards
    )
    threads: _Positive = 1  # changes the result: a sum over more threads is added in another order
    cpus_per_worker: Annotated[float, Field(ge=0), _RESULT_NEUTRAL] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0), _RESULT_NEUTRAL] = 0.0
    worker_labels: Annotated[dict[str, str], _RESULT_NEUTRAL] = {}
    address: Annotated[str | None, _RESULT_NEUTRAL] = None
    address_wait_s: Annotated[float, Field(ge=0), _RESULT_NEUTRAL] = 600.0  # with --restarts
    reduce: Annotated[Literal["driver", "tree", "collective"], _RESULT_NEUTRAL] = "driver"
    backup_after: Annotated[Annotated[float, Field(gt=1)] | None, _RESULT_NEUTRAL] = None
    leaders_above: Annotated[_NotNegative | None, _RESULT_NEUTRAL] = 64
    step_timeout_s: Annotated[float, Field(gt=0), _RESULT_NEUTRAL] = 300.0
    start_timeout_s: Annotated[float, Field(gt=0), _RESULT_NEUTRAL] = 300.0
    max_replacements: Annotated[_NotNegative, _RESULT_NEUTRAL] = 100
    wait_for_room_s: Annotated[float, Field(ge=0), _RESULT_NEUTRAL] = 0.0
    output_dir: Annotated[str | None, _RESULT_NEUTRAL] = None
    evaluation: Annotated[Evaluation, _RESULT_NEUTRAL] = Evaluation()
    checkpoint: Annotated[Checkpointing, _RESULT_NEUTRAL] = Checkpointing()
    log: Annotated[Logging, _RESULT_NEUTRAL] = Logging()


class Config(Settings):
    """A checked config. Made by `load_config`, which fills in every default.

    `problem`, `solver` and `data` are objects of the classes that the sections name, or that were
    given from Python. A run works with copies: these are never changed.
    """

    problem: Any  # a Problem
    solver: Any  # a Solver
    data: Any = None  # what the problem reads, where it needs data

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, as JSON values; `load_config` of it gives an equal config."""
        made = {key: getattr(self, key) for key in SECTIONS}
        return {
            **self.model_dump(mode="json", exclude=set(SECTIONS)),
            **{key: None if each is None else section_of(key, each) for key, each in made.items()},
        }

    def result_keys(self) -> dict[str, Any]:
        """See `result_keys`."""
        return result_keys(self.to_dict())


# Keys that earlier versions wrote into every run folder and that never changed a result.
RETIRED = {"load_ahead"}

# What a config is read from: a file or its bare name, a mapping like one, or a checked config.
Source = str | Path | Mapping[str, Any] | Config


class KeyDifference(NamedTuple):
    key: str
    a: Any
    b: Any


def result_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys and values of everything in a `Config.to_dict()` that can change the result's
    bits.

    Imported files and classes count by name, not by folder or module, so that a run and its files
    may move together.
    """
    neutral = {key for key, field in Settings.model_fields.items() if field.json_schema_extra}
    neutral |= RETIRED
    keys: dict[str, Any] = {}
    for key, value in config.items():
        if key == "imports":
            keys[key] = [Path(entry).name if is_file_entry(entry) else entry for entry in value]
        elif key not in neutral:
            keys.update(
                {
                    dotted: str(leaf).rpartition(":")[2]
                    if dotted == f"{key}.{CLASS}"
                    else _without_paths(leaf)
                    for dotted, leaf in _flat(key, value)
                    if dotted not in _PLACES_ON_DISK
                }
            )
    return keys


# Keys that runs of earlier versions do not have, with what those did.
ADDED_KEYS: dict[str, Any] = {
    "problem.appended": [],
    "problem.rotation": "even",
    "problem.activation": "tanh",
    "data.deform": False,
    "solver.weight_decay": 0.0,
    "solver.upper_warmup_steps": 0,
    "solver.step_every": 1000,
    "solver.step_factor": 0.1,
    "solver.lower_optimizer": "sgd",
    "solver.lower_decay": 0.0,
    "solver.lower_momentum": 0.0,
    "solver.lower_schedule": "constant",
    "solver.inner_optimizer": "sgd",
    "solver.inner_momentum": 0.0,
    "solver.warm_start_steps": 0,
    "solver.upper_every": 1,
}


def differing_keys(
    a: Config | Mapping[str, Any], b: Config | Mapping[str, Any]
) -> list[KeyDifference]:
    """The result-changing keys in which two configs differ, in the config's order; None where one
    has no such key.

    A mapping is a `Config.to_dict()`; nothing in it is looked up, built or run.
    """
    mine, theirs = (
        result_keys(config.to_dict() if isinstance(config, Config) else config) for config in (a, b)
    )
    return [
        KeyDifference(key, mine.get(key), theirs.get(key))
        for key in {**mine, **theirs}
        if mine.get(key, ADDED_KEYS.get(key)) != theirs.get(key, ADDED_KEYS.get(key))
    ]


def load_config(
    source: Source,
    overrides: Sequence[str] = (),
    keys: Mapping[str, Any] | None = None,
) -> Config:
    """Reads, overrides and checks a config, running its `imports:` before names are looked up.

    `source` is a file (or its bare name, see `find_config`), a mapping as of `Config.to_dict()`, in
    which an object may stand for a section, or a config. `keys` are set over it: values of keys, with
    a mapping merged into the section or record of that name; a class in the place of a section's
    object takes the section's fields. `overrides` are `key.sub=value` texts over both. Where one
    names another solver, problem or data set, the keys of the old one that the new one does not have
    go with it; those that it has too stay. Raises ConfigError with one line for everything that is
    wrong.
    """
    if isinstance(source, Config):
        objects = {key: getattr(source, key) for key in SECTIONS}
        document = document_of({**source.model_dump(mode="json", exclude=set(SECTIONS)), **objects})
    elif isinstance(source, Mapping):
        document = document_of(source)
    else:
        document = read_document(find_config(source))
    document.data["imports"] = absolute_imports(document.data.get("imports") or [], document.folder)
    given = take_objects(document.data)
    document, more = _with_keys(document, keys or {})
    given |= more
    before = document.data
    document = apply_overrides(document, overrides)
    _retire(document)
    load_imports([entry for entry in _listed(document.data["imports"]) if isinstance(entry, str)])
    forget_other_classes_keys(
        before, document.data, {override.partition("=")[0].strip() for override in overrides}
    )

    found: list[ConfigIssue] = []
    made = {key: read_section(key, document, given, found) for key in SECTIONS}
    rest = {key: value for key, value in document.data.items() if key not in SECTIONS}
    settings = check(TypeAdapter(Settings), rest, (), list(Config.model_fields), found)
    if found:
        # In the order of the file; what has no line (a missing key, an override) comes first, as it
        # was found.
        lines = [f"{document.location(path)}: {text}" for path, text in found]
        raise ConfigError("\n".join(dict.fromkeys(sorted(lines, key=_line_number))))
    return Config(**dict(settings), **made)


def _retire(document: Document) -> None:
    for key in RETIRED & document.data.keys():
        if document.data.pop(key) is True:
            warnings.warn(
                f"{document.location((key,))}: {key} has no effect any more: it measured no gain. "
                "Take the key out",
                stacklevel=3,
            )


def _with_keys(
    document: Document, keys: Mapping[str, Any]
) -> tuple[Document, dict[str, GivenObject]]:
    """The document with Python values set over it, and the objects among them."""
    document = apply_overrides(document, ())  # a copy
    data = document.data
    for key, value in keys.items():
        if key in SECTIONS and isinstance(value, type):
            there = data.get(key)
            fields = there if isinstance(there, dict) else {}
            named = (SECTIONS[key].key, CLASS)
            data[key] = {CLASS: value} | {k: v for k, v in fields.items() if k not in named}
        elif isinstance(value, Mapping) and isinstance(data.get(key, {}), dict | None):
            data[key] = (data.get(key) or {}) | document_of(value).data
        else:
            data[key] = plain(value) if key not in SECTIONS else value
        for known in [known for known in document.locations if known[:1] == (key,)]:
            del document.locations[known]
        document.locations[(key,)] = f"argument {key}"
    if "imports" in keys:
        data["imports"] = absolute_imports(data["imports"], Path.cwd())
    return document, take_objects(data)


def _flat(key: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for name, below in value.items() for leaf in _flat(f"{key}.{name}", below)]
    return [(key, value)]


def _without_paths(leaf: Any) -> Any:
    """A list of what data is appended, without where it lies."""
    if not isinstance(leaf, list):
        return leaf
    return [
        {name: value for name, value in each.items() if name != "path"}
        if isinstance(each, dict)
        else each
        for each in leaf
    ]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _line_number(line: str) -> int:
    found = re.match(r".*?:(\d+): ", line)
    return int(found.group(1)) if found else 0
