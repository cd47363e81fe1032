"""What became of an input, and the counts of many."""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bomemeta.errors import BomemetaError

ACCEPTED, REFUSED, RAW, SILENT, SLOW = "accepted", "refused", "raw", "silent", "slow"


class Silent(Exception):
    """An input was taken for something that it does not say."""


class Slow(BaseException):
    """Longer than an input may take: what it asks for is large, and no fault by itself."""


Target = Callable[[random.Random, Path], None]


@dataclass
class Counts:
    """Of one kind of input: how many had which result, and an example of everything that is wrong."""

    of: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    example: dict[str, int] = field(default_factory=dict)

    def add(self, outcome: str, what: str | None, number: int) -> None:
        self.of[outcome] += 1
        if what is not None:
            self.wrong[what] += 1
            self.example.setdefault(what, number)

    def merge(self, other: Counts) -> None:
        self.of.update(other.of)
        self.wrong.update(other.wrong)
        for what, number in other.example.items():
            self.example.setdefault(what, number)


def judge(
    kind: str, target: Target, seed: int, number: int, limit_s: float
) -> tuple[str, str | None]:
    """What became of input `number` of this kind: an outcome, and for a fault where it is."""
    rng = random.Random(f"{seed}/{kind}/{number}")
    folder = Path(tempfile.mkdtemp(prefix="bomemeta-fuzz-"))
    try:
        with _limited(limit_s):
            target(rng, folder)
    except BomemetaError as error:
        if not str(error).strip():
            return RAW, "an error without a message"
        return REFUSED, None
    except Silent as error:
        return SILENT, f"silent: {error}"
    except Slow:
        return SLOW, None
    except BaseException as error:
        return RAW, f"{type(error).__name__} at {_where(error)}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return ACCEPTED, None


def _where(error: BaseException) -> str:
    """The innermost line of bomemeta's that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/bomemeta/" in frame.filename]
    last = (own or frames)[-1]
    return f"{last.filename.rpartition('/bomemeta/')[2]}:{last.name}"


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    if seconds <= 0:
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise Slow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def quiet() -> None:
    """No warnings of libraries: thousands of odd inputs make thousands of lines."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable()
