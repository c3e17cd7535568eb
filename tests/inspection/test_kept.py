from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from clip_pgs import PatchInputs, create_masking
from clip_pgs.data.world.draw import draw_scene
from clip_pgs.data.world.scene import make_scene
from clip_pgs.inspection import (
    ModelInput,
    View,
    kept,
    measure_kept,
    pair_masks,
    parse_spec,
    read_foreground,
)
from clip_pgs.inspection.__main__ import main
from support.commands import refusal

SMALL = ModelInput(image_size=(64, 64), patch_size=(8, 8))
SIZES = ["--image-size", "64", "--patch-size", "8"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Twelve scenes of the demo world in `images`, their masks in `masks`."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for number in range(12):
        drawing = draw_scene(make_scene(f"kept {number}"))
        Image.fromarray(drawing.pixels).save(folder / "images" / f"{number}.png")
        Image.fromarray(drawing.foreground).save(folder / "masks" / f"{number}.png")
    return folder


def read(world):
    return read_foreground(pair_masks([world / "images"], world / "masks"), SMALL)


def command(world, *flags):
    paths = [str(world / "images"), "--foreground", str(world / "masks")]
    return main(["kept", *paths, *SIZES, *map(str, flags)])


def by_hand(images, name, mask_ratio, seed):
    """Return the mean share of foreground patches kept, image by image and patch by patch."""
    pixels = SMALL.normalize(images.crops)
    generator = torch.Generator().manual_seed(seed)
    selection = create_masking(name, mask_ratio=mask_ratio)(
        PatchInputs(pixels, 8), generator=generator
    )
    shares = []
    for index, foreground in zip(selection.index.tolist(), images.foreground, strict=True):
        inside = [position for position in range(64) if foreground[position]]
        shares.append(sum(position in index for position in inside) / len(inside))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("name", ["random", "pgs"])
def test_mean_and_spread_are_those_of_seeds_measured_by_hand(world, name):
    images = read(world)
    (row,) = measure_kept(images, [parse_spec(name)], [0.5], view=View(SMALL), num_seeds=3)
    expected = [by_hand(images, name, 0.5, seed) for seed in range(3)]
    assert row.kept == pytest.approx(np.mean(expected), abs=1e-6)
    assert row.spread == pytest.approx(np.std(expected, ddof=1), abs=1e-6)
    assert row.measured_ratio == 0.5


def test_the_result_does_not_depend_on_how_many_images_are_looked_at_together(world, monkeypatch):
    specs = [parse_spec("gaussian"), parse_spec("pgs")]
    options = {"view": View(SMALL), "num_seeds": 2}
    whole = measure_kept(read(world), specs, [0.3, 0.5], **options)
    monkeypatch.setattr(kept, "_CHUNK", 5)
    assert measure_kept(read(world), specs, [0.3, 0.5], **options) == whole


@pytest.mark.parametrize("mask_ratio", [0.2, 0.5, 0.75])
def test_cluster_drops_the_asked_share_in_the_mean(world, mask_ratio):
    (row,) = measure_kept(
        read(world), [parse_spec("cluster")], [mask_ratio], view=View(SMALL), num_seeds=5
    )
    assert row.measured_ratio == pytest.approx(mask_ratio, abs=0.02)


def test_pgs_keeps_more_of_the_objects_than_any_other_strategy(world):
    specs = [parse_spec(name) for name in ("random", "gaussian", "cluster", "pgs")]
    rows = measure_kept(read(world), specs, [0.5], view=View(SMALL), num_seeds=3)
    shares = {row.masking: row.kept for row in rows}
    assert max(shares, key=shares.__getitem__) == "pgs"
    assert shares["random"] == pytest.approx(0.5, abs=0.1)


def test_a_patch_is_foreground_above_half_of_its_area(tmp_path):
    mask = np.zeros((16, 32), dtype=np.uint8)
    mask[:8, :5] = 1  # 5 of 8 columns of the first patch
    mask[:8, 8:12] = 1  # exactly half of the second
    Image.fromarray(mask).save(tmp_path / "a.png")
    Image.new("RGB", (32, 16)).save(tmp_path / "a.jpg")
    images = read_foreground(
        [(tmp_path / "a.jpg", tmp_path / "a.png")], ModelInput((16, 32), (8, 8))
    )
    assert images.foreground.tolist() == [[True] + 7 * [False]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_masks_of_any_mode_mean_the_same(tmp_path, mode):
    mask = Image.new("L", (16, 16))
    mask.paste(1 if mode == "P" else 255, (0, 0, 8, 16))
    if mode == "P":
        mask.putpalette([0, 0, 0, 0, 0, 0])
    else:
        mask = mask.convert(mode)
    mask.save(tmp_path / "a.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.jpg")
    images = read_foreground(
        [(tmp_path / "a.jpg", tmp_path / "a.png")], ModelInput((16, 16), (8, 8))
    )
    assert images.foreground.tolist() == [[True, False, True, False]]


def test_images_and_masks_may_share_a_folder(tmp_path):
    for name in ("b", "a"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.jpg")
        Image.new("1", (16, 16), 1).save(tmp_path / f"{name}.png")
    pairs = pair_masks([tmp_path], tmp_path)
    assert [(image.name, mask.name) for image, mask in pairs] == [
        ("a.jpg", "a.png"),
        ("b.jpg", "b.png"),
    ]


def test_the_command_prints_a_table_and_writes_the_same_numbers(world, tmp_path, capsys):
    flags = ["--maskings", "random", "pgs:edges=false", "--mask-ratios", "0.25", "0.5"]
    assert command(world, *flags, "--seeds", 2, "-o", tmp_path / "new" / "kept") == 0
    stdout = capsys.readouterr().out
    folder = tmp_path / "new" / "kept"
    content = json.loads((folder / "kept.json").read_text())
    with (folder / "kept.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert (content["num_images"], content["num_seeds"]) == (12, 2)
    assert [row["masking"] for row in rows] == 2 * ["random"] + 2 * ["pgs:edges=false"]
    for row, result in zip(rows, content["results"], strict=True):
        assert float(row["kept"]) == result["kept"]
        assert f"{result['kept']:.3f} +- {result['spread']:.3f}" in stdout
    with Image.open(folder / "kept.png") as plot:
        assert plot.width > 600


def test_images_without_foreground_are_left_out_and_counted(world, tmp_path, capsys):
    for name, value in (("empty", 0), ("full", 1)):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.jpg")
        Image.new("1", (64, 64), value).save(tmp_path / f"{name}.png")
    flags = [str(tmp_path), "--foreground", str(tmp_path), *SIZES, "--maskings", "random"]
    assert main(["kept", *flags, "--seeds", "1"]) == 0
    stdout = capsys.readouterr().out
    assert "1 image of 64 x 64 pixels in patches of 8 x 8, 1 seed," in stdout
    assert "1 without a foreground patch left out" in stdout
    assert "0.703" in stdout


def test_a_single_seed_has_no_standard_deviation(world, tmp_path, capsys):
    flags = ["--maskings", "random", "--mask-ratios", "0.5"]
    assert command(world, *flags, "--seeds", 1, "-o", tmp_path / "kept") == 0
    stdout = capsys.readouterr().out
    assert " 1 seed," in stdout
    assert "+-" not in stdout
    assert "deviation" not in stdout
    (result,) = json.loads((tmp_path / "kept/kept.json").read_text())["results"]
    assert result["spread"] is None
    with (tmp_path / "kept/kept.csv").open() as file:
        assert [row["spread"] for row in csv.DictReader(file)] == [""]


@pytest.mark.parametrize("turned", ["photo.jpg", "masks/photo.png"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_a_picture_that_is_shown_turned_is_refused(tmp_path, capsys, turned, orientation):
    (tmp_path / "masks").mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for name in ("photo.jpg", "masks/photo.png"):
        given = {"exif": exif} if name == turned else {}
        Image.new("L", (64, 64), 255).save(tmp_path / name, **given)
    assert main(["kept", str(tmp_path / "photo.jpg"), "--foreground", f"{tmp_path}/masks"]) == 2
    said = f"{turned} is shown turned by its EXIF orientation, {orientation}"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_an_orientation_that_turns_nothing_is_no_matter(tmp_path, orientation):
    (tmp_path / "masks").mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("L", (64, 64), 255).save(tmp_path / "photo.jpg", exif=exif)
    Image.new("L", (64, 64), 255).save(tmp_path / "masks/photo.png")
    flags = ["--foreground", f"{tmp_path}/masks", "--maskings", "random", "--seeds", "1"]
    assert main(["kept", str(tmp_path / "photo.jpg"), *flags]) == 0


def test_a_missing_mask_one_of_another_size_and_no_foreground_are_one_sentence(tmp_path, capsys):
    image, mask = tmp_path / "photo.jpg", tmp_path / "masks" / "photo.png"
    Image.new("RGB", (20, 30)).save(image)
    flags = ["kept", str(image), "--foreground", str(mask.parent)]
    sentences = []
    for size in (None, (10, 30), (20, 30)):
        mask.parent.mkdir(exist_ok=True)
        if size is not None:
            Image.new("1", size).save(mask)
        assert main(flags) == 2
        sentences.append(capsys.readouterr().err)
    assert sentences == [
        f"error: the image {image} has no mask {mask}\n",
        f"error: the mask {mask} is 10 x 30 pixels, its image 20 x 30\n",
        "error: none of the 1 masks covers more than half of a patch; "
        "in a mask, any value but 0 is foreground\n",
    ]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--seeds", "0"], "--seeds"),
        (["--seeds", "9" * 30], "--seeds"),
        (["--mask-ratios", "0.5", "1"], "mask_ratio"),
        (["--mask-ratios", "nan"], "mask_ratio"),
        (["--maskings", "pgs", "pxs"], "pxs"),
        (["--maskings", "attentive"], "--model"),
        (["--maskings", "pgs:mask_ratio_min=0.4"], "mask_ratio_min"),
        (["--foreground", "nowhere"], "nowhere"),
        (["-o", __file__], __file__),
    ],
)
def test_bad_options_name_what_is_wrong(world, tmp_path, monkeypatch, capsys, flags, part):
    monkeypatch.chdir(tmp_path)
    argv = ["kept", world / "images", "--foreground", world / "masks", *SIZES, *flags]
    assert part in refusal(main, argv, capsys)


def test_two_images_with_one_mask_are_refused(world, capsys):
    image = world / "images" / "0.png"
    copy = world / "copies" / "0.jpg"
    copy.parent.mkdir()
    Image.open(image).save(copy)
    for images in ([image, copy], [image, image], [copy, copy.parent]):
        argv = ["kept", *map(str, images), "--foreground", str(world / "masks"), *SIZES]
        assert main(argv) == 2
        assert str(world / "masks" / "0.png") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "output"),
    [("images", "images"), ("images", "masks"), ("images", "images/../masks"), ("kept.png", ".")],
)
def test_an_output_among_images_or_masks_is_refused_and_writes_nothing(
    world, tmp_path, monkeypatch, capsys, images, output
):
    folder = shutil.copytree(world, tmp_path / "world")
    for name in ("kept.png", "masks/kept.png"):
        shutil.copy(folder / "masks/0.png", folder / name)
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    sentence = refusal(
        main, ["kept", images, "--foreground", "masks", *SIZES, "-o", output], capsys
    )
    assert f"the output {output} " in sentence
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


@pytest.mark.parametrize("name", ["kept.json", "kept.csv", "kept.png"])
def test_a_result_that_cannot_be_written_is_said_before_the_work(
    world, tmp_path, monkeypatch, capsys, name
):
    (tmp_path / name).mkdir()
    monkeypatch.setattr("clip_pgs.inspection.kept.measure_kept", None)
    assert command(world, "-o", tmp_path) == 2
    assert str(tmp_path / name) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_damaged_image_leaves_no_folder(world, tmp_path, capsys):
    (tmp_path / "0.jpg").write_bytes(b"no image")
    argv = [str(tmp_path / "0.jpg"), "--foreground", str(world / "masks"), *SIZES]
    assert main(["kept", *argv, "-o", str(tmp_path / "new")]) == 2
    assert str(tmp_path / "0.jpg") in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
