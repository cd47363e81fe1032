"""`bomemeta compare`: finished runs side by side, seed by seed, with intervals and tests."""

from bomemeta.compare.entries import Entry, read_entries
from bomemeta.compare.statistics import Comparison, compare

__all__ = ["Comparison", "Entry", "compare", "read_entries"]
