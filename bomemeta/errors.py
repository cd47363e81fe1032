"""Every error that bomemeta raises on purpose.

Messages say where, what was got, what was wanted and what to do. The classes take one message and
nothing else: an exception with a custom `__init__` loses its type on the way back from a Ray
worker.
"""

import re

# `NAME://KEY:SECRET@`, up to the last @ of the word: a secret may have slashes.
_KEYS_IN_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s'\"@]*:[^\s'\"]*@")


def redacted(text: str) -> str:
    """The text with `***` in the place of what stands before the @ of URIs, where that has a colon."""
    return _KEYS_IN_URI.sub(r"\1***@", text)


class BomemetaError(Exception):
    """Base of all; the command line prints its message without a traceback, and without the keys
    that a URI in it has.
    """

    def __str__(self) -> str:
        return redacted(super().__str__())


class ConfigError(BomemetaError):
    """A key, value or combination of keys that no run can be made of."""


class MissingExtra(ConfigError):
    """An optional package that the config or the command asks for and that is not installed."""


class DataError(BomemetaError):
    """Data that is missing, damaged or too small for what was asked."""


class ClusterError(BomemetaError):
    """The Ray cluster cannot hold what was asked, or lost more than it could replace."""


class ClusterLost(ClusterError):
    """What the run ran on is gone, or did not come up: the same command is worth another try."""


class HeadLost(ClusterLost):
    """The head of the Ray cluster is gone, and with it all that Ray could still do here."""


class LowerStateLost(BomemetaError):
    """Lower state that lived on a node which is gone. The remedy is the last checkpoint, not
    another try.
    """


class CheckpointError(BomemetaError):
    """A checkpoint that cannot be written, read, or that belongs to another run."""


class StorageError(BomemetaError):
    """A run folder at a URI that cannot be read or written now."""


class DivergenceError(BomemetaError):
    """A number that the mathematics needs is NaN or infinite."""
