"""torch's settings of a run: those that a fresh process has, whatever the caller has set, and the
caller's again afterwards. They change bits, or what an operation does at all.

Threads that a run starts have torch's own defaults for what a thread has of its own (gradients,
autocast, inference mode).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch


class Setting(NamedTuple):
    """One setting of the process: how it is read and set, and the value in a run."""

    name: str
    read: Callable[[], Any]
    set: Callable[[Any], object]
    value: Any


def settings(threads: int) -> list[Setting]:
    """Every setting of the process that a run has, in the order in which they are set. `threads`:
    torch's threads, which sums depend on.
    """
    backends: Any = torch.backends
    memory: Any = torch.utils.deterministic
    autograd: Any = torch.autograd
    c: Any = torch._C
    return [
        Setting("default dtype", torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        Setting("threads", torch.get_num_threads, torch.set_num_threads, threads),
        Setting("precision of products", _precisions, _set_precisions, ("highest", *_PRECISIONS.values())),
        Setting("mkldnn", c._get_mkldnn_enabled, c._set_mkldnn_enabled, True),
        *_optional(c, "mkldnn_deterministic", False),
        *_optional(c, "nnpack_enabled", True),
        _attribute("cudnn", backends.cudnn, "enabled", True),
        _attribute("cudnn benchmark", backends.cudnn, "benchmark", False),
        _attribute("cudnn deterministic", backends.cudnn, "deterministic", False),
        _attribute("opt_einsum", backends.opt_einsum, "enabled", backends.opt_einsum.is_available()),
        Setting("fast path of attention", backends.mha.get_fastpath_enabled, backends.mha.set_fastpath_enabled, True),
        *(Setting(f"{kind} attention", getattr(backends.cuda, f"{kind}_sdp_enabled"),
                  getattr(backends.cuda, f"enable_{kind}_sdp"), True)
          for kind in ("flash", "mem_efficient", "math", "cudnn")
          if hasattr(backends.cuda, f"enable_{kind}_sdp")),
        Setting("deterministic algorithms", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0),
        _attribute("filling of new memory", memory, "fill_uninitialized_memory", True),
        Setting("anomalies", _anomalies, lambda both: autograd.set_detect_anomaly(*both), (False, True)),
        Setting("flush denormal", _flushes_denormal, torch.set_flush_denormal, False),
    ]  # fmt: skip


def pin(threads: int) -> None:
    """Sets them for good: for a process of our own, once a user's files have been executed."""
    for setting in settings(threads):
        if setting.read() != setting.value:
            setting.set(setting.value)


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """A run's settings inside, the caller's again at the end. May be nested."""
    before = [(setting, setting.read()) for setting in settings(threads)]
    with contextlib.ExitStack() as stack:
        for setting, old in before:
            if old != setting.value:
                setting.set(setting.value)
            stack.callback(_restore, setting, old)
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        # A default device costs something in every call: only where the caller has one too.
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        yield


def _restore(setting: Setting, old: Any) -> None:
    if setting.read() != old:
        setting.set(old)


def _attribute(name: str, owner: Any, attribute: str, value: Any) -> Setting:
    return Setting(
        name,
        lambda: getattr(owner, attribute),
        lambda new: setattr(owner, attribute, new),
        value,
    )


def _optional(c: Any, name: str, value: bool) -> list[Setting]:
    """A switch that not every version of torch has."""
    if not hasattr(c, f"_get_{name}") or not hasattr(c, f"_set_{name}"):
        return []
    return [Setting(name, getattr(c, f"_get_{name}"), getattr(c, f"_set_{name}"), value)]


# What float32 products are computed in. cuDNN's are in TF32 unless told otherwise: torch's default.
_PRECISIONS = {
    ("generic", "all"): "none",
    ("mkldnn", "all"): "none",
    ("mkldnn", "matmul"): "none",
    ("mkldnn", "conv"): "none",
    ("mkldnn", "rnn"): "none",
    ("cuda", "all"): "none",
    ("cuda", "matmul"): "none",
    ("cuda", "conv"): "tf32",
    ("cuda", "rnn"): "tf32",
}


def _precisions() -> tuple[str | None, ...]:
    """The one text of old, and one for each backend and operation, which torch has since 2.9. The
    first is None where the two contradict each other: torch then refuses to tell it.
    """
    c: Any = torch._C
    try:
        one: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        one = None
    if not hasattr(c, "_get_fp32_precision_getter"):
        return (one, *(_PRECISIONS.values()))
    return (one, *(c._get_fp32_precision_getter(*key) for key in _PRECISIONS))


def _set_precisions(values: tuple[str | None, ...]) -> None:
    c: Any = torch._C
    one, *each = values
    if one is not None and _precisions()[0] != one:
        torch.set_float32_matmul_precision(one)  # sets some of the others too, so it comes first
    if hasattr(c, "_set_fp32_precision_setter"):
        for key, value in zip(_PRECISIONS, each, strict=True):
            c._set_fp32_precision_setter(*key, value)


def _anomalies() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def _flushes_denormal() -> bool:
    """torch sets it and does not tell it: the smallest number's half is 0 then."""
    return bool(torch.tensor(1e-310, dtype=torch.float64, device="cpu") * 0.5 == 0)
