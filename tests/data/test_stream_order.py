"""The order of training samples, and going on from the middle of an epoch."""

from __future__ import annotations

import gzip
from collections import Counter
from itertools import chain

import pytest
import torch

from support.streams import AUGMENT, numbers, open_stream, read_from, same, with_options


@pytest.fixture
def args(make_shards, make_args):
    """Five shards of 70 samples in all, steps of 8."""
    folder = make_shards([20, 9, 1, 30, 10])
    return make_args(train_data=f"{folder}/{{0..4}}.tar", batch_size=8)


@pytest.fixture
def table_args(tmp_path, make_image, make_args):
    """A table of 50 pairs."""
    rows = ["filepath\ttitle"]
    for number in range(50):
        (tmp_path / f"{number}.jpg").write_bytes(make_image(number))
        rows.append(f"{tmp_path}/{number}.jpg\t{number}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    return make_args(train_data=str(tmp_path / "pairs.csv"), batch_size=8)


@pytest.fixture(params=["shards", "resampled", "table"])
def any_args(request, args, table_args):
    """Each kind of data that can be read in any order."""
    if request.param == "table":
        return table_args
    return with_options(args, dataset_resampled=request.param == "resampled")


def global_batches(args, *, world_size=1, epoch=0, position=0):
    """Return the samples of all ranks, step by step: micro-batch, rank, sample."""
    ranks = [
        read_from(open_stream(args, rank=rank, world_size=world_size), epoch, position)
        for rank in range(world_size)
    ]
    batches = chain.from_iterable(zip(*ranks, strict=True))
    images, texts = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(texts)


def appearances(args, **options):
    """Return the images and captions of each picture's appearances in an epoch, by its number."""
    stream = open_stream(with_options(args, **options))
    found = {}
    for images, texts in read_from(stream):
        for image, number in zip(images, texts[:, 0].tolist(), strict=True):
            found.setdefault(number % 100, []).append((image.numpy().tobytes(), number // 100))
    return found


SOURCES = ["{0}/0.tar", "{0}/0.tar.gz", "pipe:cat {0}/0.tar"]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_is_named_twice_is_augmented_in_two_ways(
    make_args, make_tar, make_image, tmp_path, source, workers
):
    members = []
    for number in range(16):
        members.append((f"{number:02d}.jpg", make_image(number)))
        # Three captions: 100, 200 and 300 + number.
        members += [(f"{number:02d}.{n}.txt", str(100 * n + number).encode()) for n in (1, 2, 3)]
    make_tar(tmp_path / "0.tar", members)
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    source = source.format(tmp_path)
    args = make_args(batch_size=16, workers=workers)
    once = appearances(args, train_data=source, train_num_samples=16)
    twice = appearances(args, train_data=f"{source}::{source}", train_num_samples=32)
    assert {len(each) for each in twice.values()} == {2}
    assert all(len({image for image, _ in each}) == 2 for each in twice.values())
    assert any(len({caption for _, caption in each}) == 2 for each in twice.values())
    # The first is as it is where the source is named once.
    assert all(once[number][0] in each for number, each in twice.items())


@pytest.mark.parametrize("other", ["3.tar", "./3.tar", "../shards//3.tar"])
@pytest.mark.parametrize("number", [60, 200])
def test_all_appearances_differ_in_an_epoch_of_several_passes(args, monkeypatch, other, number):
    monkeypatch.chdir(args.train_data.rpartition("/")[0])
    options = {"train_data": f"3.tar::{other}", "train_num_samples": number, "batch_size": 4}
    found = appearances(args, **options)
    assert all(len({*each}) == len(each) > 1 for each in found.values())


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_batches_do_not_depend_on_workers(any_args, workers):
    expected = read_from(open_stream(any_args), 1)
    assert same(read_from(open_stream(with_options(any_args, workers=workers)), 1), expected)


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        pytest.param({"batch_size": 4}, 2, marks=pytest.mark.slow),
        ({"batch_size": 2, "accum_freq": 2}, 2),
        pytest.param({"batch_size": 2, "accum_freq": 4}, 1, marks=pytest.mark.slow),
        ({"batch_size": 4, "accum_freq": 2, "workers": 2}, 1),
    ],
)
def test_steps_are_the_same_for_any_ranks_and_accumulation(any_args, changes, world_size):
    expected = global_batches(any_args)
    found = global_batches(with_options(any_args, **changes), world_size=world_size)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_order_does_not_depend_on_the_batch_size(any_args):
    small = numbers(read_from(open_stream(any_args)))
    large = numbers(read_from(open_stream(with_options(any_args, batch_size=16))))
    assert large == small[: len(large)]
    assert len(small) - len(large) < 16


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "num_steps", [3, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 5, 6))]
)
def test_start_at_gives_exactly_the_tail(any_args, workers, num_steps):
    whole = read_from(open_stream(any_args), 2)
    stream = open_stream(with_options(any_args, workers=workers))
    stream.start_at(2, num_steps * 8)
    assert stream.num_batches_left == len(whole) - num_steps
    assert same(list(stream), whole[num_steps:])


def test_start_at_goes_on_with_other_ranks_and_batches(args):
    whole = global_batches(args)[1]
    rest = global_batches(
        with_options(args, batch_size=3, accum_freq=2), world_size=2, position=24
    )[1]
    assert torch.equal(rest, whole[24 : 24 + len(rest)])
    assert len(rest) == (70 - 24) // 12 * 12


def test_nothing_is_decoded_to_get_to_a_position(args):
    decoded = []

    def transform(image):
        decoded.append(image.size)
        return AUGMENT(image)

    stream = open_stream(args, transform=transform)
    assert len(read_from(stream, 0, 56)) == 1
    assert len(decoded) == 8


def test_an_epoch_after_one_entered_late_is_whole(args):
    stream = open_stream(with_options(args, workers=2))
    read_from(stream, 0, 40)
    assert same(read_from(stream, 1), read_from(open_stream(args), 1))


def test_start_at_the_end_gives_nothing(args):
    stream = open_stream(args)
    assert read_from(stream, 0, 64) == []
    assert stream.num_batches_left == 0


def test_each_sample_comes_at_most_once_and_the_remainder_rotates(args):
    epochs = [numbers(read_from(open_stream(args), epoch)) for epoch in range(6)]
    assert all(len(set(epoch)) == len(epoch) == 64 for epoch in epochs)
    left_out = [frozenset(range(70)) - set(epoch) for epoch in epochs]
    assert len(set(left_out)) == 6
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_augmentation_follows_the_sample_and_not_its_position(args):
    def images_by_number(batches):
        images, texts = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return dict(zip(texts[:, 0].tolist(), images, strict=True))

    whole = images_by_number(read_from(open_stream(args), 1))
    other = images_by_number(read_from(open_stream(args), 1, 3))
    both = whole.keys() & other.keys()
    assert len(both) > 50
    assert all(torch.equal(whole[number], other[number]) for number in both)
    later = images_by_number(read_from(open_stream(args), 2))
    assert not any(torch.equal(whole[number], later[number]) for number in whole.keys() & later)


def spoil(args, make_tar, make_image, folder, bad):
    """Write one shard of 40 pairs of which some are bad, and read an epoch of it."""
    members = []
    for number in range(40):
        image = b"nonsense" if number in bad else make_image(number)
        members += [(f"{number:02d}.jpg", image), (f"{number:02d}.txt", str(number).encode())]
    make_tar(folder / "0.tar", members)
    stream = open_stream(with_options(args, train_data=f"{folder}/0.tar"))
    return numbers(read_from(stream)), stream.skipped


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_pair_moves_no_other_sample(args, make_tar, make_image, tmp_path, workers):
    with_options(args, workers=workers)
    good, skipped = spoil(args, make_tar, make_image, tmp_path / "good", bad=set())
    assert not skipped
    bad = {3, 17, 31}
    found, skipped = spoil(args, make_tar, make_image, tmp_path / "bad", bad=bad)
    moved = [(old, new) for old, new in zip(good, found, strict=True) if old != new]
    assert {old for old, _ in moved} == bad
    assert bad.isdisjoint(found)
    assert skipped == {"unreadable image": 3}
    again, _ = spoil(args, make_tar, make_image, tmp_path / "again", bad=bad)
    assert again == found


def test_what_fills_a_bad_place_is_augmented_in_its_own_way(args, make_tar, make_image, tmp_path):
    members = [("a.jpg", make_image(1)), ("a.txt", b"1"), ("b.jpg", b"?"), ("b.txt", b"2")]
    make_tar(tmp_path / "0.tar", members)
    stream = open_stream(with_options(args, train_data=f"{tmp_path}/0.tar", batch_size=2))
    ((images, texts),) = read_from(stream)
    assert texts[:, 0].tolist() == [1, 1]
    assert not torch.equal(images[0], images[1])


def test_a_bad_shard_is_filled_from_the_others(args, tmp_path, make_shards):
    folder = make_shards([20, 20, 20], folder="others")
    with_options(args, train_data=f"{folder}/{{0..2}}.tar", batch_size=10)
    good = numbers(read_from(open_stream(args)))
    (folder / "1.tar").write_bytes(b"no tar")
    stream = open_stream(args)
    found = numbers(read_from(stream))
    assert [old for old, new in zip(good, found, strict=True) if old != new] == [
        number for number in good if 20 <= number < 40
    ]
    assert Counter(number // 20 for number in found)[1] == 0
    assert stream.skipped == {"unreadable shard": 20}
