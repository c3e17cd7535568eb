from __future__ import annotations

import json

import pytest

from clip_pgs.data.tar import size_shards


@pytest.fixture
def shards(make_shards):
    folder = make_shards([3, 5, 2])
    return [folder / f"{number}.tar" for number in range(3)]


def sizes(shards, **options):
    return size_shards([str(shard) for shard in shards], **options)[0]


def test_stated_sizes_are_believed(shards):
    (shards[0].parent / "sizes.json").write_text('{"0.tar": 30, "1.tar": 50, "2.tar": 20}')
    assert sizes(shards) == [30, 50, 20]
    assert sizes(shards, use_stated=False) == [3, 5, 2]


@pytest.mark.parametrize("stated", [None, {}, {"1.tar": 50}])
def test_what_is_not_stated_is_counted(shards, stated):
    file = shards[0].parent / "sizes.json"
    file.unlink()
    if stated is not None:
        file.write_text(json.dumps(stated))
    assert sizes(shards) == [3, 50 if stated else 5, 2]


def test_changed_shard_is_counted_again(shards):
    assert sizes(shards, use_stated=False) == [3, 5, 2]
    shards[0].write_bytes(shards[1].read_bytes())
    assert sizes(shards, use_stated=False) == [5, 5, 2]


def test_shard_that_cannot_be_counted_is_empty_and_named_once(shards):
    shards[1].write_bytes(b"no tar")
    named = [str(shards[number]) for number in (0, 1, 1)]
    found, failures = size_shards(named, use_stated=False)
    assert found == [3, 0, 0]
    assert [(skip.shard, skip.reason) for skip in failures] == [(named[1], "unreadable shard")]
