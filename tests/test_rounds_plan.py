"""What a round consists of and who is given what, without Ray: the tree of sums, the plan that
survives losses, the scheduler of workers.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest

from bomemeta.distributed.plan import Plan
from bomemeta.distributed.ready import Load, ReadyCalls
from bomemeta.distributed.scheduler import Key, Scheduler
from bomemeta.distributed.summation import TreeSum, added, merges
from bomemeta.distributed.transport import ShardReply

SIZES = [1, 2, 3, 4, 5, 7, 8, 13]


def shares(count: int) -> list[np.ndarray]:
    """Numbers whose sum depends on the order in which they are added."""
    generator = np.random.default_rng(count)
    return [
        (generator.standard_normal(50) * 10.0 ** generator.integers(-6, 6, 50)).astype(np.float32)
        for _ in range(count)
    ]


def by_merges(parts: list[np.ndarray]) -> np.ndarray:
    nodes = dict(enumerate(parts))
    for merge in merges(len(parts)):
        nodes[merge.node] = added(nodes[merge.left], nodes[merge.right])
    return nodes[len(parts) - 1 + len(merges(len(parts)))]


@pytest.mark.parametrize("count", SIZES)
def test_every_share_is_in_the_tree_once_and_its_depth_is_logarithmic(count):
    tree = merges(count)
    children = [child for merge in tree for child in (merge.left, merge.right)]
    assert sorted(children) == list(range(2 * count - 2))  # all nodes but the root
    depth = dict.fromkeys(range(count), 0)
    for merge in tree:
        depth[merge.node] = 1 + max(depth[merge.left], depth[merge.right])
    assert max(depth.values()) == int(np.ceil(np.log2(count)))


@pytest.mark.parametrize("count", SIZES)
def test_the_sum_does_not_depend_on_the_order_of_arrival(count):
    parts = shares(count)
    expected = by_merges(parts)
    for seed in range(5):
        order = list(range(count))
        random.Random(seed).shuffle(order)
        total = TreeSum(count)
        for leaf in order:
            total.add(leaf, parts[leaf])
        assert np.array_equal(total.total, expected)
    if count > 4:  # else this test could not fail
        assert not np.array_equal(np.add.reduce(parts), expected)


def test_shares_are_not_written_into():
    parts = shares(4)
    before = [part.copy() for part in parts]
    total = TreeSum(4)
    for leaf, part in enumerate(parts):
        part.flags.writeable = False
        total.add(leaf, part)
    assert all(np.array_equal(part, old) for part, old in zip(parts, before, strict=True))


def test_overflow_is_left_to_whoever_asked_for_the_sum():
    huge = np.full(2, 3e38, np.float32)
    assert np.isinf(added(huge, huge)).all()


def run_plan(plan: Plan, parts: list[np.ndarray], losses: list[int], seed: int) -> np.ndarray:
    """Works the plan off in random order; the share of each job in `losses` is lost once, when it
    is first needed or at the end.
    """
    dice = random.Random(seed)
    values: dict[int, np.ndarray] = {}
    losses = list(losses)
    for _ in range(1000):
        if plan.finished:
            if plan.root in losses:
                losses.remove(plan.root)
                plan.lost(plan.root)
                continue
            return values[plan.root]
        job = dice.choice([*plan.calls, *plan.sums])
        merge = plan.merge(job)
        (plan.calls if merge is None else plan.sums).remove(job)
        if merge is None:
            values[job] = parts[job]
            plan.answers[job] = ShardReply(None, ())
        else:
            gone = [side for side in (merge.left, merge.right) if side in losses]
            if gone:
                losses.remove(gone[0])
                plan.lost(gone[0])
                continue
            assert merge.left in plan.held
            assert merge.right in plan.held
            values[job] = added(values[merge.left], values[merge.right])
        if dice.random() < 0.2:
            plan.again(job)  # its worker died with the answer
            continue
        plan.done(job, f"share of {job}")
    raise AssertionError("the plan does not end")


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_a_plan_ends_in_the_same_sum_whatever_is_lost(count):
    parts = shares(count)
    nodes = 2 * count - 1
    for seed, losses in enumerate(itertools.chain([()], itertools.combinations(range(nodes), 2))):
        plan = Plan(count, merged=True)
        assert np.array_equal(run_plan(plan, parts, list(losses), seed), by_merges(parts)), losses
        assert set(plan.held) == {plan.root}  # nothing else is kept in the store


def test_a_plan_without_merges_is_its_calls():
    plan = Plan(3, merged=False)
    assert list(plan.calls) == [0, 1, 2]
    for job in (2, 0, 1):
        assert not plan.finished
        plan.calls.remove(job)
        plan.answers[job] = ShardReply(job, ())
        plan.done(job)
    assert plan.finished
    assert Plan(0, merged=False).finished


def assign(
    scheduler: Scheduler, idle: list[int], keys: list[Key], busy: dict[int, float]
) -> list[tuple[int, Key]]:
    """Who begins what of these calls; `busy`: the seconds that each of the others has to work."""
    load = Load()
    for worker, seconds in busy.items():
        load.set(worker, seconds, scheduler.slowness(worker))
    given = ReadyCalls(scheduler, keys).match(idle, load, now=0.0)
    return [(worker, keys[number]) for worker, number in given]


KEYS = [Key("descend", 4, number) for number in range(4)]


def trained(seconds: dict[int, float], rounds: int = 6) -> Scheduler:
    """A scheduler that has seen workers take so long for every call."""
    scheduler = Scheduler()
    for _ in range(rounds):
        for key in KEYS:
            for worker, took in seconds.items():
                scheduler.learn(worker, key, took)
    return scheduler


def test_equal_workers_get_calls_in_order():
    assert assign(Scheduler(), [0, 1], KEYS, {}) == [(0, KEYS[0]), (1, KEYS[1])]
    assert {key.number for _, key in assign(trained({0: 1.0, 1: 1.1}), [0, 1], KEYS, {})} == {0, 1}


def test_a_shard_goes_to_the_worker_that_had_it():
    scheduler = Scheduler()
    for number, worker in enumerate([1, 0, 2, 1]):
        scheduler.learn(worker, KEYS[number], 1.0)
    assert sorted(assign(scheduler, [0, 1, 2], [Key("other", 4, number) for number in range(4)], {})) == [
        (0, Key("other", 4, 1)), (1, Key("other", 4, 0)), (2, Key("other", 4, 2)),
    ]  # fmt: skip
    assert assign(scheduler, [3], KEYS[:1], {}) == [(3, KEYS[0])]


def test_the_longest_calls_go_first():
    scheduler = Scheduler()
    for key, seconds in zip(KEYS, (1.0, 4.0, 2.0, 3.0), strict=True):
        scheduler.learn(0, key, seconds)
    assert {key.number for _, key in assign(scheduler, [0, 1], KEYS, {})} == {1, 3}


def test_a_slow_worker_is_left_out_where_the_others_are_done_sooner():
    scheduler = trained({0: 1.0, 1: 10.0})
    assert scheduler.slowness(1) > 4 * scheduler.slowness(0)
    assert assign(scheduler, [1, 0], KEYS[:2], {}) == [(0, KEYS[0])]
    assert assign(scheduler, [1], KEYS[:1], {0: 0.5}) == []  # worth waiting for
    assert assign(scheduler, [1], KEYS[:1], {0: 100.0}) == [(1, KEYS[0])]  # not worth waiting for
    assert assign(scheduler, [1], KEYS[:1], {}) == [(1, KEYS[0])]  # nobody else is there


def test_a_slow_worker_is_given_another_chance_and_a_new_process_a_fresh_start():
    scheduler = trained({0: 1.0, 1: 10.0})
    for _ in range(6):
        scheduler.fade([1])
    assert (
        len(assign(scheduler, [0, 1], KEYS, {})) == 1
    )  # 5 times as slow: four calls are done sooner
    for _ in range(6):
        scheduler.fade([1])
    assert len(assign(scheduler, [0, 1], KEYS, {})) == 2
    scheduler = trained({0: 1.0, 1: 10.0})
    scheduler.forget(1)
    assert len(assign(scheduler, [0, 1], KEYS, {})) == 2


def test_short_calls_are_not_planned():
    assert len(assign(trained({0: 0.001, 1: 0.01}), [0, 1], KEYS, {})) == 2


def played(
    scheduler: Scheduler, seconds: dict[int, float], rounds: int, first: float | None = None
) -> list[Counter[int]]:
    """Plays rounds of four calls on workers that take so long for each; how many each had, by
    round. `first`: of worker 0's first call.
    """
    counts = []
    for _ in range(rounds):
        ready, begun, now = list(KEYS), {}, 0.0
        count: Counter[int] = Counter()
        while ready or begun:
            idle = [worker for worker in seconds if worker not in begun]
            busy = {worker: end - now for worker, (end, _, _) in begun.items()}
            for worker, key in assign(scheduler, idle, ready, busy):
                took, first = (
                    (first, None) if worker == 0 and first is not None else (seconds[worker], first)
                )
                begun[worker] = now + took, took, key
                ready.remove(key)
                count[worker] += 1
            worker = min(begun, key=lambda worker: begun[worker][0])
            now, took, key = begun.pop(worker)
            scheduler.learn(worker, key, took)
        scheduler.fade([worker for worker in seconds if worker not in count])
        counts.append(count)
    return counts


@pytest.mark.parametrize("seconds", [0.02, 0.2])
@pytest.mark.parametrize("hiccup", [0.0, 5.0])
def test_a_bad_moment_is_forgotten(seconds, hiccup):
    scheduler, equal = Scheduler(), {0: seconds, 1: seconds}
    assert set(played(scheduler, equal, 6, first=3.0)[-1]) == {0, 1}  # imports, data
    # Of calls that are too short to plan, the next round is even again. Else worker 0 was taken for
    # 12 times as slow, and is given nothing until that has faded, by 0.9 a round.
    back = 16 if hiccup and seconds > 0.1 else 1
    counts = played(scheduler, equal, 40, first=hiccup or None)
    assert counts[back:] == [Counter({0: 2, 1: 2})] * (40 - back)
    assert scheduler.slowness(0) == pytest.approx(1, rel=0.05)
    assert scheduler.slowness(1) == pytest.approx(1, rel=0.05)
    assert [scheduler.expected(key) for key in KEYS] == pytest.approx([seconds] * 4, rel=0.1)


@pytest.mark.parametrize("slow", [0, 1, 2])
@pytest.mark.parametrize("first", [None, 0.5, 4.0])
@pytest.mark.parametrize("short", [0, 1, 5])
def test_a_slow_worker_is_found_by_its_second_answer(slow, first, short):
    """Whether its first answers were those of calls so short that nothing can be told of them, or
    not.
    """
    scheduler = Scheduler()
    for worker in list(range(3)) * short:
        scheduler.learn(worker, Key("evaluate", 3, worker), 0.002)
    counts = played(
        scheduler, {worker: 2.0 if worker == slow else 0.1 for worker in range(3)}, 5, first
    )
    assert sum(count[slow] for count in counts) <= 2, counts
    assert scheduler.slowness(slow) > 2, counts
