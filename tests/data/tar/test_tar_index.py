from __future__ import annotations

import io
import os
import subprocess
import tarfile

import pytest

from clip_pgs.data.samples import Skip
from clip_pgs.data.tar.tar_headers import UnusualArchiveError, list_plain_files
from clip_pgs.data.tar.tar_index import index_shard
from clip_pgs.data.tar.tar_reader import read_shard

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
LONG = "folder/" * 20 + "name" * 30


def by_index(path):
    """Read a shard's items by random access, from the last to the first, in their order."""
    index = index_shard(str(path))
    file = os.open(path, os.O_RDONLY)
    try:
        items = [index.read(file, number) for number in reversed(range(len(index)))]
    finally:
        os.close(file)
    return [*reversed(items), *([index.failure] if index.failure else [])]


def is_plain(path):
    file = os.open(path, os.O_RDONLY)
    try:
        list_plain_files(file)
    except UnusualArchiveError:
        return False
    finally:
        os.close(file)
    return True


def write(path, members, *, tar_format=tarfile.PAX_FORMAT, mtime=0, pax_headers=None):
    with tarfile.open(path, "w", format=tar_format, pax_headers=pax_headers) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.mtime = mtime
            if data is None:
                info.type = tarfile.SYMTYPE
                info.linkname = "elsewhere"
                tar.addfile(info)
                continue
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


PAIRS = [
    ("a.jpg", b"image a"),
    ("a.txt", b"text a"),
    ("b.txt", b""),
    ("b.json", b"x" * 1500),
    ("b.PNG", b"i" * 512),
    ("__meta__/c.txt", b"no pair"),
    ("../up/c.jpeg", b"image c"),
    ("/rooted/d.webp", b"image d"),
    ("/rooted/d.txt", b"text d"),
    ("e.txt", b"twice"),
    ("e.txt", b"twice in a row"),
]


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_pairs_are_those_of_reading_through(tmp_path, tar_format):
    write(tmp_path / "0.tar", PAIRS, tar_format=tar_format)
    assert by_index(tmp_path / "0.tar") == list(read_shard(str(tmp_path / "0.tar")))
    assert len(by_index(tmp_path / "0.tar")) == 6
    assert is_plain(tmp_path / "0.tar")


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_long_and_foreign_names_are_whole(tmp_path, tar_format):
    names = [f"{LONG[:100]}/{LONG[:90]}", "Stra\u00dfe/\u732b"]
    if tar_format != tarfile.USTAR_FORMAT:
        names.append(LONG)
    members = [(f"{name}.{suffix}", name.encode()) for name in names for suffix in ("jpg", "txt")]
    # webdataset's own writer has times of fractions, which take an extension to each member.
    write(tmp_path / "0.tar", members, tar_format=tar_format, mtime=1234.5)
    items = by_index(tmp_path / "0.tar")
    assert [item.key for item in items] == names
    assert [item.caption.decode() for item in items] == names
    assert is_plain(tmp_path / "0.tar")


@pytest.mark.parametrize("option", ["--format=gnu", "--format=posix"])
def test_files_with_holes_are_filled(tmp_path, option):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.write(b"head")
        file.seek(200_000)
        file.write(b"tail")
        file.truncate(300_000)
    (tmp_path / "a.txt").write_text("text")
    command = ["tar", "--sparse", option, "-C", str(tmp_path), "-cf", str(tmp_path / "0.tar")]
    subprocess.run([*command, "a.jpg", "a.txt"], check=True)
    (pair,) = by_index(tmp_path / "0.tar")
    assert pair.image == (tmp_path / "a.jpg").read_bytes()
    assert [pair] == list(read_shard(str(tmp_path / "0.tar")))
    assert (tmp_path / "0.tar").stat().st_size < 100_000


def test_archives_out_of_the_ordinary_are_read_like_others(tmp_path):
    members = [PAIRS[0], ("a.png", None), PAIRS[1], ("folder.x/", b""), *PAIRS[2:]]
    write(tmp_path / "0.tar", members, pax_headers={"comment": "for all members"})
    assert not is_plain(tmp_path / "0.tar")
    assert by_index(tmp_path / "0.tar") == list(read_shard(str(tmp_path / "0.tar")))


@pytest.mark.parametrize("mtime", [0, 1234.5])
def test_shard_cut_anywhere_gives_what_reading_through_gives(tmp_path, mtime):
    path = tmp_path / "0.tar"
    write(path, PAIRS, mtime=mtime)
    data = path.read_bytes()
    for length in range(0, len(data), 137):
        path.write_bytes(data[:length])
        indexed, read = by_index(path), list(read_shard(str(path)))
        assert [getattr(item, "key", "") for item in indexed] == [item.key for item in read], length
        assert indexed[: len(read) - 1] == read[:-1]
        assert type(indexed[-1]) is type(read[-1])


def test_shard_with_one_byte_changed_gives_what_reading_through_gives(tmp_path):
    path = tmp_path / "0.tar"
    write(path, PAIRS[:4], mtime=1234.5)
    data = path.read_bytes()
    for place in range(0, 8 * 512, 11):
        changed = bytearray(data)
        changed[place] ^= 0x15
        path.write_bytes(changed)
        assert by_index(path) == list(read_shard(str(path))), place


@pytest.mark.parametrize("content", [b"", b"no tar at all " * 200, b"\0" * 4000])
def test_file_without_pairs_says_what_reading_through_says(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    assert by_index(tmp_path / "0.tar") == list(read_shard(str(tmp_path / "0.tar")))


def test_compressed_shard_asks_to_be_unpacked(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    (skip,) = by_index(tmp_path / "0.tar")
    assert skip == Skip(
        str(tmp_path / "0.tar"),
        "",
        "unreadable shard",
        "compressed with gzip; unpack it, or let its name say so",
    )


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\x7f" * 11, b"77777777777\0"])
def test_absurd_sizes_end_a_shard_and_not_the_run(tmp_path, size):
    path = tmp_path / "0.tar"
    write(path, PAIRS[:4])
    data = bytearray(path.read_bytes())
    data[1024 + 124 : 1024 + 136] = size
    header = data[1024:1536]
    header[148:156] = b" " * 8
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(header)
    path.write_bytes(data)
    indexed, read = by_index(path), list(read_shard(str(path)))
    assert [item.key for item in indexed] == [item.key for item in read] == ["a", ""]
    assert indexed[-1].reason == "unreadable shard"


def test_shard_that_shrinks_while_open_gives_no_half_sample(tmp_path):
    path = tmp_path / "0.tar"
    write(path, PAIRS)
    index = index_shard(str(path))
    with path.open("r+b") as file:
        file.truncate(3000)
        items = [index.read(file.fileno(), number) for number in range(len(index))]
    assert [item.reason for item in items[2:]] == ["unreadable shard"] * 4
    assert "cut short" in items[-1].detail
