"""Searches for hyperparameters with Ray Tune: `bomemeta tune`, and `trainable` for a Tuner of one's
own; a run's folder as a checkpoint and a trial of Ray's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bomemeta.callable_module import callable_as

if TYPE_CHECKING:
    from bomemeta.tune.exchange import as_checkpoint, as_trial, from_checkpoint
    from bomemeta.tune.outcome import Row, SearchResult
    from bomemeta.tune.search import tune
    from bomemeta.tune.trial import trainable

__all__ = [
    "Row",
    "SearchResult",
    "as_checkpoint",
    "as_trial",
    "from_checkpoint",
    "trainable",
    "tune",
]


def __getattr__(name: str) -> Any:
    # Ray Tune takes seconds to import: a tune file is read and checked without it.
    if name == "tune":
        from bomemeta.tune.search import tune

        return tune
    if name == "trainable":
        from bomemeta.tune.trial import trainable

        return trainable
    if name in {"as_checkpoint", "as_trial", "from_checkpoint"}:
        from bomemeta.tune import exchange

        return getattr(exchange, name)
    if name in {"Row", "SearchResult"}:
        from bomemeta.tune import outcome

        return getattr(outcome, name)
    raise AttributeError(f"module 'bomemeta.tune' has no attribute {name!r}")


callable_as(__name__, "tune")
