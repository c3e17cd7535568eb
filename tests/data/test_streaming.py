"""Shards that can only be read from the beginning."""

from __future__ import annotations

import gzip

import pytest

from clip_pgs.data.bad_samples import UnusableDataError
from clip_pgs.data.build import build_val_stream
from clip_pgs.data.streaming import shuffled_stream
from support.streams import AUGMENT, numbers, open_stream, read_from, same, tokenize, with_options


@pytest.fixture
def folder(make_shards):
    return make_shards([10, 10, 10, 10])


@pytest.fixture
def args(folder, make_args):
    pattern = f"pipe:cat {folder}/{{0..3}}.tar"
    return make_args(train_data=pattern, val_data=pattern, train_num_samples=40)


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_gives_every_sample_once(args, workers):
    stream = open_stream(with_options(args, workers=workers))
    assert sorted(numbers(read_from(stream))) == list(range(40))
    assert not stream.is_ordered


def test_ranks_share_an_epoch_without_overlap(args):
    streams = [open_stream(args, rank=rank, world_size=2) for rank in range(2)]
    first, second = (numbers(read_from(stream)) for stream in streams)
    assert [stream.num_batches for stream in streams] == [4, 4]
    assert sorted(first + second) == list(range(40))


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "num_steps",
    [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)],
)
def test_start_at_gives_exactly_the_tail_without_decoding(args, workers, num_steps, resampled):
    with_options(args, dataset_resampled=resampled, batch_size=4)
    whole = read_from(open_stream(with_options(args, workers=workers)), 2)
    decoded = []

    def transform(image):
        decoded.append(image.size)
        return AUGMENT(image)

    stream = open_stream(args, transform=transform)
    stream.start_at(2, num_steps * 4)
    assert stream.num_batches_left == len(whole) - num_steps
    assert same(list(stream), whole[num_steps:])
    assert workers or len(decoded) == 40 - num_steps * 4


def test_start_at_is_exact_with_bad_samples(args, folder, make_tar, make_image):
    members = [(f"{number}.txt", b"100") for number in range(10)]
    members += [("good.jpg", make_image(0)), ("good.txt", b"101")]
    make_tar(folder / "2.tar", members)
    stream = open_stream(args)
    whole = read_from(stream)
    assert 100 not in numbers(whole)
    assert len(numbers(whole)) == 40
    assert stream.skipped["no image"] >= 9
    assert same(read_from(open_stream(args), 0, 10), whole[2:])


def test_epoch_differs_from_the_one_before_and_is_the_same_again(args):
    first, second = (read_from(open_stream(args), epoch) for epoch in (0, 1))
    assert numbers(first) != numbers(second)
    assert same(read_from(open_stream(args), 1), second)


def test_workers_are_capped_at_what_the_shards_feed(args, caplog):
    stream = open_stream(with_options(args, workers=3), rank=0, world_size=2)
    assert stream.num_workers == 2
    assert "2 workers per process instead of --workers 3: 4 shards" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resampled", [False, True])
def test_data_without_a_usable_sample_is_an_error_that_says_why(
    args, folder, make_tar, make_image, workers, resampled
):
    for shard in range(4):
        make_tar(folder / f"{shard}.tar", [(f"{n}.jpg", make_image(n)) for n in range(3)])
    with_options(args, dataset_resampled=resampled, workers=workers)
    with pytest.raises(UnusableDataError, match=r"no usable sample in pipe:cat .*no caption"):
        read_from(open_stream(args))


def test_shards_that_fail_are_an_error_and_no_endless_loop(args):
    with_options(args, train_data="pipe:exit 3", dataset_type="webdataset")
    with pytest.raises(UnusableDataError, match="unreadable shard"):
        read_from(open_stream(args))


def test_bad_shard_among_the_drawn_ones_does_not_end_the_run(args, folder):
    (folder / "1.tar").write_bytes(b"no tar")
    with_options(args, dataset_resampled=True, train_data=f"pipe:cat {folder}/{{0..1}}.tar")
    for seed in range(5):
        assert set(numbers(read_from(open_stream(with_options(args, seed=seed))))) <= set(range(10))


def test_compressed_shards_are_read_too(args, folder):
    for number in range(4):
        packed = gzip.compress((folder / f"{number}.tar").read_bytes())
        (folder / f"{number}.tar.gz").write_bytes(packed)
    with_options(args, train_data=f"{folder}/{{0..3}}.tar.gz")
    assert sorted(numbers(read_from(open_stream(args)))) == list(range(40))


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_gives_every_sample_once_in_order_whatever_the_workers(args, workers):
    with_options(args, batch_size=12, workers=workers)
    stream = build_val_stream(args, transform=AUGMENT, tokenize=tokenize)
    assert numbers(list(stream)) == list(range(40))
    assert (stream.num_samples, stream.num_batches) == (None, None)


@pytest.mark.parametrize("bad", [(), (1, 9), (0, 1, 2, 3), (4, 5, 6, 7, 8), range(20)])
@pytest.mark.parametrize("source", ["pipe:cat {}/{{0..1}}.tar", "{}/{{0..1}}.tar.gz"])
def test_validation_batches_do_not_depend_on_workers_where_pairs_are_bad(
    make_args, make_tar, make_image, tmp_path, bad, source
):
    for shard in range(2):
        members = []
        for number in range(11 * shard, 11 * shard + 11):
            image = b"no image" if number in bad else make_image(number)
            members += [(f"{number:02d}.jpg", image), (f"{number:02d}.txt", str(number).encode())]
        make_tar(tmp_path / f"{shard}.tar", members)
        packed = gzip.compress((tmp_path / f"{shard}.tar").read_bytes())
        (tmp_path / f"{shard}.tar.gz").write_bytes(packed)
    args = make_args(batch_size=4, val_data=source.format(tmp_path))

    def read(workers):
        with_options(args, workers=workers)
        stream = build_val_stream(args, transform=AUGMENT, tokenize=tokenize)
        return list(stream), stream.skipped

    batches, skipped = read(0)
    assert skipped.total() == len(bad)
    for workers in (1, 2):
        others, others_skipped = read(workers)
        assert same(others, batches)
        assert others_skipped == skipped
    # Shards that can be read in any order give the same.
    with_options(args, val_data=f"{tmp_path}/{{0..1}}.tar")
    assert [numbers([batch]) for batch in read(2)[0]] == [numbers([batch]) for batch in batches]


BUFFER = {"buffer_size": 50, "initial_size": 10, "max_bytes": 1000, "size_of": lambda _: 1}


@pytest.mark.parametrize("length", [0, 5, 300])
def test_stream_gives_each_item_once(length):
    out = list(shuffled_stream(range(length), 0, **BUFFER))
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
    for num_out, _ in enumerate(shuffled_stream(items(), 0, **BUFFER), 1):
        ahead.append(num_read - num_out)
    assert ahead[0] == 10
    assert max(ahead) == 50


def test_large_items_fill_the_buffer_by_their_bytes():
    sizes = [7, 400, 300, 2500, 1, 1, 600, 350, 350, *[9] * 300]
    out, waiting = [], []

    def items():
        for number in range(len(sizes)):
            waiting.append(sum(sizes[:number]) - sum(sizes[item] for item in out))
            yield number

    for item in shuffled_stream(items(), 0, **{**BUFFER, "size_of": sizes.__getitem__}):
        out.append(item)
    assert sorted(out) == list(range(len(sizes)))
    assert max(waiting) <= 1000
