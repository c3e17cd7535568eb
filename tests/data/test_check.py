from __future__ import annotations

import io

from clip_pgs.data.pack import check_shards


def run_check(shards):
    text = io.StringIO()
    return check_shards([str(shard) for shard in shards], text.write), text.getvalue()


def test_good_shards_are_counted_per_shard_and_in_total(make_shards):
    folder = make_shards([12, 3])
    total, text = run_check([folder / "0.tar", folder / "1.tar"])
    rows = [line.split() for line in text.splitlines()]
    assert rows[1][:6] == [str(folder / "0.tar"), "12", "12", "12", "12", "0"]
    assert rows[2][1] == "3"
    assert rows[3][:6] == ["total", "15", "15", "15", "15", "0"]
    assert "1..2 (median 1)" in text
    assert "24..24 x 20..20" in text
    assert text.endswith("--train-num-samples 15\n")
    assert not total.bad


def test_bad_samples_are_named_with_their_reason(tmp_path, make_tar, make_image):
    members = [
        ("a.jpg", make_image(0)),
        ("a.txt", b"good"),
        ("b.jpg", make_image(1)[:400]),
        ("b.txt", b"cut short"),
        ("c.jpg", make_image(2)),
        ("d.txt", b"alone"),
        ("e.jpg", b"?"),
        ("e.txt", b"\xff"),
    ]
    make_tar(tmp_path / "0.tar", members)
    total, text = run_check([tmp_path / "0.tar"])
    assert (total.num_samples, total.num_usable) == (5, 1)
    assert (total.num_images, total.num_captions) == (2, 3)
    for line in (
        "b: unreadable image",
        "c: no caption",
        "d: no image",
        "e: unreadable image",
        "e: caption is not UTF-8",
    ):
        assert f"bad: {tmp_path}/0.tar: {line}" in text
    assert text.endswith("--train-num-samples 1\n")


def test_damaged_shard_and_wrong_sizes_are_bad(make_shards):
    folder = make_shards([12])
    path = folder / "0.tar"
    path.write_bytes(path.read_bytes()[:10000])
    total, text = run_check([path])
    assert [skip.reason for skip in total.bad if not skip.key] == [
        "unreadable shard",
        "sizes.json is wrong",
    ]
    assert "it says 12, the shard has" in text
