from __future__ import annotations

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import tarfile
from itertools import islice

import numpy as np
import pytest

from clip_pgs.data import tar
from clip_pgs.data.bad_samples import Skip
from clip_pgs.data.order import SampleRef
from clip_pgs.data.samples import RawSample
from clip_pgs.data.tar import (
    ShardSource,
    cache_paths,
    index_shard,
    index_shards,
    read_shard,
    size_shards,
)

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
LONG = "folder/" * 20 + "name" * 30


def by_index(path):
    """Read a shard's items by random access, from the last to the first, in their order."""
    index = index_shard(str(path))
    with open(path, "rb") as file:
        items = [index.read(file, number) for number in reversed(range(len(index)))]
    return [*reversed(items), *([index.failure] if index.failure else [])]


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
    assert [item.captions[0].decode() for item in items] == names


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


def test_compressed_shard_of_another_name_is_told_which_it_should_have(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    (skip,) = by_index(tmp_path / "0.tar")
    assert (skip.shard, skip.key, skip.reason) == (str(tmp_path / "0.tar"), "", "unreadable shard")
    assert ".tar.gz" in skip.detail


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


def appended(data):
    return data + data


def with_a_hole(data):
    """As a download leaves it of which a piece never came."""
    return data[:4096] + bytes(len(data) - 8192) + data[-4096:] + b"the last piece"


def zeroed(data):
    return data[:4096] + bytes(2**17)


@pytest.mark.parametrize("damage", [appended, with_a_hole, zeroed])
@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_what_follows_the_end_of_an_archive_is_told_and_not_left_out_in_silence(
    tmp_path, damage, ending
):
    path = tmp_path / f"0.{ending}"
    write(path, [(f"{number}.txt", b"text" * 99) for number in range(20)])
    whole = list(read_shard(str(path)))
    data = damage(path.read_bytes())
    path.write_bytes(gzip.compress(data) if ending == "tar.gz" else data)
    readings = [list(read_shard(str(path))), list(read_shard(f"pipe:cat {path}"))]
    for items in [*readings, *([by_index(path)] if ending == "tar" else [])]:
        assert [item.key for item in items[:-1]] == [item.key for item in whole[: len(items) - 1]]
        assert items[-1].reason == "unreadable shard"
        assert "the end of the archive, at byte" in items[-1].detail


@pytest.mark.parametrize("padding", [0, 9000, 2**16 - 512])
def test_padding_behind_an_archive_is_none_of_its_data(tmp_path, padding):
    path = tmp_path / "0.tar"
    write(path, PAIRS[:2])
    whole = list(read_shard(str(path)))
    path.write_bytes(path.read_bytes().rstrip(b"\0").ljust(2048, b"\0") + bytes(1024 + padding))
    assert list(read_shard(str(path))) == by_index(path) == whole


def test_a_member_that_states_more_than_a_stream_holds_ends_it(tmp_path):
    path = tmp_path / "0.tar"
    write(path, PAIRS[:2])
    header = tarfile.TarInfo("zz.bin")
    header.size = 2**50
    members = path.read_bytes()[:2048]
    path.write_bytes(members + header.tobuf(tarfile.GNU_FORMAT))
    items = list(read_shard(f"pipe:cat {path}"))
    assert items[0].key == "a"
    assert items[-1].detail == "unexpected end of data"


@pytest.mark.parametrize(
    ("stem", "num_bytes"),
    [("n" * 1_000_000, 1_000_004), ("\u00e9" * 600, 1204), ("\U0001f600" * 1000, 4004)],
)
def test_a_name_of_countless_letters_ends_a_shard_and_its_index_stays_small(
    tmp_path, stem, num_bytes
):
    path = tmp_path / "0.tar"
    pairs = [(f"{number}.txt", b"text") for number in range(300)]
    write(path, [*pairs, (f"{stem}.txt", b"text"), ("after.txt", b"text")])
    index = index_shard(str(path))
    assert (len(index), index.keys.nbytes < 10_000) == (300, True)
    for failure in (index.failure, list(read_shard(str(path)))[-1]):
        assert failure.detail == f"a name of {num_bytes} bytes, more than 1024"


def test_a_name_of_as_many_bytes_as_it_may_have_is_read(tmp_path):
    write(tmp_path / "0.tar", [("\U0001f600" * 255 + ".txt", b"text")])
    assert index_shard(str(tmp_path / "0.tar")).failure is None


def test_shard_that_shrinks_while_open_gives_no_half_sample(tmp_path):
    path = tmp_path / "0.tar"
    write(path, PAIRS)
    index = index_shard(str(path))
    with path.open("r+b") as file:
        file.truncate(3000)
        items = [index.read(file, number) for number in range(len(index))]
    assert [item.reason for item in items[2:]] == ["unreadable shard"] * 4
    assert "cut short" in items[-1].detail


FOREIGN = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n": "version https://git-lfs",
    b"\n<!DOCTYPE html><html>": "<!DOCTYPE html>",
    b"<html>404</html>" * 99: "<html>404",
    b"PK\x03\x04" + bytes(600): "PK",
    b"\x28\xb5\x2f\xfd" + bytes(600): "xb5/",
    b"PAR1" + bytes(600): "PAR1",
    bz2.compress(bytes(999)): "BZh",
    lzma.compress(bytes(999)): "7zXZ",
    b'{"error": 404}': '{"error": 404}',
}


@pytest.mark.parametrize("content", FOREIGN)
def test_what_is_there_in_place_of_a_shard_is_told(tmp_path, content):
    path = tmp_path / "0.tar"
    path.write_bytes(content)
    for item in (*by_index(path), *read_shard(str(path))):
        assert item.reason == "unreadable shard"
        assert FOREIGN[content] in item.detail
    if content[:1] in b"v\n<{P":
        (skip,) = read_shard(f"pipe:cat {path}")
        assert FOREIGN[content] in skip.detail


@pytest.mark.parametrize("name", ["version https:/x.jpg", "{a}.jpg", "PAR1.jpg", "<html.jpg"])
def test_shard_whose_first_name_looks_like_something_else_is_read(tmp_path, name):
    write(tmp_path / "0.tar", [(name, b"x"), ("b.txt", b"y")])
    assert len(by_index(tmp_path / "0.tar")) == 2


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Return a shard whose index is kept, beside it or in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tar, "_MIN_CACHED", 3)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "0.tar", PAIRS)
    return tmp_path / "data" / "0.tar"


def forbid_indexing(monkeypatch):
    def fail(*args):
        raise AssertionError("indexed anew")

    monkeypatch.setattr(tar, "_make_index", fail)


def test_index_is_kept_beside_the_shard_and_used_again(large, monkeypatch):
    expected = by_index(large)
    assert [path.name for path in sorted(large.parent.iterdir())] == [".0.tar.index", "0.tar"]
    forbid_indexing(monkeypatch)
    assert by_index(large) == expected == list(read_shard(str(large)))


@pytest.mark.parametrize("name", [".0.tar.index", "..0.tar.index.unfinished"])
def test_no_index_is_written_through_a_link_beside_the_shard(large, tmp_path, name):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (large.parent / name).symlink_to(mine)
    by_index(large)
    assert mine.read_text() == "precious"
    assert [path.name for path in sorted(large.parent.iterdir())] == [".0.tar.index", "0.tar"]


def test_index_of_a_folder_that_cannot_be_written_is_in_the_users_cache(large, monkeypatch):
    # Root may write anywhere: a folder in the place of the file stops all.
    cache_paths(str(large))[0].mkdir()
    expected = by_index(large)
    assert cache_paths(str(large))[1].is_file()
    forbid_indexing(monkeypatch)
    assert by_index(large) == expected


def test_a_shard_is_read_where_the_user_has_no_cache(large, monkeypatch):
    cache_paths(str(large))[0].mkdir()
    expected = list(read_shard(str(large)))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    # The number of a user that the system does not know, as containers run.
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    assert by_index(large) == expected


def test_a_shard_is_read_where_the_users_cache_may_not_be_looked_into(large, monkeypatch):
    cache = cache_paths(str(large))[1]
    looked_at = os.stat

    def refusing(path, *args, **options):
        if os.fspath(path) == str(cache):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return looked_at(path, *args, **options)

    monkeypatch.setattr(os, "stat", refusing)
    assert by_index(large) == list(read_shard(str(large)))


def rewrite(path):
    """Write other pairs into a shard, whose size and time stay as they were."""
    before = path.stat()
    # Till the clock of the file system has gone on.
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        write(path, PAIRS[::-1])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def replace(path):
    """Put another shard of the same size and time in its place."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    rewrite(other)
    other.replace(path)


@pytest.mark.parametrize(
    "change",
    [
        rewrite,
        replace,
        lambda path: write(path, PAIRS[:2]),
        lambda path: os.utime(path, (1, 1)),
        lambda path: path.write_bytes(path.read_bytes() + bytes(512)),
    ],
)
def test_index_of_a_shard_that_changed_is_made_anew(large, change):
    by_index(large)
    change(large)
    cached = cache_paths(str(large))[0]
    before = cached.read_bytes()
    assert by_index(large) == list(read_shard(str(large)))
    assert cached.read_bytes() != before or len(by_index(large)) < 3


@pytest.mark.parametrize("is_indexed", [False, True])
def test_a_shard_that_gets_other_members_while_it_is_in_use_is_bad(tmp_path, is_indexed):
    path = tmp_path / "0.tar"
    write(path, PAIRS)
    expected = list(read_shard(str(path)))
    if is_indexed:
        size_shards([str(path)], use_stated=False)
    source = ShardSource([str(path)])
    if not is_indexed:
        assert source.read(SampleRef(0, 0)) == expected[0]
    write(path, PAIRS[::-1])
    os.utime(path, (1, 1))
    after = [source.read(SampleRef(0, number)) for number in range(len(expected))]
    assert {(skip.shard, skip.reason) for skip in after} == {(str(path), "changed shard")}
    # The same members again, or only another time of the file.
    write(path, PAIRS)
    for time in (2, 3):
        os.utime(path, (time, time))
        assert [source.read(SampleRef(0, number)) for number in range(len(expected))] == expected
    path.unlink()
    assert source.read(SampleRef(0, 0)) == expected[0]


def away(path, monkeypatch):
    """Take a shard away for a moment."""
    path.rename(f"{path}.away")
    return lambda: path.with_name(f"{path.name}.away").rename(path)


def fails_at_once(path, monkeypatch):
    """Give an error of the system for its first bytes."""

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tar, "open_archive", fail)
    return monkeypatch.undo


def fails_in_the_middle(path, monkeypatch):
    """Give one after its first members."""
    pair_members = tar._pair_members

    def fail(archive):
        yield from islice(pair_members(archive), 3)
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(tar, "_pair_members", fail)
    return monkeypatch.undo


def has_no_state(path, monkeypatch):
    """Give one for the state of the open file."""

    def fail(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(tar.os, "fstat", fail)
    return monkeypatch.undo


@pytest.mark.parametrize("fault", [away, fails_at_once, fails_in_the_middle, has_no_state])
@pytest.mark.parametrize("is_indexed", [False, True])
def test_a_shard_that_the_system_does_not_give_for_a_moment_is_back_after_it(
    tmp_path, monkeypatch, fault, is_indexed
):
    path = tmp_path / "0.tar"
    write(path, PAIRS)
    expected = list(read_shard(str(path)))
    refs = [SampleRef(0, number) for number in range(len(expected))]
    now = [0.0]
    mend = fault(path, monkeypatch)
    monkeypatch.setattr(tar, "monotonic", lambda: now[0])
    if is_indexed:
        (size,), (skip,) = size_shards([str(path)], use_stated=False)
        assert (size < len(expected), skip.reason) == (True, "unreadable shard")
    source = ShardSource([str(path)])
    assert source.read(refs[-1]).reason == "unreadable shard"
    mend()
    monkeypatch.setattr(tar, "monotonic", lambda: now[0])
    # It is not opened for each of its samples.
    if fault is not has_no_state:
        assert source.read(refs[-1]).reason == "unreadable shard"
    now[0] += 60
    assert list(map(source.read, refs)) == expected
    assert size_shards([str(path)], use_stated=False) == ([len(expected)], [])


def test_a_shard_in_use_whose_server_forgets_it_is_opened_again(tmp_path, monkeypatch):
    path = tmp_path / "0.tar"
    write(path, PAIRS)
    expected = list(read_shard(str(path)))
    source = ShardSource([str(path)])
    assert source.read(SampleRef(0, 0)) == expected[0]
    mend = has_no_state(path, monkeypatch)
    assert source.read(SampleRef(0, 0)).reason == "unreadable shard"
    mend()
    assert source.read(SampleRef(0, 0)) == expected[0]


def test_index_that_is_damaged_or_of_another_version_is_made_anew(large, monkeypatch):
    expected = by_index(large)
    cached = cache_paths(str(large))[0]
    good = cached.read_bytes()
    middle = len(good) // 2
    damaged = [
        b"",
        b"no index",
        good[:-1],
        good[:middle],
        good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        good[middle:],
        b"[" * 100_000,
    ]
    for content in damaged:
        cached.write_bytes(content)
        assert by_index(large) == expected
        assert cached.read_bytes() == good
    monkeypatch.setattr(tar, "_CACHE_VERSION", 0)
    assert by_index(large) == expected
    assert cached.read_bytes() != good


def index_arrays(path):
    with np.load(path) as kept:
        return dict(kept)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kept: kept.update(keys=kept["keys"][:2]),
        lambda kept: kept.update(keys=np.append(kept["keys"], b"x")),
        lambda kept: kept.update(keys=kept["keys"].astype("U")),
        lambda kept: kept.update(ends=kept["ends"] + 99),
        lambda kept: kept.update(ends=kept["ends"][::-1].copy()),
        lambda kept: kept.update(ends=kept["ends"].astype(float)),
        lambda kept: kept.update(members=kept["members"][:, :2]),
        lambda kept: kept["members"].__setitem__((0, 0), 99),
        lambda kept: kept["members"].__setitem__((0, 2), -1),
    ],
)
def test_index_whose_parts_do_not_fit_each_other_is_made_anew(large, spoil):
    expected = by_index(large)
    cached = cache_paths(str(large))[0]
    good, kept = cached.read_bytes(), index_arrays(cached)
    spoil(kept)
    with cached.open("wb") as file:
        np.savez(file, **kept)
    assert by_index(large) == expected
    assert cached.read_bytes() == good


def test_index_that_unpacks_to_more_than_it_has_bytes_is_made_anew(large):
    expected = by_index(large)
    cached = cache_paths(str(large))[0]
    good, kept = cached.read_bytes(), index_arrays(cached)
    with cached.open("wb") as file:
        np.savez_compressed(file, **kept)
    assert by_index(large) == expected
    assert cached.read_bytes() == good


def test_index_that_cannot_be_kept_is_made_all_the_same_and_told(large, monkeypatch, caplog):
    for path in cache_paths(str(large)):
        path.mkdir(parents=True)
    assert by_index(large) == list(read_shard(str(large)))
    assert "cannot be kept in" in caplog.text


def test_a_shard_that_is_named_twice_is_indexed_once(large):
    assert index_shards([str(large)] * 3) == {str(large): (6, None)}


def test_shards_are_indexed_in_several_processes_with_the_same_result(large, monkeypatch, caplog):
    shards = []
    for number in range(6):
        shards.append(str(large.with_name(f"{number}.tar")))
        write(large.with_name(f"{number}.tar"), PAIRS[: 2 * number + 1])
    alone = index_shards(shards)
    for path in large.parent.glob(".*.index"):
        path.unlink()
    monkeypatch.setattr(tar, "_counted", {})
    monkeypatch.setattr(tar, "_SECONDS_ALONE", 0.0)
    monkeypatch.setattr(tar, "_SECONDS_BETWEEN_REPORTS", 0.0)
    caplog.set_level("INFO")
    together = index_shards(shards, start=4)
    assert {shard: together[shard] for shard in shards} == alone
    assert "indexed 6 of 6 shards" in caplog.text


def test_pairs_come_in_order_with_used_members_alone(tmp_path, make_tar):
    path = str(tmp_path / "0.tar")
    members = [
        ("dir/a.mask.png", b"mask"),
        ("dir/a.JPG", b"image a"),
        ("dir/a.txt", b"text a"),
        ("dir/a.json", b"{}"),
        ("b.txt", b"text b"),
        ("b.webp", b"image b"),
        ("c.json", b"{}"),
    ]
    make_tar(tmp_path / "0.tar", members)
    assert list(read_shard(path, repeat=2)) == [
        RawSample(path, "dir/a", b"image a", (b"text a",), 2, ".jpg .mask.png .json .txt"),
        RawSample(path, "b", b"image b", (b"text b",), 2, ".webp .txt"),
        RawSample(path, "c", None, (), 2, ".json"),
    ]


def test_captions_come_without_images(tmp_path, make_tar):
    make_tar(tmp_path / "0.tar", [("a.jpg", b"1"), ("a.txt", b"text"), ("b.png", b"2")])
    samples = list(read_shard(str(tmp_path / "0.tar"), with_images=False))
    assert [(sample.key, sample.image, sample.captions) for sample in samples] == [
        ("a", b"", (b"text",)),
        ("b", b"", ()),
    ]


def test_same_name_twice_in_a_row_is_two_pairs(tmp_path, make_tar):
    make_tar(
        tmp_path / "0.tar", [("a.jpg", b"1"), ("a.txt", b"1"), ("a.jpg", b"2"), ("a.txt", b"2")]
    )
    samples = list(read_shard(str(tmp_path / "0.tar")))
    assert [(sample.image, sample.captions) for sample in samples] == [
        (b"1", (b"1",)),
        (b"2", (b"2",)),
    ]


def test_folders_links_and_metadata_are_no_pairs(tmp_path, make_tar):
    make_tar(tmp_path / "0.tar", [("__meta__/a.txt", b"x"), (".hidden", b"x"), ("README", b"x")])
    assert [skip.reason for skip in read_shard(str(tmp_path / "0.tar"))] == ["empty shard"]


@pytest.mark.parametrize("piped", [False, True])
def test_shard_cut_anywhere_is_noticed_and_keeps_what_came_before(make_shards, piped):
    path = make_shards([3]) / "0.tar"
    data = path.read_bytes()
    shard = f"pipe:cat '{path}'" if piped else str(path)
    whole = list(read_shard(shard))
    # The last pair's own bytes end before the zeros with which a tar file ends.
    for length in range(100, len(data.rstrip(b"\0")), 700):
        path.write_bytes(data[:length])
        *samples, failure = read_shard(shard)
        assert isinstance(failure, Skip)
        assert failure.reason == "unreadable shard"
        found = [(sample.key, sample.captions) for sample in samples if sample.captions]
        assert found == [(sample.key, sample.captions) for sample in whole][: len(found)]


def test_damaged_header_is_not_taken_for_the_end(make_shards):
    path = make_shards([9]) / "0.tar"
    data = bytearray(path.read_bytes())
    start = data.index(b"00004.jpg")
    data[start : start + 512] = b"\xff" * 512
    path.write_bytes(data)
    *samples, failure = read_shard(str(path))
    assert [sample.key for sample in samples] == ["00000", "00001", "00002", "00003"]
    assert failure.reason == "unreadable shard"


@pytest.mark.parametrize("content", [b"", b"not a tar file" * 100])
def test_file_that_is_no_tar_is_one_skip(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    (skip,) = read_shard(str(tmp_path / "0.tar"))
    assert (skip.key, skip.reason) == ("", "unreadable shard")


@pytest.mark.parametrize("shard", ["missing.tar", "nosuch://host/0.tar", "pipe:exit 3"])
def test_shard_that_cannot_be_opened_is_one_skip(shard):
    (skip,) = read_shard(shard)
    assert skip.reason == "unreadable shard"
    assert skip.detail


def test_command_is_read_like_a_file(make_shards):
    path = make_shards([4]) / "0.tar"
    piped = [sample.image for sample in read_shard(f"pipe:cat '{path}'")]
    assert piped == [sample.image for sample in read_shard(str(path))]


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
