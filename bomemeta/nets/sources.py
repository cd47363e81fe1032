"""Where a backbone comes from: a name, a function, a module; and weights from a file."""

from __future__ import annotations

import copy
import difflib
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bomemeta.errors import ConfigError
from bomemeta.nets.backbones import BACKBONES, build_backbone
from bomemeta.nets.batch_norm import RunningBatchNorm, TaskBatchNorm

Source = str | nn.Module | Callable[[], nn.Module]

SHOWN = 8  # names in a message


def is_own(source: object) -> bool:
    """Whether the backbone is one of ours, whose convolutions are drawn from the run's generator."""
    return isinstance(source, str) and source in BACKBONES


def check_source(source: object) -> None:
    """Raises ConfigError where no backbone can be meant."""
    if isinstance(source, nn.Module) or (callable(source) and not isinstance(source, str)):
        return
    known = "wanted conv4, resnet12, torchvision/NAME, module:function, an nn.Module or a function"
    if not isinstance(source, str):
        raise ConfigError(f"backbone: got {source!r}; {known}")
    if source in BACKBONES or source.startswith("torchvision/") or ":" in source:
        return
    near = difflib.get_close_matches(source, [*BACKBONES, "torchvision/resnet18"], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"backbone: got {source!r}; {known}.{hint}")


def build_module(
    source: Source, channels: int, width: int, generator: torch.Generator, running: bool = False
) -> nn.Module:
    """A new module. What the source initialises at random is drawn from `generator`; weights that it
    brings are kept. `running`: conv4 and resnet12 with running averages. Raises ConfigError.
    """
    if isinstance(source, str) and source in BACKBONES:
        norm = RunningBatchNorm if running else TaskBatchNorm
        return build_backbone(source, channels, width, generator, norm)
    if isinstance(source, nn.Module):
        return copy.deepcopy(source)
    seed = int(torch.randint(2**62, (), generator=generator))
    # A module's initialisation draws from torch's global generator, which is put back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = _torchvision(source) if _is_torchvision(source) else _function(source)()
    if not isinstance(made, nn.Module):
        raise ConfigError(f"backbone: {source} gave {type(made).__name__}; wanted an nn.Module")
    return made


def load_weights(module: nn.Module, file: str) -> list[str]:
    """Loads a safetensors file, or a .pt file as torch.load(weights_only=True) reads it, into the
    module; returns notes. Raises ConfigError that names what the file does not have.
    """
    entries = _read(Path(file).expanduser())
    # DataParallel and torch.compile put a word before every name.
    for prefix in ("module.", "_orig_mod."):
        if entries and all(name.startswith(prefix) for name in entries):
            entries = {name.removeprefix(prefix): tensor for name, tensor in entries.items()}
    own = module.state_dict()
    missing = [name for name in own if name not in entries]
    shapes = [
        f"{name} {tuple(entries[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in entries and entries[name].shape != own[name].shape
    ]
    # A count of batches is used by no forward pass, and old files do not have it.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or shapes:
        parts = [f"missing: {_shown(missing)}"] * bool(missing)
        parts += [f"of another shape: {_shown(shapes)}"] * bool(shapes)
        left = [name for name in entries if name not in own]
        parts += [f"not in the network: {_shown(left)}"] * bool(left)
        raise ConfigError(f"weights: {file} does not fit the backbone; {'; '.join(parts)}")
    module.load_state_dict({name: entries[name] for name in own if name in entries}, strict=False)
    left = [name for name in entries if name not in own]
    return [f"weights: {file} has entries that the backbone has not: {_shown(left)}"] * bool(left)


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ConfigError(f"weights: {file} does not exist")
    try:
        if file.suffix == ".safetensors":
            safetensors: Any = importlib.import_module("safetensors.torch")
            entries: dict[str, Tensor] = safetensors.load_file(str(file))
            return entries
        found = torch.load(file, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ConfigError(f"weights: {file} needs the package safetensors ({error})") from error
    except Exception as error:  # what the readers raise for damaged files and for pickled code
        raise ConfigError(
            f"weights: {file} cannot be read ({type(error).__name__}: {error}). Wanted a safetensors file, or "
            "a file of tensors by torch.save(module.state_dict(), FILE)"
        ) from error
    # Training programs put the weights beside other things.
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ConfigError(f"weights: {file} holds {type(found).__name__}; wanted tensors by name")
    return dict(found)


def _is_torchvision(source: object) -> bool:
    return isinstance(source, str) and source.startswith("torchvision/")


def _torchvision(source: Any) -> nn.Module:
    """A torchvision classifier without its last linear layer."""
    models: Any = importlib.import_module("torchvision.models")
    name = source.removeprefix("torchvision/")
    if name not in models.list_models(module=models):
        near = difflib.get_close_matches(name, models.list_models(module=models), n=1)
        hint = f" Did you mean torchvision/{near[0]}?" if near else ""
        raise ConfigError(f"backbone: torchvision has no classifier {name!r}.{hint}")
    module: nn.Module = models.get_model(name, weights=None)
    last = [at for at, layer in module.named_modules() if isinstance(layer, nn.Linear)][-1]
    above, _, attribute = last.rpartition(".")
    setattr(module.get_submodule(above), attribute, nn.Identity())
    return module


def _function(source: Any) -> Callable[[], Any]:
    if not isinstance(source, str):
        found: Callable[[], Any] = source
        return found
    module, _, name = source.partition(":")
    try:
        made: Any = importlib.import_module(module)
        for part in name.split("."):
            made = getattr(made, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"backbone: {source} cannot be imported here: {error}") from error
    if not callable(made):
        raise ConfigError(f"backbone: {source} is {type(made).__name__}; wanted a function")
    function: Callable[[], Any] = made
    return function


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
