"""What a search may vary: `solver.upper_lr: {loguniform: [1e-4, 1e-1]}`, read and checked without
Ray.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from bomemeta.document import describe


class _Kind(NamedTuple):
    """One kind of domain: what it wants, in words and as a test of its arguments, and how many
    numbers it has.
    """

    wanted: str
    numbers: int  # 0: a list of values of any type
    holds: Callable[..., bool]
    whole: bool = False  # integers only


KINDS = {
    "uniform": _Kind("[a, b] with a < b", 2, lambda a, b: a < b),
    "loguniform": _Kind("[a, b] with 0 < a < b", 2, lambda a, b: 0 < a < b),
    "quniform": _Kind("[a, b, q] with a < b and 0 < q <= b - a", 3, lambda a, b, q: a < b and 0 < q <= b - a),
    "randint": _Kind("[a, b] of integers with a < b; b itself is never drawn", 2, lambda a, b: a < b, whole=True),
    "lograndint": _Kind(
        "[a, b] of integers with 0 < a < b; b itself is never drawn", 2, lambda a, b: 0 < a < b, whole=True
    ),
    "choice": _Kind("a list of values to draw from", 0, lambda *values: len(values) > 0),
    "grid": _Kind("a list of values that are all tried", 0, lambda *values: len(values) > 0),
}  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """The values of one key: a kind of KINDS with its arguments."""

    kind: str
    arguments: tuple[Any, ...]

    def ends(self) -> list[Any]:
        """The values that a config must accept for all others to be accepted: both ends, or each of
        a list.
        """
        kind = KINDS[self.kind]
        if kind.numbers == 0:
            return list(self.arguments)
        low, high = self.arguments[:2]
        return [low, high - 1 if kind.whole else high]

    def within(self, value: Any) -> Any:
        """The nearest value of this domain, for one that was multiplied by a factor."""
        kind = KINDS[self.kind]
        if kind.numbers == 0:
            return value
        low, high = self.ends()
        if self.kind == "quniform":
            step = self.arguments[2]
            value = low + round((value - low) / step) * step
        return min(max(round(value) if kind.whole else value, low), high)

    @property
    def numeric(self) -> bool:
        """Whether all values are numbers, which true and false are not."""
        return all(_number(value) for value in self.arguments)


def read_space(
    values: Mapping[str, Any], found: list[tuple[tuple[str, ...], str]]
) -> dict[str, Domain]:
    """Dotted keys with their domains; sections may be nested or dotted. What is wrong is added to
    `found`, with its path.
    """
    space: dict[str, Domain] = {}
    for path, value in _leaves(values):
        try:
            space[".".join(path)] = _domain(value)
        except ValueError as error:
            found.append((path, f"space.{'.'.join(path)}: {error}"))
    return space


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{solver: {upper_lr: 1}, "solver.eta": 2}` as `{"solver.upper_lr": 1, "solver.eta": 2}`.
    Empty mappings are values.
    """
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            leaves |= {f"{key}.{below}": leaf for below, leaf in flat(value).items()}
        else:
            leaves[key] = value
    return leaves


def _leaves(
    values: Mapping[str, Any], above: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for key, value in values.items():
        section = (
            isinstance(value, Mapping)
            and value
            and not any(name in KINDS or isinstance(below, list) for name, below in value.items())
        )
        found += _leaves(value, (*above, key)) if section else [((*above, key), value)]
    return found


def _domain(value: Any) -> Domain:
    known = ", ".join(KINDS)
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(
            f"got {describe(value)}, wanted one of {known} with a list, as in {{loguniform: [1e-4, 1e-1]}}"
        )
    ((name, arguments),) = value.items()
    if name not in KINDS:
        raise ValueError(f"got {describe(name)}, wanted one of {known}")
    kind = KINDS[name]
    good = isinstance(arguments, list)
    if good and kind.numbers > 0:
        good = len(arguments) == kind.numbers and all(_number(number) for number in arguments)
        good = good and (not kind.whole or all(isinstance(number, int) for number in arguments))
    if not good or not kind.holds(*arguments):
        raise ValueError(f"got {name}: {describe(arguments)}, wanted {kind.wanted}")
    return Domain(name, tuple(arguments))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
