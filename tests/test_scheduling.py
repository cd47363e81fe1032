"""What the driver's own scheduling costs, counted in bytecodes on a stubbed Ray: it must not grow
with the number of workers, and whatever is lost must not change who is heard.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest

from bomemeta.distributed.soonest import Soonest
from bomemeta.distributed.transport import ShardCall

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.scheduling import counted, stubbed

FEW, MANY = 32, 256


def test_an_answer_costs_as_much_with_many_workers_as_with_few():
    few, many = counted(FEW, FEW) / FEW, counted(MANY, MANY) / MANY
    assert many < 1.1 * few  # a walk over all workers for every answer would be 8 times as much
    assert counted(MANY, 2 * MANY) < 2.5 * MANY * many


def test_deaths_cost_little():
    assert counted(MANY, MANY, deaths=0.01) < 1.5 * counted(MANY, MANY)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("deaths", [0.0, 0.1])
@pytest.mark.parametrize("backup_after", [None, 2.0])
def test_every_call_is_answered_once(shards, deaths, backup_after):
    with stubbed(20, deaths, backup_after=backup_after) as transport:
        for _ in range(6):
            calls = [ShardCall(None, kind="k") for _ in range(20 * shards)]
            assert len(transport.run(np.zeros(1), calls).replies) == len(calls)


def test_soonest_is_the_least_of_what_is_there():
    dice, numbers, soonest = random.Random(0), {}, Soonest()
    for _ in range(3000):
        key, number = dice.randrange(30), dice.choice([0.0, 1.0, dice.random()])
        if dice.random() < 0.3:
            numbers.pop(key, None)
            soonest.drop(key)
        else:
            numbers[key] = number
            soonest.set(key, number)
        least = soonest.least()
        assert (least is None) == (not numbers)
        assert least is None or (least[0] == min(numbers.values()) == numbers[least[1]])
    assert len(soonest._heap) < 100
    assert list(soonest.until(0.5)) == sorted(
        (key for key in numbers if numbers[key] <= 0.5), key=lambda key: (numbers[key], key)
    )
    assert all((key in soonest) == (number > 0.5) for key, number in numbers.items())
