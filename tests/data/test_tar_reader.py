from __future__ import annotations

import pytest

from clip_pgs.data.samples import RawSample
from clip_pgs.data.skips import Skip
from clip_pgs.data.tar import read_shard


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
        RawSample(path, "dir/a", b"image a", (b"text a",), 2, ".jpg .json .mask.png .txt"),
        RawSample(path, "b", b"image b", (b"text b",), 2, ".txt .webp"),
        RawSample(path, "c", None, (), 2, ".json"),
    ]


def test_captions_come_without_images(tmp_path, make_tar):
    make_tar(tmp_path / "0.tar", [("a.jpg", b"1"), ("a.txt", b"text"), ("b.png", b"2")])
    samples = list(read_shard(str(tmp_path / "0.tar"), with_images=False))
    assert [(sample.key, sample.image, sample.captions) for sample in samples] == [
        ("a", None, (b"text",)),
        ("b", None, ()),
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
