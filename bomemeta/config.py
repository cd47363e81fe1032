"""What a run is made of. Sections `problem:`, `solver:` and `data:` have the fields of the
registered classes as keys.

Everything that is wrong with a config is reported at once, each line with its location, the key,
what was got and wanted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, Required, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic.errors import PydanticUserError
from typing_extensions import TypedDict  # pydantic does not take typing's before Python 3.12

from bomemeta.document import (
    Document,
    absolute_imports,
    apply_overrides,
    describe,
    document_of,
    find_config,
    read_document,
)
from bomemeta.errors import ConfigError
from bomemeta.imports import is_file_entry, load_imports
from bomemeta.registry import Registry, datasets, problems, solvers
from bomemeta.validation import ConfigIssue, check


class SectionKind(NamedTuple):
    """A section whose keys are a registered class's fields, and the key that names the class."""

    registry: Registry
    key: str


SECTIONS = {
    "problem": SectionKind(problems, "name"),
    "solver": SectionKind(solvers, "name"),
    "data": SectionKind(datasets, "dataset"),
}

# Keys of registered classes that say where something lies and not what is computed.
_PLACES_ON_DISK = frozenset({"data.root", "data.path", "data.cache"})


# A key that cannot change a run's result, and so may differ on resume.
_ASIDE = Field(json_schema_extra={"changes_result": False})
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


class Checkpointing(_Record):
    every_steps: _Positive = 200
    keep: _Positive = 2


class Logging(_Record):
    every_steps: _Positive = 20
    tensorboard: bool = True


class Settings(_Record):
    """The keys that every run has, whatever its problem and solver. Times are in seconds."""

    imports: list[str] = []
    seed: _NotNegative = 0
    seeds: Annotated[_Positive, _ASIDE] = 1
    steps: _Positive | None = None
    tasks_per_step: _Positive | None = None
    shards: _Positive = 2
    dtype: Literal["float32", "float64"] = "float32"
    compute_dtype: Literal["bfloat16"] | None = None
    micro_batch: _Positive | None = None
    device: Annotated[Literal["auto", "cpu", "cuda"], _ASIDE] = "auto"
    task_map: Literal["auto", "loop", "vmap"] = "auto"
    workers: Annotated[_NotNegative | Literal["auto"], _ASIDE] = 0
    min_workers: Annotated[_Positive, _ASIDE] = 1  # workers: auto
    max_workers: Annotated[_Positive | None, _ASIDE] = (
        None  # workers: auto; None: as many as shards
    )
    threads: _Positive = 1  # changes the result: a sum over more threads is added in another order
    cpus_per_worker: Annotated[float, Field(ge=0), _ASIDE] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0), _ASIDE] = 0.0
    address: Annotated[str | None, _ASIDE] = None
    reduce: Annotated[Literal["driver", "tree", "collective"], _ASIDE] = "driver"
    backup_after: Annotated[Annotated[float, Field(gt=1)] | None, _ASIDE] = None
    load_ahead: Annotated[bool | Literal["auto"], _ASIDE] = "auto"
    step_timeout_s: Annotated[float, Field(gt=0), _ASIDE] = 300.0
    start_timeout_s: Annotated[float, Field(gt=0), _ASIDE] = 180.0
    max_replacements: Annotated[_NotNegative, _ASIDE] = 100
    output_dir: Annotated[str | None, _ASIDE] = None
    evaluation: Annotated[Evaluation, _ASIDE] = Evaluation()
    checkpoint: Annotated[Checkpointing, _ASIDE] = Checkpointing()
    log: Annotated[Logging, _ASIDE] = Logging()


@dataclasses.dataclass(frozen=True)
class Section:
    """One validated section: `name` as registered, `fields` of the class with all defaults filled
    in.
    """

    kind: Literal["problem", "solver", "data"]
    name: str
    fields: dict[str, Any]

    def build(self) -> Any:
        """A new instance of the registered class."""
        return SECTIONS[self.kind].registry.get(self.name)(**self.fields)

    def to_dict(self) -> dict[str, Any]:
        """The section as the config file would have it: JSON values only."""
        kind = SECTIONS[self.kind]
        fields = field_schema(kind.registry.get(self.name), kind).dump_python(
            self.fields, mode="json"
        )
        return {kind.key: self.name, **fields}


class Config(Settings):
    """A checked config. Made by `load_config`, which fills in every default."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    problem: Section
    solver: Section
    data: Section | None = None

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, as JSON values; `load_config` of it gives an equal config."""
        sections = {key: getattr(self, key) for key in SECTIONS}
        return {
            **self.model_dump(mode="json", exclude=set(SECTIONS)),
            **{key: section and section.to_dict() for key, section in sections.items()},
        }

    def result_keys(self) -> dict[str, Any]:
        """See `result_keys`."""
        return result_keys(self.to_dict())


class Difference(NamedTuple):
    key: str
    a: Any
    b: Any


def result_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys and values of everything in a `Config.to_dict()` that can change the result's
    bits.

    Imported files count by name, not by folder, so that a run and its files may move together.
    """
    aside = {key for key, field in Settings.model_fields.items() if field.json_schema_extra}
    keys: dict[str, Any] = {}
    for key, value in config.items():
        if key == "imports":
            keys[key] = [Path(entry).name if is_file_entry(entry) else entry for entry in value]
        elif key not in aside:
            keys.update(
                {
                    dotted: leaf
                    for dotted, leaf in _flat(key, value)
                    if dotted not in _PLACES_ON_DISK
                }
            )
    return keys


def differing_keys(
    a: Config | Mapping[str, Any], b: Config | Mapping[str, Any]
) -> list[Difference]:
    """The result-changing keys in which two configs differ, in the config's order; None where one
    has no such key.

    A mapping is a `Config.to_dict()`; nothing in it is looked up, built or run.
    """
    mine, theirs = (
        result_keys(config.to_dict() if isinstance(config, Config) else config) for config in (a, b)
    )
    return [
        Difference(key, mine.get(key), theirs.get(key))
        for key in {**mine, **theirs}
        if mine.get(key) != theirs.get(key)
    ]


def load_config(
    source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()
) -> Config:
    """Reads, overrides and checks a config, running its `imports:` before names are looked up.

    `source` is a file (or its bare name, see `find_config`), a mapping as of `Config.to_dict()`, or
    a config. Where an override names another solver, problem or data set, the keys of the old one
    that the new one does not have go with it; those that it has too stay. Raises ConfigError with
    one line for everything that is wrong.
    """
    if isinstance(source, Config):
        document = document_of(source.to_dict())
    elif isinstance(source, Mapping):
        document = document_of(source)
    else:
        document = read_document(find_config(source))
    document.data["imports"] = absolute_imports(document.data.get("imports") or [], document.folder)
    before = document.data
    document = apply_overrides(document, overrides)
    load_imports([entry for entry in _listed(document.data["imports"]) if isinstance(entry, str)])
    _forget_other_classes_keys(
        before, document.data, {override.partition("=")[0].strip() for override in overrides}
    )

    found: list[ConfigIssue] = []
    sections: dict[str, Section | None] = {}
    for key in SECTIONS:
        sections[key] = _check_section(key, document, found)
    rest = {key: value for key, value in document.data.items() if key not in SECTIONS}
    settings = check(TypeAdapter(Settings), rest, (), list(Config.model_fields), found)
    if found:
        # In the order of the file; what has no line (a missing key, an override) comes first, as it
        # was found.
        lines = [f"{document.location(path)}: {text}" for path, text in found]
        raise ConfigError("\n".join(dict.fromkeys(sorted(lines, key=_line_number))))
    parts: dict[str, Any] = {**dict(settings), **sections}
    return Config(**parts)


def _forget_other_classes_keys(
    before: Mapping[str, Any], data: dict[str, Any], overridden: set[str]
) -> None:
    """Takes out of a section whose class was overridden what only the old class has. What overrides
    give stays, to be checked.
    """
    for section, kind in SECTIONS.items():
        old, new = before.get(section), data.get(section)
        if (
            f"{section}.{kind.key}" not in overridden
            or not isinstance(old, Mapping)
            or not isinstance(new, dict)
        ):
            continue
        name = new.get(kind.key)
        if name == old.get(kind.key) or name not in kind.registry.names():
            continue
        known = {kind.key, *(field.name for field in config_fields(kind.registry.get(name)))}
        for field in set(old) - known:
            if f"{section}.{field}" not in overridden:
                del new[field]


def field_schema(cls: type[Any], kind: SectionKind) -> TypeAdapter[Any]:
    """Validates a mapping of the fields of a registered dataclass.

    Raises ConfigError where the class is no dataclass or a field's type cannot be a config key.
    """
    if not dataclasses.is_dataclass(cls):
        raise ConfigError(
            f"{kind.registry.kind} {cls.__name__} is not a dataclass; its fields are to be the config's keys"
        )
    try:
        hints = get_type_hints(cls, include_extras=True)
        keys: dict[str, Any] = {}
        for field in config_fields(cls):
            defaults = (field.default, field.default_factory)
            optional = any(default is not dataclasses.MISSING for default in defaults)
            keys[field.name] = (
                NotRequired[hints[field.name]] if optional else Required[hints[field.name]]
            )
        make: Any = TypedDict  # mypy knows only literal field lists
        typed = make(cls.__name__, keys)
        typed.__pydantic_config__ = _Record.model_config
        return TypeAdapter(typed)
    except (NameError, TypeError, PydanticUserError) as error:
        raise ConfigError(
            f"{kind.registry.kind} {cls.__name__}: a field's type cannot be a config key: {error}"
        ) from error


def config_fields(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    """The fields of a registered dataclass that are keys: those its constructor takes, except
    private ones.
    """
    return [
        field for field in dataclasses.fields(cls) if field.init and not field.name.startswith("_")
    ]


def _check_section(key: str, document: Document, found: list[ConfigIssue]) -> Section | None:
    kind = SECTIONS[key]
    values = document.data.get(key)
    if values is None and key == "data":
        return None
    known = f"one of: {', '.join(kind.registry.names())}"
    if not isinstance(values, dict):
        got = f"got {describe(values)}, " if key in document.data else "missing; "
        found.append(
            ConfigIssue((key,), f"{key}: {got}wanted a mapping with `{kind.key}:`, {known}")
        )
        return None
    name = values.get(kind.key)
    if not isinstance(name, str):
        got = f": got {describe(name)}, wanted" if kind.key in values else " is missing;"
        found.append(ConfigIssue((key, kind.key), f"{key}.{kind.key}{got} {known}"))
        return None
    try:
        cls = kind.registry.get(name)
        schema = field_schema(cls, kind)
    except ConfigError as error:
        found.append(ConfigIssue((key, kind.key), f"{key}.{kind.key}: {error}"))
        return None
    before = len(found)
    names = [field.name for field in config_fields(cls)]
    given = {field: value for field, value in values.items() if field != kind.key}
    fields = check(schema, given, (key,), [kind.key, *names], found)
    if len(found) > before:
        return None
    try:
        instance = cls(**fields)
    except (
        ConfigError,
        ValueError,
    ) as error:  # what the class itself refuses: a combination of its fields
        found.append(ConfigIssue((key,), f"{key}: {error}"))
        return None
    # Read back from the instance, so that defaults, and values that the class normalises, are what
    # is recorded.
    return Section(key, name, {field: getattr(instance, field) for field in names})  # type: ignore[arg-type]


def _flat(key: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for name, below in value.items() for leaf in _flat(f"{key}.{name}", below)]
    return [(key, value)]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _line_number(line: str) -> int:
    found = re.match(r".*?:(\d+): ", line)
    return int(found.group(1)) if found else 0
