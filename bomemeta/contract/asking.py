"""How a problem's methods are asked: every answer is looked at, and what is wrong is said in the
user's words.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from bomemeta.core.problem import Problem
from bomemeta.core.randomness import kept_generator
from bomemeta.core.tree import Params
from bomemeta.errors import BomemetaError, ConfigError

# What may draw from torch's global generator, which `map_tasks` seeds before each task.
DRAW = ("encode", "init_lower", "upper_loss", "lower_loss", "evaluate", "update_memory")

HERE = Path(__file__).parent


class Asker:
    """Asks one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @property
    def name(self) -> str:
        return type(self.problem).__name__

    def wrong(self, method: str, got: str, wanted: str, do: str = "") -> NoReturn:
        raise ConfigError(
            f"{self.name}.{method}: got {got}; wanted {wanted}{f'. To do: {do}' if do else ''}"
        )

    def call(self, method: str, *given: Any, **named: Any) -> Any:
        """The method's answer. What it raises is said with the user's own file and line."""
        function = self.attribute(method)
        try:
            if method not in DRAW:
                return function(*given, **named)
            with kept_generator(torch.device("cpu")) as drawn:  # as `map_tasks` does
                drawn.manual_seed(0)
                return function(*given, **named)
        except BomemetaError:
            raise
        except Exception as error:
            raise self._raised(method, error) from error

    def attribute(self, name: str) -> Any:
        """The attribute, which may be a property that raises."""
        try:
            return getattr(self.problem, name)
        except BomemetaError:
            raise
        except Exception as error:
            raise self._raised(name, error) from error

    def _raised(self, name: str, error: Exception) -> ConfigError:
        return ConfigError(
            f"{self.name}.{name}: raised {type(error).__name__}{location(error)}: {first_line(error)}"
        )

    def watched(self, method: str, *given: Params) -> Any:
        """`call`, and whether it changed what it was given or drew global random numbers."""
        before = [{name: t.detach().clone() for name, t in each.items()} for each in given]
        with self.no_randomness(method):
            answer = self.call(method, *given)
        for old, new in zip(before, given, strict=True):
            for name, tensor in old.items():
                if name not in new or not equal(tensor, new[name].detach()):
                    self.wrong(
                        method, f"{name}, one of its arguments, changed in place", "arguments that are left as they are",
                        "write a = a + b, not a += b, and no operation that ends in _",
                    )  # fmt: skip
        return answer

    @contextmanager
    def no_randomness(self, method: str) -> Iterator[None]:
        """Raises ConfigError where the body moves a global generator."""
        before = _random_states()
        yield
        after = _random_states()
        moved = {
            "torch": not torch.equal(before[0], after[0]),
            "numpy": not all(
                np.array_equal(a, b) for a, b in zip(before[1][1:3], after[1][1:3], strict=True)
            ),
            "Python": before[2] != after[2],
        }
        for whose, drew in moved.items():
            if drew:
                self.wrong(
                    method, f"random numbers of {whose}'s global generator", "numbers that are the same in every process",
                    "draw from a generator of your own, seeded with (self.seed, split, task id). In losses, encode and init_lower "
                    "torch's global generator will do (dropout): it is seeded from seed, step and task",
                )  # fmt: skip

    def tensors(self, method: str, answer: Any) -> Params:
        if not isinstance(answer, Mapping) or not answer:
            got = f"an empty {type(answer).__name__}" if answer in ({}, ()) else f"a {type(answer).__name__}"  # fmt: skip
            self.wrong(method, got, "a dict of names and tensors")
        for name, tensor in answer.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                got = f"{name!r}: a {type(tensor).__name__}"
                self.wrong(method, got, "a dict of names and tensors", "use torch.as_tensor")
            if tensor.device.type != "cpu":
                self.wrong(
                    method, f"{name} on device {tensor.device}", "tensors on the device of its arguments, here the CPU",
                    "name no device: bomemeta moves tensors to the worker's. New ones: x.new_zeros(...), device=x.device",
                )  # fmt: skip
        return dict(answer)

    def parameters(self, method: str, letter: str, answer: Any) -> Params:
        """x or y: floating-point numbers of the run's dtype, finite."""
        params = self.tensors(method, answer)
        for name, tensor in params.items():
            if tensor.dtype != self.problem.dtype:
                self.wrong(
                    method, f"{name} in {tensor.dtype}", f"every entry of {letter} in {self.problem.dtype}, the run's dtype",
                    f"add dtype=self.dtype, or .to(self.dtype). What is no number to be learned belongs in `load`, not in {letter}",
                )  # fmt: skip
            if not tensor.isfinite().all():
                self.wrong(method, f"{name} with NaN or infinite numbers", "finite numbers")
        return params


@contextmanager
def randomness_kept() -> Iterator[None]:
    states = _random_states()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _random_states() -> tuple[Tensor, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def equal(a: Tensor, b: Any) -> bool:
    """Whether two tensors hold the same numbers, NaN being equal to NaN."""
    if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def same(a: Params, b: Any) -> bool:
    return isinstance(b, Mapping) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def location(error: Exception) -> str:
    """The last line of the user's in the traceback, as ` at file:line`."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in frame.filename and Path(frame.filename).parent != HERE
    ]
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
