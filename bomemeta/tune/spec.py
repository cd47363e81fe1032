"""A tune file: a training config, what of it is varied, and how. Checked whole before anything
starts, without Ray.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from bomemeta.config import Config, load_config
from bomemeta.document import (
    Document,
    KeyPath,
    absolute_imports,
    apply_overrides,
    document_of,
    find_config,
    read_document,
)
from bomemeta.errors import ConfigError
from bomemeta.paths import made_absolute
from bomemeta.sections import forget_other_classes_keys
from bomemeta.tune.space import Domain, flat, read_space
from bomemeta.validation import ConfigIssue, check
from bomemeta.yaml_text import dump

_Positive = Annotated[int, Field(ge=1)]

# Keys that change a result and still cannot be searched over.
_FIXED = {
    "steps": "a scheduler compares trials of one length; set it in `overrides`",
    "imports": "it says what there is, not what is tried; set it in the base config",
}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Asha(_Record):
    """Successive halving: at `grace_steps` and every `reduction` times as far, the best 1 /
    `reduction` of the trials continue.
    """

    grace_steps: _Positive | None = None
    reduction: Annotated[float, Field(gt=1)] = 3.0


class Pbt(_Record):
    """Population-based training: every `every_steps` the worst `quantile` of the trials continue from
    one of the best, with other values.
    """

    every_steps: _Positive | None = None
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    resample: Annotated[float, Field(ge=0, le=1)] = 0.25
    together: bool = False


class TuneSettings(_Record):
    """The keys of a tune file."""

    base: str | dict[str, Any]
    overrides: dict[str, Any] = {}
    space: dict[str, Any]
    metric: str
    mode: Literal["min", "max"]
    trials: _Positive = 8
    report_every_steps: _Positive
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    asha: Asha = Asha()
    pbt: Pbt = Pbt()
    concurrent: _Positive | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    max_failures: Annotated[int, Field(ge=0)] = 3
    driver_cpus: Annotated[float, Field(ge=0)] = 1.0
    output_dir: str | None = None


# Keys that do not say what is searched, and may differ when a search is resumed.
RESULT_NEUTRAL = frozenset({"concurrent", "max_failures", "driver_cpus", "output_dir"})


@dataclass(frozen=True)
class Search:
    """A checked tune file. `base` is the training config as its file has it, so that a trial's
    values are set over what was written.
    """

    name: str
    settings: TuneSettings
    base: dict[str, Any]
    space: dict[str, Domain]
    config: Config  # the base config, checked
    objects: Mapping[str, Any] = field(default_factory=dict)  # given in the place of sections

    def overrides(self, values: Mapping[str, Any]) -> list[str]:
        """A trial's values as `key=value` texts over `base`."""
        return override_texts(values)

    def trial_config(self, values: Mapping[str, Any]) -> Config:
        """The config that trains with these values. Raises ConfigError where it is none."""
        return load_config(self.base, self.overrides(values), self.objects)

    def to_dict(self) -> dict[str, Any]:
        """The tune file with its base config written out and every default: `load_search` of it
        gives the same search.
        """
        return self.settings.model_dump(mode="json") | {"base": self.base, "overrides": {}}


def override_texts(values: Mapping[str, Any]) -> list[str]:
    """JSON is YAML, and Python's shortest decimals read back to the same bits."""
    return [f"{key}={json.dumps(value)}" for key, value in flat(values).items()]


def load_search(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    name: str | None = None,
    objects: Mapping[str, Any] | None = None,
) -> Search:
    """Reads and checks a tune file, its base config, and every key and end point of its space.

    `objects` stand in the place of the base config's sections.

    `source` is a file (or its bare name, as for `train`) or a mapping like one. Raises ConfigError
    with a line for everything that is wrong.
    """
    document = (
        document_of(source, "search")
        if isinstance(source, Mapping)
        else read_document(find_config(source))
    )
    document = apply_overrides(document, overrides)
    name = name or ("search" if isinstance(source, Mapping) else Path(document.name).stem)
    found: list[ConfigIssue] = []
    settings = check(
        TypeAdapter(TuneSettings), document.data, (), list(TuneSettings.model_fields), found
    )
    if settings is None:
        raise _everything(document, found)
    wrong: list[tuple[tuple[str, ...], str]] = []
    space = read_space(settings.space, wrong)
    if not settings.space:
        wrong.append(
            (
                (),
                "space: got {}, wanted at least one key with a domain, as in solver.upper_lr: {loguniform: [1e-4, 1e-1]}",
            )
        )
    found += [ConfigIssue(_key_path(document, path), text) for path, text in wrong]
    base = _base(document, settings)
    try:
        config = load_config(base, (), objects)
    except ConfigError as error:
        text = "\n".join(
            f"base: {line.removeprefix('config: ')}" for line in str(error).splitlines()
        )
        raise ConfigError(f"{document.location(('base',))}: {text}") from error
    found += [
        ConfigIssue(_key_path(document, tuple(key.split("."))), text)
        for key, text in _wrong_keys(base, config, space, settings, objects or {})
    ]
    found += [ConfigIssue((key,), text) for key, text in _wrong_settings(settings, config)]
    if found:
        raise _everything(document, found)
    return Search(name, settings, base, space, config, objects or {})


def _base(document: Document, settings: TuneSettings) -> dict[str, Any]:
    """The base config's values, with `overrides` and paths that mean the same in any process. An
    override that names another solver leaves out the old one's keys, as on the command line.
    """
    if isinstance(settings.base, str):
        beside = [document.folder / settings.base, document.folder / f"{settings.base}.yaml"]
        file = next((path for path in beside if path.is_file()), None) or find_config(settings.base)
        load_config(file)  # so that what is wrong in the file is said with its line
        base = read_document(file)
    else:
        base = document_of(settings.base)._replace(folder=document.folder)
    texts = override_texts(settings.overrides)
    before, base = base.data, apply_overrides(base, texts)
    forget_other_classes_keys(before, base.data, {text.partition("=")[0] for text in texts})
    return portable(base.data, base.folder)


def portable(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A config's values with absolute paths: imports from the config's folder, data from the
    current one, as `train` has it.
    """
    values = (
        {**values, "data": dict(data)}
        if isinstance(data := values.get("data"), dict)
        else {**values}
    )
    made_absolute(values, folder)
    return {**values, "imports": absolute_imports(values.get("imports") or [], folder)}


def _wrong_keys(
    base: dict[str, Any],
    config: Config,
    space: dict[str, Domain],
    settings: TuneSettings,
    objects: Mapping[str, Any],
) -> list[tuple[str, str]]:
    """Of the space: keys that the base config does not know, ends that it refuses, and keys that
    are not to be searched.
    """
    wrong: list[tuple[str, str]] = []
    for key, domain in space.items():
        if key in _FIXED:
            wrong.append((key, f"space.{key}: not to be searched over: {_FIXED[key]}"))
            continue
        for value in domain.ends():
            try:
                changed = load_config(base, override_texts({key: value}), objects)
            except ConfigError as error:
                reason = str(error).splitlines()[0].partition("': ")[2] or str(error)
                wrong.append((key, f"space.{key}: {reason}"))
                break
            if not any(
                known == key or known.startswith(f"{key}.") for known in changed.result_keys()
            ):
                wrong.append(
                    (
                        key,
                        f"space.{key}: not to be searched over: it cannot change a trial's result",
                    )
                )
                break
        if settings.scheduler == "pbt" and not (key.startswith("solver.") and domain.numeric):
            text = "pbt changes it while a trial runs, which is possible for numbers of the solver alone; use asha"
            wrong.append((key, f"space.{key}: {text}"))
    return wrong


def _wrong_settings(settings: TuneSettings, config: Config) -> list[tuple[str, str]]:
    wrong: list[tuple[str, str]] = []
    every = settings.report_every_steps
    if config.steps is not None and config.steps % every:
        wrong.append(
            (
                "report_every_steps",
                f"report_every_steps: got {every}, wanted a divisor of the run's steps, {config.steps}",
            )
        )
    if config.seeds > 1:
        wrong.append(
            (
                "base",
                f"base: has seeds: {config.seeds}, wanted 1. Search over seed: {{grid: [0, 1, 2]}} for several",
            )
        )
    if not isinstance(config.workers, int):
        wrong.append(
            (
                "base",
                f"base: has workers: {config.workers}, wanted a number: a trial's placement group has a fixed size",
            )
        )
    for name, steps in (
        ("asha.grace_steps", settings.asha.grace_steps),
        ("pbt.every_steps", settings.pbt.every_steps),
    ):
        if steps is not None and steps % every:
            wrong.append(
                (
                    name.partition(".")[0],
                    f"{name}: got {steps}, wanted a multiple of report_every_steps, {every}",
                )
            )
    if settings.scheduler == "pbt" and settings.trials < 2:
        wrong.append(
            ("trials", f"trials: got {settings.trials}, wanted at least 2 for scheduler: pbt")
        )
    return wrong


def _key_path(document: Document, path: tuple[str, ...]) -> KeyPath:
    """A dotted key is one key in the file, or one in each section."""
    return next(
        (
            ("space", *form)
            for form in ((".".join(path),), path)
            if ("space", *form) in document.locations
        ),
        ("space",),
    )


def _everything(document: Document, found: list[ConfigIssue]) -> ConfigError:
    return ConfigError(
        "\n".join(dict.fromkeys(f"{document.location(path)}: {text}" for path, text in found))
    )


def written(search: Search) -> str:
    """The search as YAML, for its folder."""
    return dump(search.to_dict())
