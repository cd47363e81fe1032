"""A second device without a GPU: tensors that say that they are elsewhere, and compute on the CPU.

What a GPU refuses is refused here: an operation on tensors of both devices, and an array made of a
tensor that is elsewhere. The numbers are the CPU's, so that a run here has to end with the bits of
a run there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import bomemeta.assembly as assembly

# Torch knows it, and has no kernels of its own for it.
DEVICE = torch.device("meta")
aten = torch.ops.aten
_COPIES = {aten._to_copy.default, aten.copy_.default}
_INDEXED = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}


class Seen(NamedTuple):
    """Copies from one device to the other in bytes each, and how often each operation ran there."""

    sent: list[int]
    brought: list[int]  # a GPU's queue has to run dry for each
    ran: Counter[torch._ops.OpOverload]


class _Elsewhere(torch.Tensor):
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> _Elsewhere:
        made: _Elsewhere = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    anywhere = any(isinstance(tensor, _Elsewhere) for tensor in tensors)
    if anywhere and func not in _COPIES:
        # A GPU takes numbers and indices from the CPU.
        bound = [
            arg for location, arg in enumerate(args) if not (location == 1 and func in _INDEXED)
        ]
        here = [
            leaf
            for leaf in tree_flatten((bound, kwargs))[0]
            if isinstance(leaf, torch.Tensor) and leaf.dim() > 0
        ]
        if not all(isinstance(tensor, _Elsewhere) for tensor in here):
            raise RuntimeError(
                f"{func}: Expected all tensors to be on the same device, but found {DEVICE} and cpu"
            )
    target = kwargs.get("device") or (DEVICE if anywhere else torch.device("cpu"))
    if func is aten.copy_.default:
        target = args[0].device

    def bare(leaf: Any) -> Any:
        return leaf.inner if isinstance(leaf, _Elsewhere) else leaf

    there = {
        **tree_map(bare, kwargs),
        **({"device": torch.device("cpu")} if "device" in kwargs else {}),
    }
    there.pop("pin_memory", None)
    out = func(*tree_map(bare, args), **there)
    if torch.Tag.inplace_view in func.tags:  # the outer tensor's shape changes as well
        with no_dispatch():
            func(*args, **kwargs)
    if torch.device(target).type == "cpu":
        return out
    known = {
        id(bare(tensor)): tensor for tensor in tensors
    }  # what works in place gives its argument back

    def outer(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else _Elsewhere(leaf)

    return tree_map(outer, out)


class _Dispatch(TorchDispatchMode):
    """Sees every operation, also those that make tensors from none."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = _run(func, args, kwargs or {})
        if any(isinstance(leaf, _Elsewhere) for leaf in tree_flatten((args, result))[0]):
            self._seen.ran[func] += 1
        if func in _COPIES:
            before = args[1] if func is aten.copy_.default else args[0]
            if isinstance(before, _Elsewhere) != isinstance(result, _Elsewhere):
                (self._seen.brought if isinstance(before, _Elsewhere) else self._seen.sent).append(
                    before.nbytes
                )
        elif func is aten._local_scalar_dense.default and isinstance(args[0], _Elsewhere):
            self._seen.brought.append(args[0].nbytes)
        return result


class _Made(TorchFunctionMode):
    """torch.tensor and its like move what they made where no dispatch mode sees it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        keys = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and keys.get("device") is not None:
            device = keys.pop("device")
            return func(*args, **keys).to(device)
        if func is torch.Tensor.new_tensor:
            return torch.tensor(args[1], dtype=keys.get("dtype", args[0].dtype)).to(args[0].device)
        return func(*args, **keys)


@contextmanager
def elsewhere() -> Iterator[Seen]:
    """Serial runs compute elsewhere; gives what this thread does meanwhile."""
    seen = Seen([], [], Counter())
    real = assembly._serial_device
    with ExitStack() as stack:
        stack.enter_context(_Dispatch(seen))
        stack.enter_context(_Made())
        stack.callback(setattr, assembly, "_serial_device", real)
        assembly._serial_device = lambda config: str(DEVICE)
        yield seen
