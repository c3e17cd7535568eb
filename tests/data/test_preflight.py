from __future__ import annotations

import io
import json
import os
import time
import warnings
from pathlib import Path

import pandas
import pytest
from PIL import Image, PngImagePlugin

from clip_pgs.data import decoding
from clip_pgs.data.pack import check_shards, pack_pairs
from clip_pgs.data.preflight import preflight
from support.streams import with_options


@pytest.fixture
def args(make_shards, make_args):
    folder = make_shards([10, 10, 10])
    return make_args(train_data=f"{folder}/{{0..2}}.tar")


def shard(args, number=1):
    return Path(args.train_data.replace("{0..2}", str(number)))


def test_good_data_has_nothing_to_say(args):
    assert preflight(with_options(args, val_data=args.train_data)) == []


def test_synthetic_data_has_nothing_to_say(make_args):
    assert preflight(make_args(dataset_type="synthetic", train_num_samples=9)) == []


@pytest.mark.parametrize("flag", ["train_data", "val_data"])
def test_missing_member_is_named_where_no_sample_is_usable(
    args, make_tar, make_image, tmp_path, flag
):
    for number in range(2):
        make_tar(tmp_path / f"{number}.tar", [(f"{n}.jpg", make_image(n)) for n in range(4)])
    with_options(args, **{flag: f"{tmp_path}/{{0..1}}.tar"})
    name = flag.replace("_", "-")
    message = f"--{name}: no usable sample in the 2 places .*no caption: 6.*no .txt member"
    with pytest.raises(ValueError, match=message):
        preflight(args)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: path.write_bytes(b"no tar" * 500), "unreadable shard: 1; the first is {}"),
        (lambda path: path.write_bytes(b""), "unreadable shard: 1; the first is {}"),
        (lambda path: os.truncate(path, 100), "unreadable shard: 1; the first is {}"),
    ],
)
def test_one_bad_shard_is_told_and_does_not_stop(args, damage, sentence):
    damage(shard(args))
    warnings = preflight(args)
    assert sentence.format(shard(args)) in warnings[0]


def test_every_shard_is_opened_though_few_are_decoded(tmp_path, make_tar, make_image, make_args):
    for number in range(150):
        make_tar(tmp_path / f"{number:03d}.tar", [("a.jpg", make_image(0)), ("a.txt", b"1")])
    (tmp_path / "149.tar").write_bytes(b"")
    (tmp_path / "sizes.json").write_text(json.dumps({f"{n:03d}.tar": 1 for n in range(150)}))
    (warning,) = preflight(make_args(train_data=f"{tmp_path}/*.tar"))
    assert f"empty shard: 1; the first is {tmp_path}/149.tar" in warning


def test_a_table_among_the_shards_is_told_how_to_be_written(tmp_path, make_args):
    table = tmp_path / "pairs.csv"
    table.write_text("filepath,title\na.jpg,one\n")
    with pytest.raises(ValueError, match="--dataset-type csv"):
        preflight(make_args(train_data=str(table), dataset_type="webdataset"))


def test_missing_shard_stops_by_its_name(args):
    shard(args).unlink()
    with pytest.raises(ValueError, match=r"--train-data: .*1\.tar', which does not exist"):
        preflight(args)


def test_pipe_in_the_place_of_a_shard_stops_and_does_not_hang(args):
    shard(args).unlink()
    os.mkfifo(shard(args))
    with pytest.raises(ValueError, match=r"1\.tar', which is no regular file"):
        preflight(args)


def test_sizes_that_are_wrong_are_told(args):
    (shard(args).parent / "sizes.json").write_text('{"0.tar": 10, "1.tar": 12, "2.tar": 10}')
    (warning,) = preflight(args)
    assert "sizes.json says that 1.tar has 12 samples, but it has 10" in warning


@pytest.mark.parametrize(
    ("wanted", "part"),
    [(20, "10 are left out of each epoch"), (75, "each epoch draws 45 more")],
)
def test_number_of_samples_is_compared(args, wanted, part):
    (warning,) = preflight(with_options(args, train_num_samples=wanted))
    assert warning == f"--train-num-samples {wanted} is not what --train-data holds, 30: {part}"


@pytest.mark.parametrize("damage", [b" \n", b"\xff", None])
def test_the_number_that_check_prints_is_the_one_that_training_wants(
    tmp_path, make_tar, make_image, make_args, damage
):
    members = [("0.jpg", make_image(0)), ("0.txt", b"good"), ("1.jpg", make_image(1))]
    members += [] if damage is None else [("1.txt", damage)]
    make_tar(tmp_path / "0.tar", [*members, ("2.json", b"{}"), ("3.jpg", b"?"), ("3.txt", b"c")])
    text = io.StringIO()
    check_shards([str(tmp_path / "0.tar")], text.write)
    flag, number = text.getvalue().split()[-2:]
    assert flag == "--train-num-samples"
    args = make_args(train_data=f"{tmp_path}/0.tar", train_num_samples=int(number))
    assert preflight(args) == []


def test_commands_are_tried(args):
    with_options(args, train_data=f"pipe:cat {args.train_data}", train_num_samples=30)
    assert preflight(args) == []
    with_options(args, train_data="pipe:cat nothing.tar")
    with pytest.raises(ValueError, match="unreadable shard: 1"):
        preflight(args)


def test_table_whose_images_are_missing_stops_by_name(tmp_path, make_args, make_image):
    rows = [f"{tmp_path}/{number}.jpg\ttext" for number in range(100)]
    (tmp_path / "pairs.csv").write_text("\n".join(["filepath\ttitle", *rows]))
    args = make_args(train_data=f"{tmp_path}/pairs.csv")
    with pytest.raises(ValueError, match=r"64 places .*0\.jpg"):
        preflight(args)
    (tmp_path / "0.jpg").write_bytes(make_image(0))
    (warning,) = preflight(args)
    assert "unreadable image file: 63" in warning


@pytest.mark.parametrize("num_rows", [1, 5])
def test_held_out_images_that_stand_in_several_rows_are_told(
    tmp_path, make_args, make_image, num_rows
):
    paths = [tmp_path / f"{number}.jpg" for number in range(4)]
    for number, path in enumerate(paths):
        path.write_bytes(make_image(number))
    rows = [f"{path}\tcaption {row}\n" for path in paths for row in range(num_rows)]
    (tmp_path / "pairs.tsv").write_text("filepath\ttitle\n" + "".join(rows))
    assert preflight(make_args(train_data=f"{tmp_path}/pairs.tsv")) == []
    args = make_args(val_data=f"{tmp_path}/pairs.tsv")
    told = preflight(args)
    assert len(told) == (num_rows > 1)
    assert all("4 images in 20 rows" in text and "R@k" in text for text in told)
    assert preflight(with_options(args, mae={})) == []


@pytest.mark.parametrize(
    ("caption", "is_list"),
    [
        ("['a dog', 'two']", True),
        ('["a dog", "it\'s"]', True),
        ("['a dog'\n 'two']", True),
        ("[a dog]", False),
        ("'a dog'", False),
        ("[1] 'a dog'", False),
    ],
)
def test_captions_that_are_lists_are_told_by_their_row(
    tmp_path, make_args, make_image, caplog, caption, is_list
):
    (tmp_path / "0.jpg").write_bytes(make_image(0))
    rows = [{"filepath": f"{tmp_path}/0.jpg", "title": text} for text in ("one", caption, caption)]
    pandas.DataFrame(rows).to_csv(tmp_path / "pairs.csv", index=False)
    args = make_args(train_data=f"{tmp_path}/pairs.csv", csv_separator=",")
    warnings = [text for text in preflight(args) if "look like lists" in text]
    pack_pairs(tmp_path / "pairs.csv", tmp_path / "out")
    for told in (warnings, [text for text in caplog.messages if "look like lists" in text]):
        assert len(told) == is_list
        assert all("2 captions" in text and "row 2" in text for text in told)
    assert preflight(with_options(args, mae={})) == []


@pytest.fixture(params=["shards", "table"])
def many(request, tmp_path, make_tar, make_image, make_args):
    """Options for eighty places, with the images that a function makes of their numbers."""

    def write(image_of):
        rows = ["filepath\ttitle"]
        for number in range(80):
            image = tmp_path / f"{number:02d}.jpg"
            image.write_bytes(image_of(number))
            make_tar(image.with_suffix(".tar"), [("0.jpg", image.read_bytes()), ("0.txt", b"1")])
            rows.append(f"{image}\t1")
        (tmp_path / "pairs.csv").write_text("\n".join(rows))
        names = {"shards": "*.tar", "table": "pairs.csv"}
        return make_args(train_data=f"{tmp_path}/{names[request.param]}")

    return write


def test_the_checks_leave_what_python_warns_of_as_it_was(many, make_image, monkeypatch):
    args = many(make_image)
    image_open = Image.open

    def open_slowly(*arguments, **options):
        # Blocks of several threads overlap.
        time.sleep(0.002)
        return image_open(*arguments, **options)

    monkeypatch.setattr(Image, "open", open_slowly)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        before = list(warnings.filters)
        assert preflight(args) == []
        assert list(warnings.filters) == before


def test_the_checks_stop_a_decoder_that_gets_lost(many, make_image, monkeypatch):
    def image_of(number):
        return make_image(number, image_format="PNG" if number == 5 else "JPEG")

    args = many(image_of)
    load = PngImagePlugin.PngImageFile.load

    def load_for_long(image):
        end = time.process_time() + 3
        while time.process_time() < end:
            pass
        return load(image)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load_for_long)
    monkeypatch.setattr(decoding, "MAX_DECODING_SECONDS", 0.2)
    (warning,) = preflight(args)
    assert "unreadable image: 1" in warning
    assert "more than 0.2 seconds of processor time" in warning
