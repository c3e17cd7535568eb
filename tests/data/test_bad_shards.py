"""Faults in whole shards: what is left of them, and how the rest is counted and replaced."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from clip_pgs.data.bad_samples import Skip, UnusableDataError
from support.streams import numbers, open_stream, read_from, with_options


def folder_of(args):
    return Path(args.train_data).parent


def truncated(path):
    """Cut a shard within its seventh pair."""
    with tarfile.open(path) as tar:
        place = tar.getmembers()[18].offset_data + 10
    path.write_bytes(path.read_bytes()[:place])


def no_tar(path):
    path.write_bytes(b"<html>no such file</html>" * 1000)


def no_bytes(path):
    path.write_bytes(b"")


def no_members(path):
    path.unlink()
    tarfile.open(path, "w").close()


def no_permission(path):
    # Root may read what has no permission: a file that gives an input/output error to all.
    path.unlink()
    path.symlink_to("/proc/self/mem")


def gone(path):
    path.unlink()


def folder_instead(path):
    path.unlink()
    path.mkdir()


def link_to_itself(path):
    path.unlink()
    path.symlink_to(path)


SHARD_FAULTS = {
    truncated: ("unreadable shard", 4),
    no_tar: ("unreadable shard", 10),
    no_bytes: ("unreadable shard", 10),
    no_members: ("empty shard", 10),
    no_permission: ("unreadable shard", 10),
}
LATE_FAULTS = {
    **SHARD_FAULTS,
    gone: ("unreadable shard", 10),
    folder_instead: ("unreadable shard", 10),
    link_to_itself: ("unreadable shard", 10),
}


@pytest.fixture
def stated_args(make_shards, make_args):
    """Three shards of ten pairs, with sizes.json."""
    folder = make_shards([10, 10, 10])
    return make_args(train_data=f"{folder}/{{0..2}}.tar", batch_size=6, workers=2)


@pytest.mark.parametrize("damage", LATE_FAULTS)
@pytest.mark.parametrize("workers", [0, 2])
def test_samples_of_a_bad_shard_are_counted_and_replaced(stated_args, damage, workers):
    reason, number = LATE_FAULTS[damage]
    shard = folder_of(stated_args) / "1.tar"
    skips = []
    stream = open_stream(with_options(stated_args, workers=workers), on_skip=skips.append)
    damage(shard)
    seen = numbers(read_from(stream))
    assert len(seen) == 30
    assert set(seen) == {*range(20 - number), *range(20, 30)}
    assert stream.skipped == {reason: number}
    assert sorted(skip.key for skip in skips) == sorted(
        f"sample {index}" for index in range(11 - number, 11)
    )
    assert {skip.shard for skip in skips} == {str(shard)}


@pytest.mark.parametrize("damage", SHARD_FAULTS)
def test_a_bad_shard_that_is_counted_is_named_once_and_left_out(stated_args, damage):
    reason, number = SHARD_FAULTS[damage]
    folder = folder_of(stated_args)
    (folder / "sizes.json").unlink()
    damage(folder / "1.tar")
    with_options(stated_args, batch_size=1)
    skips: list[Skip] = []
    streams = [
        open_stream(stated_args, rank=rank, world_size=2, on_skip=skips.append) for rank in (0, 1)
    ]
    assert [(skip.shard, skip.key, skip.reason) for skip in skips] == [
        (str(folder / "1.tar"), "", reason)
    ]
    seen = [number for stream in streams for number in numbers(read_from(stream))]
    assert sorted(seen) == [*range(20 - number), *range(20, 30)]


@pytest.mark.parametrize("source", ["{}/{{0..2}}.tar", "pipe:cat {}/{{0..2}}.tar"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_bad_shard_counts_as_a_bad_sample_however_it_is_read(stated_args, source, share):
    folder = folder_of(stated_args)
    (folder / "sizes.json").unlink()
    truncated(folder / "1.tar")
    changes = {"max_bad_share": share, "train_num_samples": 24}
    args = with_options(stated_args, train_data=source.format(folder), **changes)
    if share:
        assert len(numbers(read_from(open_stream(args)))) == 24
    else:
        with pytest.raises(UnusableDataError, match="--max-bad-share 0 allows"):
            read_from(open_stream(args))


def test_shard_that_disappears_while_it_is_open_is_read_to_its_end(stated_args):
    stream = open_stream(stated_args)
    batches = iter(stream)
    # One of each worker, which by then has the shard open.
    first = [next(batches), next(batches)]
    (folder_of(stated_args) / "1.tar").unlink()
    assert sorted(numbers([*first, *batches])) == list(range(30))
    assert not stream.skipped
    with pytest.raises(ValueError, match=r"1\.tar', which does not exist"):
        open_stream(stated_args)


@pytest.mark.parametrize("workers", [0, 2])
def test_shard_that_is_overwritten_while_a_run_trains_is_named_and_not_trained_on(
    stated_args, make_shards, caplog, workers
):
    other = make_shards([10], folder="other", first=40) / "0.tar"
    shard = folder_of(stated_args) / "1.tar"
    stream = open_stream(with_options(stated_args, workers=workers))
    assert sorted(numbers(read_from(stream))) == [*range(30)]
    shard.write_bytes(other.read_bytes())
    seen = numbers(read_from(stream, epoch=1))
    assert len(seen) == 30
    assert {*seen} == {*range(10), *range(20, 30)}
    assert stream.skipped == {"changed shard": 10}
    assert f"skipped {shard}: sample" in caplog.text


def test_shard_that_is_cut_short_while_it_is_open_loses_what_was_cut(stated_args):
    expected = numbers(read_from(open_stream(stated_args)))
    stream = open_stream(with_options(stated_args, workers=0))
    batches = iter(stream)
    first = next(batches)
    os.truncate(folder_of(stated_args) / "1.tar", 100)
    rest = numbers(list(batches))
    assert numbers([first]) == expected[:6]
    lost = [number for number in expected[6:] if 10 <= number < 20]
    assert stream.skipped == {"unreadable shard": len(lost)}
    assert [new for old, new in zip(expected[6:], rest, strict=True) if old not in lost] == [
        old for old in expected[6:] if old not in lost
    ]
    assert not {*rest} & {*range(10, 20)}


def test_more_samples_stated_than_there_are_is_counted(stated_args):
    folder = folder_of(stated_args)
    (folder / "sizes.json").write_text('{"0.tar": 10, "1.tar": 12, "2.tar": 10}')
    skips = []
    stream = open_stream(with_options(stated_args, batch_size=8), on_skip=skips.append)
    assert len(numbers(read_from(stream))) == 32
    assert stream.skipped == {"no such sample": 2}
    assert "fewer than its sizes.json says" in skips[0].detail


@pytest.mark.parametrize("damage", [no_tar, no_bytes, no_members, no_permission])
def test_shards_without_any_sample_are_an_error_before_the_first_batch(stated_args, damage):
    folder = folder_of(stated_args)
    (folder / "sizes.json").unlink()
    for number in range(3):
        damage(folder / f"{number}.tar")
    with pytest.raises(UnusableDataError, match=f"3 skipped .{SHARD_FAULTS[damage][0]}: 3"):
        open_stream(with_options(stated_args, train_num_samples=30))
