from __future__ import annotations

import io
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from clip_pgs.data.bad_samples import UnusableDataError
from clip_pgs.data.build import build_train_stream, build_val_stream
from support.streams import AUGMENT, numbers, open_stream, read_from, same, tokenize, with_options


@pytest.fixture
def folder(make_shards):
    return make_shards([10, 10, 10, 10])


@pytest.fixture
def args(folder, make_args):
    return make_args(train_data=f"{folder}/{{0..3}}.tar", val_data=f"{folder}/{{0..3}}.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_gives_every_sample_once_in_full_batches(args, workers):
    stream = open_stream(with_options(args, workers=workers))
    batches = read_from(stream)
    assert (stream.num_samples, stream.num_batches) == (40, 8)
    assert sorted(numbers(batches)) == list(range(40))
    assert [images.shape for images, _ in batches] == [(5, 3, 8, 8)] * 8
    assert {(images.dtype, texts.dtype) for images, texts in batches} == {
        (torch.float32, torch.int64)
    }


def test_image_and_caption_belong_together(args, make_image):
    size = transforms.Compose([transforms.ToTensor()])
    stream = build_train_stream(args, transform=size, tokenize=tokenize, rank=0, world_size=1)
    images, texts = next(iter(stream))
    for image, text in zip(images, texts, strict=True):
        stored = Image.open(io.BytesIO(make_image(int(text[0])))).convert("RGB")
        assert torch.equal(image, transforms.functional.to_tensor(stored))


@pytest.mark.parametrize("workers", [0, 2])
def test_same_seed_gives_the_same_batches_bit_by_bit(args, workers):
    with_options(args, workers=workers)
    assert same(read_from(open_stream(args)), read_from(open_stream(args)))


def test_other_seed_gives_another_order(args):
    first = numbers(read_from(open_stream(args)))
    args.seed = 1
    assert numbers(read_from(open_stream(args))) != first


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_does_not_depend_on_the_epochs_before_it(args, workers):
    with_options(args, workers=workers)
    whole_run = open_stream(args)
    epochs = [read_from(whole_run, epoch) for epoch in range(3)]
    assert numbers(epochs[0]) != numbers(epochs[1])
    assert same(read_from(open_stream(args), 2), epochs[2])


def test_iteration_left_early_does_not_change_the_next(args):
    stream = open_stream(with_options(args, workers=2))
    expected = read_from(stream, 1)
    stream.start_at(0, 0)
    next(iter(stream))
    assert same(read_from(stream, 1), expected)


def test_loading_leaves_the_generators_of_the_process_alone(args):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seed():
        for set_seed in (random.seed, np.random.seed, torch.manual_seed):
            set_seed(5)

    seed()
    expected = [draw() for _ in range(2)]
    seed()
    batches = iter(open_stream(args))
    next(batches)
    between = draw()
    next(batches)
    assert [between, draw()] == expected


def test_samples_are_counted_where_nothing_states_them(make_shards, make_args):
    folder = make_shards([10, 7], with_sizes=False)
    args = make_args(train_data=f"{folder}/{{0..1}}.tar", batch_size=17)
    assert sorted(numbers(open_stream(args))) == list(range(17))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({}, []),
        ({"1.tar": 1}, ["says that 1.tar has 1 sample, but it has 3; 2 samples left out of each"]),
        ({"1.tar": 2, "17.tar": 0}, ["3, and is wrong about 1 more shard; 4 samples left out of"]),
        ({"1.tar": 1, "3.tar": 9, "5.tar": 9}, ["3, and is wrong about 2 more shards; 2 samples"]),
        ({"3.tar": 4}, ["says that 3.tar has 4 samples, but it has 3"]),
    ],
)
@pytest.mark.parametrize("resampled", [False, True])
def test_sizes_that_are_not_those_of_the_shards_are_told_once(
    make_shards, make_args, caplog, wrong, told, resampled
):
    folder = make_shards([3] * 20)
    stated = json.loads((folder / "sizes.json").read_text())
    (folder / "sizes.json").write_text(json.dumps({**stated, **wrong}))
    pattern = f"{folder}/{{0..19}}.tar"
    args = make_args(train_data=pattern, batch_size=5, dataset_resampled=resampled)
    # A run opens a stream in each of its phases.
    for rank in (0, 1, 0):
        open_stream(args, rank=rank, world_size=2)
    assert len(caplog.messages) == len(told)
    assert all(part in text for part, text in zip(told, caplog.messages, strict=True))


def test_train_num_samples_shortens_or_repeats_an_epoch(args):
    short = numbers(open_stream(with_options(args, train_num_samples=10)))
    assert len(set(short)) == len(short) == 10
    long = numbers(open_stream(with_options(args, train_num_samples=60)))
    assert sorted(long[:40]) == list(range(40))
    assert len(set(long[40:])) == 20


def test_resampled_shards_are_drawn_again_each_epoch(args):
    args.dataset_resampled = True
    stream = open_stream(args)
    first, second = (numbers(read_from(stream, epoch)) for epoch in (0, 1))
    assert len(first) == len(second) == 40
    assert first != second
    assert numbers(read_from(open_stream(args), 1)) == second


def test_upsampling_factors_weigh_the_sources(make_shards, make_args):
    often = make_shards([4] * 4, folder="often")
    seldom = make_shards([4] * 4, folder="seldom", first=100)
    args = make_args(
        train_data=f"{often}/{{0..3}}.tar::{seldom}/{{0..3}}.tar",
        dataset_resampled=True,
        train_data_upsampling_factors="9::1",
        train_num_samples=400,
    )
    share = sum(number < 100 for number in numbers(read_from(open_stream(args)))) / 400
    assert 0.8 < share < 1.0
    args.train_data_upsampling_factors = "0::1"
    assert min(numbers(read_from(open_stream(args)))) >= 100


def test_many_bad_samples_are_logged_as_a_few_and_a_total(
    tmp_path, make_tar, make_image, make_args, caplog
):
    members = [(f"{number:03d}.jpg", b"nonsense") for number in range(300)]
    make_tar(tmp_path / "0.tar", [*members, ("good.jpg", make_image(1)), ("good.txt", b"1")])
    args = make_args(val_data=f"{tmp_path}/0.tar")
    stream = build_val_stream(args, transform=AUGMENT, tokenize=tokenize)
    assert numbers(list(stream)) == [1]
    assert stream.skipped == {"no caption": 300}
    assert caplog.text.count("skipped") == 12
    assert "in this epoch 300 skipped (no caption: 300)" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_gives_every_sample_once_in_order_whatever_the_workers(args, workers):
    args.batch_size = 12
    stream = build_val_stream(
        with_options(args, workers=workers), transform=AUGMENT, tokenize=tokenize
    )
    batches = list(stream)
    assert [len(images) for images, _ in batches] == [12, 12, 12, 4]
    assert numbers(batches) == list(range(40))
    assert (stream.num_samples, stream.num_batches) == (40, 4)
    assert same(list(stream), batches)


def test_validation_without_a_usable_sample_is_an_error(tmp_path, make_tar, make_image, make_args):
    make_tar(tmp_path / "0.tar", [("a.jpg", make_image(0))])
    stream = build_val_stream(
        make_args(val_data=f"{tmp_path}/0.tar"), transform=AUGMENT, tokenize=tokenize
    )
    with pytest.raises(UnusableDataError, match="no usable sample: 1 skipped"):
        list(stream)


@pytest.fixture
def table(tmp_path, make_image):
    """A table of 13 rows with images beside it."""
    rows = ["filepath\ttitle"]
    for number in range(13):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(make_image(number))
        rows.append(f"{path}\t{number}")
    (tmp_path / "pairs.tsv").write_text("\n".join(rows))
    return tmp_path / "pairs.tsv"


def test_table_gives_full_batches_that_do_not_depend_on_workers(table, make_args):
    args = make_args(train_data=str(table), batch_size=3)
    batches = read_from(open_stream(args))
    assert len(batches) == 4
    assert len(set(numbers(batches))) == 12
    assert same(read_from(open_stream(with_options(args, workers=2))), batches)
    assert numbers(read_from(open_stream(args), 1)) != numbers(batches)


def test_missing_image_of_a_table_is_skipped_by_name(table, make_args, caplog):
    (table.parent / "4.jpg").unlink()
    stream = open_stream(make_args(train_data=str(table), batch_size=13))
    assert 4 not in numbers(read_from(stream))
    assert f"{table}: row 5: unreadable image file" in caplog.text
    assert "4.jpg" in caplog.text


def test_table_serves_for_validation(table, make_args):
    args = make_args(val_data=str(table), batch_size=5)
    stream = build_val_stream(args, transform=AUGMENT, tokenize=tokenize)
    assert numbers(list(stream)) == list(range(13))
    assert (stream.num_samples, stream.num_batches) == (13, 3)


def test_synthetic_images_are_blank_and_of_the_size_of_the_transform(make_args):
    def dummy_tokens(captions):
        assert captions == ["Dummy caption"]
        return torch.ones(len(captions), 3, dtype=torch.int64)

    args = make_args(dataset_type="synthetic", train_num_samples=12)
    stream = build_train_stream(
        args, transform=AUGMENT, tokenize=dummy_tokens, rank=0, world_size=1
    )
    batches = list(stream)
    assert (stream.num_samples, stream.num_batches, len(batches)) == (10, 2, 2)
    assert batches[0][0].shape == (5, 3, 8, 8)
    assert not batches[0][0].any()


def test_kind_that_cannot_be_told_is_refused(make_args):
    with pytest.raises(ValueError, match=r"--train-data 'pairs.txt' .* --dataset-type"):
        open_stream(make_args(train_data="pairs.txt"))
