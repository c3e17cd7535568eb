from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from clip_pgs.data.order import (
    OrderedPlan,
    ResampledPlan,
    RowPlan,
    ShardPlan,
    shuffled,
    stable_seed,
)

SIZES = [
    [1],
    [10, 10, 10, 10],
    [3, 0, 500, 1, 70],
    [5000, 9000],
    [20] * 300,
]


def places(plan, epoch=0, *, start=0, stop=None):
    stop = plan.num_samples if stop is None else stop
    return [tuple(plan.sample_at(epoch, position)) for position in range(start, stop)]


@pytest.mark.parametrize("sizes", SIZES)
def test_each_sample_comes_once_per_pass(sizes):
    plan = ShardPlan(sizes, seed=3)
    expected = [(part, number) for part, size in enumerate(sizes) for number in range(size)]
    for visit in range(2):
        start = visit * plan.num_samples
        found = places(plan, 4, start=start, stop=start + plan.num_samples)
        assert sorted(found) == [(*place, visit) for place in expected]


@pytest.mark.parametrize("sizes", SIZES[1:])
def test_epochs_seeds_and_passes_differ(sizes):
    size = sum(sizes)
    orders = [
        places(ShardPlan(sizes, seed=0)),
        places(ShardPlan(sizes, seed=0), 1),
        places(ShardPlan(sizes, seed=1)),
        [(*place[:2], 0) for place in places(ShardPlan(sizes, seed=0), start=size, stop=2 * size)],
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_what_follows_each_other_comes_from_many_shards():
    plan = ShardPlan([1000] * 40, seed=0)
    for start in (0, 17_000, 39_000):
        parts = Counter(part for part, _, _ in places(plan, start=start, stop=start + 1000))
        assert len(parts) >= 20


def test_neighbours_in_a_shard_are_far_apart_in_an_epoch():
    order = places(ShardPlan([4000], seed=0))
    position = {number: index for index, (_, number, _) in enumerate(order)}
    distance = [abs(position[number] - position[number + 1]) for number in range(3999)]
    # Two random places of n are n / 3 apart in the mean.
    assert 1200 < np.mean(distance) < 1470


def test_a_reader_of_some_batches_touches_few_shards():
    plan = ShardPlan([1000] * 128, seed=0)
    # The fourth of eight readers, with batches of 256.
    starts = range(3 * 256, plan.num_samples, 8 * 256)
    parts = {
        plan.sample_at(0, position).shard
        for start in starts
        for position in range(start, start + 256, 32)
    }
    assert len(parts) <= 24


def test_order_is_the_same_in_every_process():
    program = (
        "import json; from clip_pgs.data.order import ShardPlan; "
        "plan = ShardPlan([9, 70, 30], seed=5); "
        "print(json.dumps([plan.sample_at(2, p) for p in range(109)]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert [tuple(place) for place in json.loads(done.stdout)] == places(
        ShardPlan([9, 70, 30], seed=5), 2
    )


def test_order_of_old_runs_stays():
    numbers = [ShardPlan([4, 3], seed=0).sample_at(1, position)[:2] for position in range(7)]
    assert numbers == [(1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (0, 0)]


def test_rows_come_once_per_epoch_in_another_order_each_time():
    plan = RowPlan(50, seed=0)
    first, second = places(plan), places(plan, 1)
    assert sorted(first) == sorted(second) == [(0, row, 0) for row in range(50)]
    assert first != second


def test_ordered_plan_is_in_order():
    plan = OrderedPlan([2, 0, 3])
    expected = [(0, 0, 0), (0, 1, 0), (2, 0, 0), (2, 1, 0), (2, 2, 0)]
    assert places(plan) == places(plan, 7) == expected


@pytest.mark.parametrize(("weights", "share"), [(None, 0.5), ([3.0, 1.0], 0.75), ([0.0, 2.0], 0.0)])
def test_samples_are_drawn_by_weight(weights, share):
    weights = weights and [weights[0]] * 20 + [weights[1]] * 20
    plan = ResampledPlan([200] * 40, weights=weights, seed=0)
    drawn = [part for epoch in range(10) for part, _, _ in places(plan, epoch)]
    assert sum(part < 20 for part in drawn) / len(drawn) == pytest.approx(share, abs=0.08)


def test_a_sample_of_a_large_shard_is_drawn_as_often_as_one_of_a_small_shard():
    plan = ResampledPlan([100] * 10 + [400] * 10, weights=None, seed=0)
    drawn = [part for epoch in range(20) for part, _, _ in places(plan, epoch)]
    assert sum(part >= 10 for part in drawn) / len(drawn) == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("sizes", [[4] * 8, [1, 300, 40], [10_000] * 3])
def test_drawn_samples_exist_and_have_visits_of_their_own(sizes):
    plan = ResampledPlan(sizes, weights=None, seed=0)
    found = places(plan, stop=min(3 * plan.num_samples, 5000))
    assert all(0 <= number < sizes[part] for part, number, _ in found)
    assert len(set(found)) == len(found)


def test_seed_is_the_same_on_every_machine():
    assert stable_seed("mix", 0, 3) == 5750050549365187520


def test_seed_tells_parts_apart():
    assert len({stable_seed(1, 23), stable_seed(12, 3), stable_seed("1", 23), stable_seed(1)}) == 4


def test_shuffled_depends_on_its_seed_alone():
    assert shuffled(range(50), 1) == shuffled(range(50), 1)
    assert shuffled(range(50), 1) != shuffled(range(50), 2)
