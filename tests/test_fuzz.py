"""2,000 seeded inputs of every kind that enters: no exception that is not ours, and none taken for
something that it does not say. A million: `python tests/fuzz --count 1000000 --seed 1`.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from fuzz.kinds import KINDS, shares
from fuzz.outcome import RAW, SILENT, Counts, judge

COUNT, SEED = 2000, 0
PARTS = 4  # of each kind, so that a failure names a quarter


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_refused_in_words_or_read_as_they_are(
    kind: str, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    counts = Counts()
    count = shares(COUNT)[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about odd numbers
        for number in range(part * count // PARTS, (part + 1) * count // PARTS):
            counts.add(*judge(kind, KINDS[kind].target, SEED, number, 60.0), number)
    assert (counts.of[RAW], counts.of[SILENT]) == (0, 0), (counts.wrong, counts.example)
