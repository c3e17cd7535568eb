"""Samples of a stranger: each is skipped and counted, at a bounded cost, and the run goes on."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image

from clip_pgs.data import archive, decoding, samples, tar
from clip_pgs.data.bad_samples import StalledDataError
from clip_pgs.data.decoding import UnreadableImageError, open_image
from clip_pgs.data.pack import pack_pairs
from clip_pgs.data.tar import index_shard, read_shard
from support.streams import numbers, open_stream, read_from, with_options


def encode(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def jpeg_of_scans(number, side=64):
    """Return a progressive JPEG whose last scan comes again and again."""
    data = encode(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * number + data[-2:]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width=4, height=4, *, extra=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(13 * min(height, 100))))
    return b"\x89PNG\r\n\x1a\n" + header + extra + pixels + chunk(b"IEND", b"")


def bomb(kind, start):
    return png(extra=chunk(kind, start + zlib.compress(b"x" * 100_000_000)))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
HOSTILE_IMAGES = {
    "EPS": EPS,
    "EPS behind a DOS header": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(EPS)) + EPS,
    "PDF": b"%PDF-1.4\n",
    "WMF": b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(40),
    "FITS": b"SIMPLE  =                    T" + bytes(80 * 36),
    "PPM": encode(Image.new("RGB", (4, 4)), "PPM"),
    "ICO": encode(Image.new("RGB", (16, 16)), "ICO"),
    "scans": jpeg_of_scans(20_000),
    "PNG of 2^62 pixels": png(2**31 - 1, 2**31 - 1),
    "BMP of 2^62 pixels": b"BM" + bytes(12) + struct.pack("<Iii", 40, *[2**31 - 1] * 2) + bytes(28),
    "text bomb": bomb(b"iTXt", b"a\0\1\0\0\0"),
    "profile bomb": bomb(b"iCCP", b"a\0\0"),
    "TIFF that leads to itself": b"II*\0\x08\0\0\0" + b"\xff" * 200,
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE_IMAGES)
def test_hostile_image_is_refused_by_one_kind_of_error_at_once(monkeypatch, kind):
    def run(*args, **kwargs):
        raise AssertionError("an interpreter was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    started = time.process_time()
    with pytest.raises(UnreadableImageError):
        open_image(HOSTILE_IMAGES[kind])
    assert time.process_time() - started < 2


def test_usual_images_are_opened_from_bytes_and_paths(tmp_path):
    for image_format in decoding.IMAGE_FORMATS:
        data = encode(Image.new("RGB", (8, 6), (9, 9, 9)), image_format)
        (tmp_path / "image").write_bytes(data)
        assert open_image(data).size == open_image(tmp_path / "image").size == (8, 6)
    assert open_image(jpeg_of_scans(60)).size == (64, 64)
    with pytest.raises(UnreadableImageError, match="No such file"):
        open_image(tmp_path / "nothing")


def test_marker_bytes_behind_an_image_are_no_scans():
    trailer = b"\xff\xda" * 1000  # such as the film of a moving photograph
    assert open_image(encode(Image.new("RGB", (8, 8)), "JPEG") + trailer).size == (8, 8)


def test_decoder_that_gets_lost_is_stopped_by_the_time_it_computes(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_DECODING_SECONDS", 0.2)
    with pytest.raises(UnreadableImageError, match=r"more than 0.2 seconds of processor time"):
        open_image(png(extra=chunk(b"tEXt", b"a\0b") * 2_000_000))


@pytest.mark.parametrize(
    "error", [Image.DecompressionBombError, SyntaxError, MemoryError, RecursionError, struct.error]
)
def test_whatever_a_decoder_raises_is_a_bad_sample(args, third, monkeypatch, error):
    whole = decoding.rgb_pixels

    def decode(image, data, **options):
        if data == b"bad":
            raise error("of the decoder")
        return whole(image, data, **options)

    monkeypatch.setattr("clip_pgs.data.samples.rgb_pixels", decode)
    third([("x.jpg", b"bad"), ("x.txt", b"1"), ("y.jpg", good()), ("y.txt", b"100")])
    stream = open_stream(args)
    assert set(numbers(read_from(stream))) == {*range(12), 100}
    assert stream.skipped == {"unreadable image": 1}


def good():
    return encode(Image.new("RGB", (20, 20)), "JPEG")


@pytest.fixture
def args(make_shards, make_args):
    """Two good shards of six pairs, and a third one beside them without any yet."""
    folder = make_shards([6, 6], with_sizes=False)
    return make_args(train_data=f"{folder}/{{0..2}}.tar", batch_size=7)


@pytest.fixture
def third(args, make_tar):
    """Write the members of the third shard and return its path."""

    def write(members):
        path = Path(args.train_data).parent / "2.tar"
        make_tar(path, members)
        return path

    return write


def sparse_header(name, *, size, stored):
    """Return the header of a GNU sparse member: `stored` bytes at its start, and a hole."""
    info = tarfile.TarInfo(name)
    info.type, info.size = tarfile.GNUTYPE_SPARSE, stored
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, stored)
    header[483:495] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def read_all(args, path, piped):
    """Read an epoch of three shards, directly or through a command."""
    if piped:
        with_options(args, train_data=f"pipe:cat {args.train_data}", train_num_samples=28)
    stream = open_stream(args)
    return set(numbers(read_from(stream))), set(stream.skipped)


@pytest.mark.parametrize("piped", [False, True])
@pytest.mark.parametrize("name", ["bad.jpg", "bad.txt"])
def test_member_that_declares_a_petabyte_is_skipped_and_what_follows_is_read(
    args, third, piped, name
):
    path = third([("good.jpg", good()), ("good.txt", b"100"), ("bad.jpg", good())])
    header = sparse_header(name, size=2**50, stored=512)
    path.write_bytes(header + bytes(512) + path.read_bytes())
    seen, skipped = read_all(args, path, piped)
    assert seen <= {*range(12), 100}
    assert 100 in seen
    kind = "image" if name == "bad.jpg" else "caption"
    assert f"too large {kind}" in skipped


@pytest.mark.parametrize("piped", [False, True])
@pytest.mark.parametrize(
    ("name", "limit"), [("jpg", "MAX_IMAGE_BYTES"), ("txt", "MAX_CAPTION_BYTES")]
)
def test_member_above_the_limit_is_skipped(args, third, monkeypatch, piped, name, limit):
    monkeypatch.setattr(tar, limit, 10_000)
    big = {"jpg": good(), "txt": b"1"} | {name: bytes(10_001)}
    path = third(
        [("good.jpg", good()), ("good.txt", b"100")]
        + [(f"bad.{suffix}", data) for suffix, data in big.items()]
    )
    seen, skipped = read_all(args, path, piped)
    assert seen <= {*range(12), 100}
    assert skipped == {f"too large {'image' if name == 'jpg' else 'caption'}"}


@pytest.mark.parametrize("piped", [False, True])
def test_texts_beside_a_caption_of_its_own_do_not_count(args, third, monkeypatch, piped):
    monkeypatch.setattr(tar, "MAX_CAPTION_BYTES", 10_000)
    texts = [("good.a.txt", bytes(9_999)), ("good.ocr.txt", bytes(10_001)), ("good.txt", b"100")]
    third([("good.jpg", good()), *texts])
    seen, skipped = read_all(args, None, piped)
    assert (100 in seen, skipped) == (True, set())


TOO_MANY = {
    "too large caption": [(f"bad.{number}.txt", b"x" * 200) for number in range(60)],
    "too large image": [(f"bad.{suffix}", bytes(6000)) for suffix in ("png", "webp")],
    "too many captions": [(f"bad.{number}.txt", b"x") for number in range(51)],
    "too many members": [(f"bad.{number}.cls", b"x") for number in range(101)],
}


@pytest.mark.parametrize("how", ["read", "piped", "compressed"])
@pytest.mark.parametrize("reason", TOO_MANY)
def test_sample_with_more_than_a_sample_has_is_skipped(args, third, monkeypatch, how, reason):
    for name, limit in (("MAX_IMAGE_BYTES", 10_000), ("MAX_CAPTION_BYTES", 10_000)):
        monkeypatch.setattr(tar, name, limit)
    monkeypatch.setattr(tar, "_MAX_MEMBERS", 100)
    monkeypatch.setattr(samples, "MAX_CAPTIONS", 50)
    good_ones = [("good.jpg", good()), ("good.txt", b"100")]
    path = third([*good_ones, ("bad.jpg", good()), *TOO_MANY[reason], ("z.jpg", good())])
    if how == "compressed":
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        shards = "{0.tar,1.tar,2.tar.gz}"
        with_options(args, train_data=f"{path.parent}/{shards}", train_num_samples=28)
    seen, skipped = read_all(args, path, how == "piped")
    assert seen <= {*range(12), 100}
    assert 100 in seen
    assert skipped == {reason, "no caption"}


@pytest.mark.parametrize("suffixes", [["jpg", "png", "webp"], [f"{n}.txt" for n in range(150)]])
@pytest.mark.parametrize("how", ["indexed", "through"])
def test_a_sample_of_holes_takes_no_more_memory_than_one_member_may(
    tmp_path, monkeypatch, suffixes, how
):
    monkeypatch.setattr(tar, "MAX_IMAGE_BYTES", 2**22)
    headers = [sparse_header(f"a.{name}", size=2**22 - 1, stored=0) for name in suffixes]
    path = tmp_path / "0.tar"
    path.write_bytes(b"".join(headers) + bytes(1024))
    tracemalloc.start()
    try:
        if how == "through":
            (item,) = read_shard(str(path))
        else:
            with path.open("rb") as file:
                item = index_shard(str(path)).read(file, 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert f"{len(suffixes) * (2**22 - 1)} bytes in {len(suffixes)} members" in item.detail
    assert peak < 3 * 2**22


@pytest.mark.parametrize("size", [2**21, 2**33])
def test_header_that_claims_to_be_long_ends_the_shard_and_takes_no_memory(args, third, size):
    path = third([("good.jpg", good()), ("good.txt", b"100")])
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, size
    path.write_bytes(path.read_bytes()[:2560] + info.tobuf(tarfile.GNU_FORMAT) + bytes(9000))
    stream = open_stream(args, on_skip=(skips := []).append)
    assert 100 in numbers(read_from(stream))
    assert f"a header of {size} bytes" in skips[0].detail


def pax(kind, records):
    """Return a header of such records that extends the next one, or all that follow."""
    lines = b""
    for name, value in records.items():
        length = len(name) + len(value) + 3
        length += len(str(length + len(str(length))))
        lines += b"%d %s=%s\n" % (length, name, value)
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(lines)
    return info.tobuf(tarfile.USTAR_FORMAT) + lines + bytes(-len(lines) % 512)


def member(name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


HOLES = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"0"}
LONG_HEADERS = {
    "map of holes": pax(tarfile.XHDTYPE, HOLES) + member("x.jpg", b"100000\n" + b"0\n" * 200_000),
    "headers in a row": pax(tarfile.XHDTYPE, {b"a": b"x" * 50_000}) * 4,
    "for all members": b"".join(
        pax(tarfile.XGLTYPE, {b"a%d" % number: b"x" * 25_000}) + member(f"x.{number}", b"")
        for number in range(4)
    ),
}


@pytest.mark.parametrize("how", ["indexed", "compressed"])
@pytest.mark.parametrize("kind", LONG_HEADERS)
def test_headers_without_an_end_end_the_shard_and_take_no_memory(
    tmp_path, make_tar, monkeypatch, kind, how
):
    monkeypatch.setattr(archive, "_MAX_HEADER_BYTES", 2**16)
    path = tmp_path / "0.tar"
    make_tar(path, [("good.jpg", b"image"), ("good.txt", b"text")])
    path.write_bytes(path.read_bytes()[:2048] + LONG_HEADERS[kind] + bytes(1024))
    if how == "compressed":
        path = tmp_path / "0.tar.gz"
        path.write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    tracemalloc.start()
    try:
        if how == "indexed":
            failure = index_shard(str(path)).failure
        else:
            *items, failure = read_shard(str(path))
            assert items[0].captions == (b"text",)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert failure.reason == "unreadable shard"
    assert "headers of more than" in failure.detail
    assert peak < 3_000_000


def test_nothing_but_images_and_captions_is_looked_at(args, third, tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "pwned",))

    evil = pickle.dumps(Payload())
    names = [
        "pyd",
        "pkl",
        "pickle",
        "pth",
        "npy",
        "npz",
        "cls",
        "mp",
        "cbor",
        "ten",
        "json",
        "jpg.gz",
    ]
    third([("x.jpg", good()), ("x.txt", b"100"), *((f"x.{name}", evil) for name in names)])
    for pattern in (args.train_data, f"pipe:cat {args.train_data}"):
        with_options(args, train_data=pattern, train_num_samples=13, batch_size=13)
        stream = open_stream(args)
        assert 100 in numbers(read_from(stream))
        assert not stream.skipped
    assert not (tmp_path / "pwned").exists()


def test_timeout_acts_without_workers_though_a_decoder_catches_everything(args, third, monkeypatch):
    def decode(image, data, **options):
        while True:
            pass

    monkeypatch.setattr("clip_pgs.data.samples.rgb_pixels", decode)
    third([])
    with_options(args, data_timeout=0.5)
    with pytest.raises(StalledDataError, match=r"no batch for 0.5 seconds: .*: sample"):
        read_from(open_stream(args, transform=decoding_crop()))


def decoding_crop():
    import open_clip

    return open_clip.image_transform(16, is_train=True)


def test_pack_leaves_hostile_images_out(tmp_path):
    rows = ["filepath,title"]
    for number, data in enumerate([good(), HOSTILE_IMAGES["EPS"], HOSTILE_IMAGES["scans"]]):
        (tmp_path / f"{number}.png").write_bytes(data)
        rows.append(f"{number}.png,text")
    rows.append("https://host/a//b.jpg,text")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    assert pack_pairs(tmp_path / "pairs.csv", tmp_path / "out", skip_bad=True)[1] == 3
