from __future__ import annotations

import io
import json
import logging
import pickle
from statistics import median

import pytest
from braceexpand import braceexpand

from clip_pgs.data import pack
from clip_pgs.data.build import read_table
from clip_pgs.data.caption_tables import TableSource, read_pairs
from clip_pgs.data.order import SampleRef
from clip_pgs.data.pack import check_shards, pack_pairs, shard_names
from clip_pgs.data.preflight import preflight
from clip_pgs.data.samples import MAX_CAPTION_BYTES
from clip_pgs.data.shards import MAX_SHARDS, count_samples, expand_shards, shard_pattern
from clip_pgs.data.tar import read_shard


@pytest.fixture
def table(tmp_path, make_image):
    """Five good pairs, images in a folder beside the table."""
    (tmp_path / "images").mkdir()
    rows = ["filepath,title"]
    for number, image_format in enumerate(["JPEG", "PNG", "WEBP", "JPEG", "JPEG"]):
        (tmp_path / "images" / str(number)).write_bytes(
            make_image(number, image_format=image_format)
        )
        rows.append(f"images/{number},caption {number}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "pairs.csv"


def append(table, row):
    table.write_text(table.read_text() + row + "\n")


def test_shards_hold_the_bytes_and_captions_of_the_table(table, tmp_path):
    out = tmp_path / "out"
    sizes, _ = pack_pairs(table, out, shard_size=2)
    shards = expand_shards(f"{out}/{{00000..00002}}.tar")
    samples = [sample for shard in shards for sample in read_shard(shard)]
    stored = [(tmp_path / "images" / str(number)).read_bytes() for number in range(5)]
    assert [sample.image for sample in samples] == stored
    assert [sample.captions[0].decode() for sample in samples] == [f"caption {n}" for n in range(5)]
    assert sizes == {"00000.tar": 2, "00001.tar": 2, "00002.tar": 1}
    assert json.loads((out / "sizes.json").read_text()) == sizes
    assert count_samples(shards) == 5


def test_a_shard_may_be_as_large_as_one_says(table, tmp_path):
    # As no floating-point number is.
    sizes, _ = pack_pairs(table, tmp_path / "out", shard_size=10**400)
    assert sizes == {"00000.tar": 5}


def test_same_table_gives_the_same_bytes(table, tmp_path):
    for name in ("one", "two"):
        pack_pairs(table, tmp_path / name)
    assert (tmp_path / "one/00000.tar").read_bytes() == (tmp_path / "two/00000.tar").read_bytes()


def test_keys_and_separator_can_be_chosen(table, tmp_path):
    text = table.read_text().replace(",", ";").replace("filepath;title", "image;text")
    table.write_text(text)
    options = {"image_key": "image", "caption_key": "text", "separator": ";"}
    assert pack_pairs(table, tmp_path / "out", **options)[0] == {"00000.tar": 5}


@pytest.mark.parametrize("scheme", ["file://", "FILE://"])
def test_a_file_url_is_the_file(table, tmp_path, scheme):
    (tmp_path / "images/a b.jpg").write_bytes((tmp_path / "images/3").read_bytes())
    append(table, f"{scheme}{tmp_path}/images/a%20b.jpg,one")
    append(table, f"{scheme}{tmp_path}/images/4,two")
    assert pack_pairs(table, tmp_path / "out")[0] == {"00000.tar": 7}
    pairs = read_pairs(table, image_key="filepath", caption_key="title", separator=",")
    assert TableSource(pairs).read(SampleRef(0, 5)).image == (tmp_path / "images/3").read_bytes()


def test_bad_rows_stop_before_anything_is_written(table, tmp_path, caplog):
    append(table, "images/9,missing")
    append(table, "images/1, ")
    append(table, "pairs.csv,no image")
    with pytest.raises(ValueError, match=r"3 of 8 rows are bad, the first is row 6: .*'images/9'"):
        pack_pairs(table, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"images", "pairs.csv"}
    assert "row 6: image 'images/9' does not exist" in caplog.text
    assert "row 7: the caption of image 'images/1' is empty" in caplog.text
    assert "row 8: 'pairs.csv' is no readable image" in caplog.text


def test_caption_that_training_would_skip_is_bad(table, tmp_path, caplog):
    append(table, f"images/1,{'x' * MAX_CAPTION_BYTES}y")
    sizes, num_skipped = pack_pairs(table, tmp_path / "out", skip_bad=True)
    assert (num_skipped, sum(sizes.values())) == (1, 5)
    assert "row 6: the caption of image 'images/1' has 4194305 bytes, more than" in caplog.text


def test_bad_rows_can_be_left_out(table, tmp_path, caplog):
    append(table, "images/9,missing")
    with caplog.at_level(logging.WARNING):
        sizes, num_skipped = pack_pairs(table, tmp_path / "out", skip_bad=True)
    assert (num_skipped, sum(sizes.values())) == (1, 5)
    assert "row 6" in caplog.text


def test_cleared_rows_are_no_rows_to_pack_check_and_train(table, tmp_path, make_args, monkeypatch):
    append(table, ",\n,\n ,")
    assert pack_pairs(table, tmp_path / "out") == ({"00000.tar": 5}, 0)
    monkeypatch.chdir(tmp_path)
    args = make_args(train_data="pairs.csv", csv_separator=",")
    assert preflight(args) == []
    assert len(read_table(args, "pairs.csv")) == 5
    append(table, ",a caption")
    with pytest.raises(ValueError, match=r"1 of 6 rows are bad, .* row 9: it names no image;"):
        pack_pairs(table, tmp_path / "other")
    (warning,) = preflight(args)
    assert "no image: 1; the first is pairs.csv: row 9: no image" in warning


def test_format_that_openclip_does_not_read_is_bad(table, tmp_path, make_image):
    (tmp_path / "images/5.jpg").write_bytes(make_image(5, image_format="GIF"))
    append(table, "images/5.jpg,a picture")
    with pytest.raises(ValueError, match="is GIF, not JPEG, PNG or WebP"):
        pack_pairs(table, tmp_path / "out")


def test_folder_with_something_in_it_is_not_overwritten(table, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/note.txt").write_text("mine")
    with pytest.raises(ValueError, match="out' exists and is no empty folder"):
        pack_pairs(table, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["note.txt"]


def test_empty_folder_is_filled(table, tmp_path):
    (tmp_path / "out").mkdir()
    pack_pairs(table, tmp_path / "out")
    assert (tmp_path / "out/00000.tar").is_file()


def test_nothing_is_left_of_a_pack_that_fails(table, tmp_path, monkeypatch):
    monkeypatch.setattr("json.dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        pack_pairs(table, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"images", "pairs.csv"}


def test_shard_size_must_be_positive(table, tmp_path):
    with pytest.raises(ValueError, match="--shard-size must be >= 1, got 0"):
        pack_pairs(table, tmp_path / "out", shard_size=0)


@pytest.mark.parametrize("number", [1, 2, 100_000, 100_001, MAX_SHARDS])
def test_the_pattern_of_any_number_of_shards_names_all_of_them(tmp_path, number):
    names = shard_names(number)
    assert len(names) == number
    assert names[0].startswith("00000")
    assert [*braceexpand(shard_pattern(tmp_path, names))] == [f"{tmp_path}/{n}" for n in names]


def test_more_shards_than_a_pattern_names_are_refused_before_any_is_written(
    table, tmp_path, monkeypatch
):
    monkeypatch.setattr(pack, "MAX_SHARDS", 2)
    with pytest.raises(ValueError, match="3 shards are more than 2; raise --shard-size"):
        pack_pairs(table, tmp_path / "out", shard_size=2)
    assert not (tmp_path / "out").exists()


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
    assert (total.widths.total(), total.num_captions) == (2, 3)
    for line in (
        "b: unreadable image",
        "c: no caption",
        "d: no image",
        "e: unreadable image",
        "e: caption is not UTF-8",
    ):
        assert f"bad: {tmp_path}/0.tar: {line}" in text
    assert text.endswith("--train-num-samples 5\n")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a.b.jpg", "a.b.txt", "a.jpg", "a.txt"], "a: .b.jpg, .jpg"),
        (["a.jpg", "a.seg.png", *(f"a.{n}.txt" for n in range(60))], "a: .jpg, .seg.png"),
        (["a.jpg", "a.png", "a.txt"], "a: .jpg, .png"),
        (["a.jpg", "a.0.txt", "a.1.txt", "a.json", "a.txt.jpg.bak"], None),
        (["a.jpg", "a.txt", "b.jpg", "b.txt"], None),
    ],
)
def test_images_that_a_longer_name_makes_part_of_another_sample_are_told(
    tmp_path, make_tar, make_image, names, told
):
    make_tar(
        tmp_path / "0.tar",
        [(name, b"text" if name.endswith("txt") else make_image(0)) for name in names],
    )
    total, text = run_check([tmp_path / "0.tar"])
    assert not total.bad
    lines = [line for line in text.splitlines() if line.startswith("warning: ")]
    assert len(lines) == (told is not None)
    assert told is None or lines[0].endswith(f"the first is {tmp_path}/0.tar: {told}")
    assert told is None or lines[0].startswith("warning: 1 sample with images that are not read")


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


def test_a_shard_that_sizes_leave_out_is_not_bad(make_shards):
    # Training counts it.
    folder = make_shards([2, 3])
    (folder / "sizes.json").write_text('{"0.tar": 2}')
    total, text = run_check([folder / "0.tar", folder / "1.tar"])
    assert not total.bad
    assert "None" not in text


def test_a_report_takes_no_more_memory_for_more_samples(tmp_path, make_tar, make_image):
    members = [("a.jpg", make_image(0)), ("a.txt", b"text"), ("b.jpg", b"?"), ("b.png", b"?")]
    make_tar(tmp_path / "0.tar", members * 30)
    sizes = []
    for number in (5, 10):
        total, text = run_check([tmp_path / "0.tar"] * number)
        # Of every second sample image and caption are bad.
        assert total.num_samples == 60 * number
        assert f"bad: {60 * number - 100} more\n" in text
        assert f"warning: {30 * number} samples with images that are not read" in text
        sizes.append(len(pickle.dumps(total)))
    assert sizes[1] - sizes[0] < 100


@pytest.mark.parametrize("lengths", [[3], [1, 4], [1, 2, 2], [5, 1, 1, 9], [2, 2, 3, 3]])
def test_the_median_length_is_that_of_the_captions(tmp_path, make_tar, make_image, lengths):
    members = []
    for number, length in enumerate(lengths):
        members += [(f"{number}.jpg", make_image(number)), (f"{number}.txt", b"x" * length)]
    make_tar(tmp_path / "0.tar", members)
    _, text = run_check([tmp_path / "0.tar"])
    assert f"(median {median(lengths):.0f})" in text
