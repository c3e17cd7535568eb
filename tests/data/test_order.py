from __future__ import annotations

import pytest

from clip_pgs.data.order import Share, shuffled, shuffled_stream, stable_seed


def test_seed_is_the_same_on_every_machine():
    assert stable_seed("mix", 0, 3) == 5750050549365187520


def test_seed_tells_parts_apart():
    assert len({stable_seed(1, 23), stable_seed(12, 3), stable_seed("1", 23), stable_seed(1)}) == 4


def test_shares_are_disjoint_and_complete():
    items = list(range(23))
    shares = [Share(r, 2, w, 3).deal(items) for r in range(2) for w in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert {len(share) for share in shares} == {3, 4}


def test_shuffled_depends_on_its_seed_alone():
    assert shuffled(range(50), 1) == shuffled(range(50), 1)
    assert shuffled(range(50), 1) != shuffled(range(50), 2)


@pytest.mark.parametrize("length", [0, 5, 300])
def test_stream_gives_each_item_once(length):
    out = list(shuffled_stream(range(length), 0, buffer_size=50, initial_size=10))
    assert sorted(out) == list(range(length))
    assert out != list(range(length)) or length == 0


def test_stream_reads_no_further_than_its_buffer():
    num_read = 0

    def items():
        nonlocal num_read
        for item in range(1000):
            num_read += 1
            yield item

    ahead = []
    for num_out, _ in enumerate(shuffled_stream(items(), 0, buffer_size=50, initial_size=10), 1):
        ahead.append(num_read - num_out)
    assert ahead[0] == 10
    assert max(ahead) == 50
