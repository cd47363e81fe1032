"""Bytes of live tensors while something runs in this process: the program's own count, the same at
every run and on every machine.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations return while it is entered; `peak` is the
    most at any time.

    A storage counts from the first operation that returns it until it is freed, but for those of
    `resident`. Left out is what an operation uses and frees within itself, and the memory of Python
    and of the libraries.
    """

    def __init__(self, resident: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._resident = [
            tensor.untyped_storage() for tensor in resident
        ]  # held, so that their identities stay theirs
        self._known = {id(storage) for storage in self._resident}
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, what is made does not count."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._paused:
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        # One Python object per storage for as long as it lives, so that its identity and its end
        # are the storage's.
        if id(storage) in self._known:
            return
        self._known.add(id(storage))
        weakref.finalize(storage, self._gone, id(storage), storage.nbytes()).atexit = False
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
