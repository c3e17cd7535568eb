"""Faults in single samples: what is kept, what is skipped, and how it is counted."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip import SimpleTokenizer
from PIL import Image
from torchvision import transforms

from clip_pgs.data.bad_samples import Skip, UnusableDataError
from clip_pgs.data.build import build_train_stream, build_val_stream
from support.streams import AUGMENT, numbers, open_stream, read_from, tokenize, with_options

PLAIN = transforms.Compose([transforms.Resize((4, 4)), transforms.ToTensor()])
COLOUR = (200, 30, 60)


def encode(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def solid(mode="RGB", size=(24, 20)):
    return Image.new("RGB", size, COLOUR).convert(mode)


def png_that_claims(width, height):
    data = bytearray(encode(solid()))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def broken_huffman_table():
    data = bytearray(encode(solid(), "JPEG"))
    start = data.index(b"\xff\xc4")
    data[start + 4 : start + 40] = b"\xff" * 36
    return bytes(data)


def grey_ramp_16_bit():
    return Image.fromarray(np.full((20, 24), 0x4000, dtype=np.uint16))


JPEG = encode(solid(), "JPEG", quality=100)
FAULTS = {
    "corrupt JPEG": ({"jpg": broken_huffman_table(), "txt": b"1"}, "unreadable image"),
    "truncated JPEG": ({"jpg": JPEG[: len(JPEG) // 2], "txt": b"1"}, "unreadable image"),
    "empty JPEG": ({"jpg": b"", "txt": b"1"}, "unreadable image"),
    "text as JPEG": ({"jpg": b"<html>404</html>", "txt": b"1"}, "unreadable image"),
    "bomb": ({"png": png_that_claims(30_000, 30_000), "txt": b"1"}, "unreadable image"),
    "30000 x 1": ({"png": encode(solid(size=(30_000, 1))), "txt": b"1"}, "unreadable image"),
    "1 x 101": ({"png": encode(solid(size=(1, 101))), "txt": b"1"}, "unreadable image"),
    "unknown extension": ({"bmp": encode(solid(), "BMP"), "txt": b"1"}, "no image"),
    "missing caption": ({"jpg": JPEG}, "no caption"),
    "empty caption": ({"jpg": JPEG, "txt": b""}, "empty caption"),
    "blank caption": ({"jpg": JPEG, "txt": b" \n\t"}, "empty caption"),
    "non-UTF-8 caption": ({"jpg": JPEG, "txt": b"caf\xe9"}, "caption is not UTF-8"),
}
KEPT = {
    "broken side-car JSON": {"jpg": JPEG, "txt": b"1", "json": b'{"caption": '},
    "other members": {"jpg": JPEG, "txt": b"1", "cls": b"\xff", "npy": b"", "mask.png": b"?"},
    "upper-case suffix": {"JPG": JPEG, "txt": b"1"},
    "CMYK": {"jpg": encode(solid("CMYK"), "JPEG", quality=100), "txt": b"1"},
    "palette": {"png": encode(solid("RGB").quantize(4)), "txt": b"1"},
    "transparent palette": {
        "png": encode(solid("RGB").quantize(4), transparency=0),
        "txt": b"1",
    },
    "transparent": {"png": encode(solid("RGBA")), "txt": b"1"},
    "1 x 1": {"png": encode(solid(size=(1, 1))), "txt": b"1"},
    "100 x 1": {"png": encode(solid(size=(100, 1))), "txt": b"1"},
    "1 x 100": {"png": encode(solid(size=(1, 100))), "txt": b"1"},
    "animated WebP": {
        "webp": encode(
            solid(),
            "WEBP",
            lossless=True,
            save_all=True,
            append_images=[Image.new("RGB", (24, 20))],
        ),
        "txt": b"1",
    },
    "animated PNG": {
        "png": encode(solid(), save_all=True, append_images=[Image.new("RGB", (24, 20))]),
        "txt": b"1",
    },
}
GREY = {
    "LA": (encode(Image.new("LA", (24, 20), (64, 100))), 64),
    "16-bit": (encode(grey_ramp_16_bit()), 64),
    "1-bit": (encode(Image.new("1", (24, 20), 1)), 255),
}


@pytest.fixture
def args(make_shards, make_args):
    """Two good shards of six pairs, and a third one beside them without any yet."""
    folder = make_shards([6, 6], with_sizes=False)
    return make_args(train_data=f"{folder}/{{0..2}}.tar", batch_size=4, workers=2)


def folder_of(args):
    return Path(args.train_data).parent


@pytest.fixture
def third(args, make_tar):
    """Write the members of the third shard and return its path."""

    def write(samples):
        path = folder_of(args) / "2.tar"
        members = [
            (f"{key}.{suffix}", data)
            for key, sample in samples.items()
            for suffix, data in sample.items()
        ]
        make_tar(path, members)
        return str(path)

    return write


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_sample_is_skipped_counted_and_named(args, third, fault, workers):
    members, reason = FAULTS[fault]
    good = {"good": {"jpg": JPEG, "txt": b"100"}}
    path = third({**good, "bad 1": members, "bad 2": members, "bad 3": members})
    skips = []
    stream = open_stream(with_options(args, workers=workers), on_skip=skips.append)
    seen = numbers(read_from(stream))
    assert len(seen) == stream.num_samples == 16
    assert {*range(12), 100} == set(seen)
    assert stream.skipped == {reason: 3}
    assert sorted((skip.shard, skip.key, skip.reason) for skip in skips) == [
        (path, f"bad {number}", reason) for number in (1, 2, 3)
    ]


def colours_of_number_100(args):
    stream = build_train_stream(args, transform=PLAIN, tokenize=tokenize, rank=0, world_size=1)
    batches = read_from(stream)
    images, texts = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert not stream.skipped
    return images[texts[:, 0] == 100].mul(255).round().unique(dim=0)


@pytest.mark.parametrize("oddity", KEPT)
def test_odd_sample_is_kept_with_its_colours(args, third, oddity):
    sample = {**KEPT[oddity], "txt": b"100"}
    third({f"odd {number}": sample for number in range(4)})
    (image,) = colours_of_number_100(args)
    expected = torch.tensor(COLOUR, dtype=torch.float32).view(3, 1, 1).expand(3, 4, 4)
    assert (image - expected).abs().max() <= 3


@pytest.mark.parametrize("mode", GREY)
def test_grey_image_is_kept_and_scaled(args, third, mode):
    data, grey = GREY[mode]
    third({f"grey {number}": {"png": data, "txt": b"100"} for number in range(4)})
    (image,) = colours_of_number_100(args)
    assert image.unique().tolist() == [grey]


@pytest.mark.slow
def test_very_long_caption_is_kept_and_takes_no_hours(args, third):
    words = "a dog " * 200_000
    samples = {"word": "ab" * 500_000, "letters": words, "foreign": "\u732b" * 300_000}
    third({key: {"jpg": JPEG, "txt": text.encode()} for key, text in samples.items()})
    with_options(args, train_data=args.train_data.replace("{0..2}", "2"), batch_size=3)
    stream = build_train_stream(
        args, transform=AUGMENT, tokenize=SimpleTokenizer(), rank=0, world_size=1
    )
    ((_, texts),) = read_from(stream)
    assert texts.shape == (3, 77)
    assert texts[:, -1].tolist() == [49407] * 3
    assert SimpleTokenizer()([words])[0].tolist() in texts.tolist()


def test_names_that_climb_are_keys_and_nothing_is_written(args, third, tmp_path):
    names = ["../../climbs", "/rooted", "a/../../b", "C:\\x", ".", "..jpg"]
    third({name: {"jpg": JPEG, "txt": b"100"} for name in names})
    before = sorted(tmp_path.parent.rglob("*"))
    stream = open_stream(args)
    assert numbers(read_from(stream)).count(100) == 4
    assert not stream.skipped
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_bad_row_of_a_table_is_counted(tmp_path, make_image, make_args):
    (tmp_path / "good.jpg").write_bytes(make_image(1))
    (tmp_path / "bad.jpg").write_bytes(b"?")
    (tmp_path / "folder.jpg").mkdir()
    rows = [
        "good.jpg\t1",
        "bad.jpg\t2",
        "none.jpg\t3",
        "folder.jpg\t4",
        "good.jpg\t",
        "good.jpg\t6",
    ]
    table = tmp_path / "pairs.csv"
    table.write_text("\n".join(["filepath\ttitle", *(f"{tmp_path}/{row}" for row in rows)]))
    stream = open_stream(make_args(train_data=str(table), batch_size=3, workers=2))
    seen = numbers(read_from(stream))
    assert len(seen) == 6
    assert set(seen) == {1, 6}
    assert stream.skipped == {
        "unreadable image": 1,
        "unreadable image file": 2,
        "empty caption": 1,
    }


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resampled", [False, True])
def test_data_without_a_usable_sample_is_an_error_that_names_the_missing_member(
    tmp_path, make_tar, make_image, make_args, workers, resampled
):
    for shard in range(2):
        make_tar(tmp_path / f"{shard}.tar", [(f"{n}.jpg", make_image(n)) for n in range(9)])
    args = make_args(
        train_data=f"{tmp_path}/{{0..1}}.tar", dataset_resampled=resampled, workers=workers
    )
    with pytest.raises(
        UnusableDataError, match=r"no usable sample in .*\.tar.*no caption"
    ) as error:
        read_from(open_stream(args))
    assert "no .txt member" in str(error.value)


def test_validation_leaves_bad_samples_out_and_moves_no_batch(args, third):
    third({"bad": FAULTS["missing caption"][0], "good": {"jpg": JPEG, "txt": b"100"}})
    with_options(args, val_data=args.train_data)
    stream = build_val_stream(args, transform=AUGMENT, tokenize=tokenize)
    batches = list(stream)
    assert [numbers([batch]) for batch in batches] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [100],
    ]
    assert stream.skipped == {"no caption": 1}


def test_skip_reads_as_a_sentence():
    skip = Skip("data/0.tar", "a", "no caption", "no .txt member")
    assert str(skip) == "data/0.tar: a: no caption (no .txt member)"
