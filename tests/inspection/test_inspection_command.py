from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_pgs.inspection.__main__ import main
from support.commands import refusal

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 70\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "a photo.png"
    Image.linear_gradient("L").save(path)
    return path


def png_header(width, height):
    """Return a PNG file of white pixels that are not all there."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


@pytest.mark.slow
def test_masks_writes_a_picture_and_says_where(photo, tmp_path):
    output = tmp_path / "new folder" / "masks.png"
    command = [sys.executable, "-m", "clip_pgs.inspection", "masks", str(photo), "-o", str(output)]
    command += ["--masking", "random", "pgs", "--mask-ratio", "0.5", "--mask-ratio-min", "0.3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(output)
    with Image.open(output) as figure:
        assert figure.width > 3 * 224


def test_sizes_given_as_flags_win_over_those_of_the_model(photo, tmp_path):
    output = tmp_path / "masks.png"
    flags = ["--model", "ViT-B-32", "--image-size", "300", "--patch-size", "30"]
    assert main(["masks", str(photo), "-o", str(output), "--masking", "random", *flags]) == 0
    with Image.open(output) as figure:
        assert figure.width > 2 * 300


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--masking", "pgx"], "pgx"),
        (["--masking", "pgs:edges"], "pgs:KEY=VALUE"),
        (["--masking", "pgs:edges=abc"], "edges"),
        (["--masking", "pgs:unknown=1"], "unknown"),
        (["--masking", "pgs:temperature=nan"], "temperature"),
        (["--masking", "cluster:mask_ratio=a"], "mask_ratio"),
        (["--masking", "no.such.module:Class"], "no.such.module:Class"),
        (["--masking", "pgs", "pgs"], "twice"),
        (["--masking", "random", "--stages"], "stages"),
        (["--progress", "2"], "--progress"),
        (["--progress", "nan"], "--progress"),
        (["--mask-ratio", "1.0"], "mask_ratio"),
        (["--mask-ratio", "nan"], "mask_ratio"),
        (["--mask-ratio-min", "inf"], "mask_ratio_min"),
        (["--mask-ratio", "0.3", "--mask-ratio-min", "0.4"], "mask_ratio_min"),
        (["--patch-size", "17"], "patch_size"),
        (["--patch-size", "9" * 30], "patch_size"),
        (["--image-size", "0"], "image_size"),
        (["--image-size", "-16"], "image_size"),
        (["--image-size", "1600000"], "image_size"),
        (["--seed", "9" * 30], "--seed"),
        (["--seed", "-" + "9" * 30], "--seed"),
        (["-o", "masks.xyz"], "masks.xyz"),
        (["-o", "."], "got .\n"),
    ],
)
def test_bad_input_names_what_is_wrong(photo, tmp_path, monkeypatch, capsys, flags, part):
    monkeypatch.chdir(tmp_path)
    argv = ["masks", photo, "-o", "out.png", "--masking", "pgs", *flags]
    assert part in refusal(main, argv, capsys)


def test_a_wrong_option_names_those_of_the_strategy(photo, tmp_path, capsys):
    code = main(["masks", str(photo), "-o", str(tmp_path / "a.png"), "--masking", "pgs:edge=1"])
    assert code == 2
    sentence = capsys.readouterr().err
    assert "masking 'pgs' has no option 'edge'; it takes mask_ratio, mask_ratio_min" in sentence
    assert "edge_weight" in sentence


def test_a_folder_stands_for_the_images_in_it(photo, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("b.png", "a.jpg"):
        with Image.open(photo) as image:
            image.save(folder / name)
    (folder / "notes.txt").write_text("no image")
    # As macOS writes it beside a file on another disk.
    (folder / "._a.jpg").write_bytes(b"\0\5\26\7")
    heights = []
    for images in ([photo], [folder]):
        output = tmp_path / "masks.png"
        assert main(["masks", *map(str, images), "-o", str(output), "--masking", "random"]) == 0
        with Image.open(output) as figure:
            heights.append(figure.height)
    assert heights[1] - heights[0] > 224


def test_an_empty_folder_is_named(tmp_path, capsys):
    assert main(["masks", str(tmp_path), "-o", str(tmp_path / "below" / "out.png")]) == 2
    assert capsys.readouterr().err == f"error: there is no image in the folder {tmp_path}\n"


@pytest.mark.parametrize("masking", ["attentive", "pgs"])
def test_what_needs_a_model_says_so_without_one(photo, tmp_path, capsys, masking):
    flags = ["--masking", masking, "--progress", "0.5", "-o", str(tmp_path / "out.png")]
    assert main(["masks", str(photo), *flags]) == 2
    sentence = capsys.readouterr().err
    assert "give a trained model, as --model RUN does" in sentence
    assert sentence.count("\n") == 1


def test_a_config_without_weights_cannot_give_embeddings(photo, tmp_path, capsys):
    flags = ["--progress", "1", "--model", "ViT-B-32", "-o", str(tmp_path / "out.png")]
    assert main(["masks", str(photo), *flags]) == 2
    assert capsys.readouterr().err.startswith("error: ViT-B-32 has no weights; ")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "F"])
def test_photos_of_odd_modes_are_drawn(tmp_path, mode):
    path = tmp_path / ("photo.png" if mode in ("1", "LA", "P", "RGBA") else "photo.tif")
    Image.linear_gradient("L").resize((90, 40)).convert(mode).save(path)
    flags = ["--masking", "random", "cluster", "pgs", "--stages"]
    assert main(["masks", str(path), "-o", str(tmp_path / "out.png"), *flags]) == 0


def test_16_bit_grey_is_drawn_as_training_sees_it(tmp_path):
    deep = np.linspace(0, 2**16 - 1, 64, dtype=np.uint16).reshape(8, 8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray((deep >> 8).astype(np.uint8)).save(tmp_path / "flat.png")
    pictures = []
    for name in ("deep", "flat"):
        output = tmp_path / f"{name}-masks.bmp"
        # One name below the picture, so that nothing else differs.
        (tmp_path / f"{name}.png").rename(tmp_path / "photo.png")
        flags = ["--image-size", "64", "--patch-size", "8", "-o", str(output)]
        assert main(["masks", str(tmp_path / "photo.png"), *flags]) == 0
        pictures.append(output.read_bytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize(
    "content", [EPS, b"%PDF-1.4\n", b"\xd7\xcd\xc6\x9a" + bytes(100)], ids=["eps", "pdf", "wmf"]
)
def test_a_disguised_file_starts_no_program(photo, tmp_path, monkeypatch, capsys, ending, content):
    (tmp_path / "bin").mkdir()
    for program in ("gs", "gswin64c"):
        (tmp_path / "bin" / program).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n")
        (tmp_path / "bin" / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    disguised, masks = Path(f"evil.{ending}"), Path("masks")
    disguised.write_bytes(content)
    masks.mkdir()
    (masks / photo.with_suffix(".png").name).write_bytes(content)
    assert str(disguised) in refusal(main, ["masks", disguised, "-o", "out.png"], capsys)
    assert str(masks) in refusal(main, ["kept", photo, "--foreground", masks], capsys)
    assert not Path("started").exists()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.tif", "a.bmp"])
def test_an_image_that_is_cut_short_is_named(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(name)
    Path(name).write_bytes(Path(name).read_bytes()[:700])
    assert name in refusal(main, ["masks", name, "-o", "out.png"], capsys)


@pytest.mark.parametrize("sides", [(30_000, 30_000), (9_000, 12_000), (2**31 - 1, 2**31 - 1)])
def test_an_image_that_declares_more_than_it_holds_is_named(tmp_path, monkeypatch, capsys, sides):
    monkeypatch.chdir(tmp_path)
    Path("large.png").write_bytes(png_header(*sides))
    assert "large.png" in refusal(main, ["masks", "large.png", "-o", "out.png"], capsys)


def test_a_photo_is_drawn_as_it_lies_in_the_file(tmp_path):
    """Training does not turn photographs by their EXIF orientation either."""
    exif = Image.Exif()
    exif[0x0112] = 6
    drawn = []
    for options in ({}, {"exif": exif}):
        Image.linear_gradient("L").convert("RGB").save(tmp_path / "photo.jpg", **options)
        assert main(["masks", str(tmp_path / "photo.jpg"), "-o", str(tmp_path / "o.png")]) == 0
        drawn.append((tmp_path / "o.png").read_bytes())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    "output", ["folder.png", "file/out.png", "out.psd", "out.h5", "out", "photo.png", "a\0.png"]
)
def test_an_output_that_cannot_be_is_refused_before_the_work(tmp_path, monkeypatch, capsys, output):
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    Path("file").touch()
    Image.linear_gradient("L").save("photo.png")
    content = Path("photo.png").read_bytes()
    monkeypatch.setattr("clip_pgs.inspection.masks.draw_masks", None)
    refusal(main, ["masks", "photo.png", "-o", output], capsys)
    assert Path("photo.png").read_bytes() == content


def test_a_figure_does_not_become_one_of_the_images(photo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    photo.rename("folder/photo.jpg")
    Path("link").symlink_to("folder")
    for images, place in [("folder", "folder"), ("link", "folder"), ("folder", "link")]:
        output = f"{place}/a.png"
        assert f"the output {output}" in refusal(main, ["masks", images, "-o", output], capsys)
    for output in ("folder/a.pdf", "folder/below/a.png"):
        assert main(["masks", "folder", "-o", output]) == 0
    assert main(["masks", "folder/photo.jpg", "-o", "folder/a.png"]) == 0


def test_a_picture_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").save("photo.png")
    Path("out.png").write_bytes(b"the old one")

    def fill_the_disk(image, file, *arguments):
        file.write(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    assert main(["masks", "photo.png", "-o", "out.png"]) == 1
    assert capsys.readouterr().err == "error: out.png: No space left on device\n"
    assert Path("out.png").read_bytes() == b"the old one"


def test_a_figure_that_nothing_could_open_is_refused(photo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("many").mkdir()
    for number in range(1200):
        Path(f"many/{number}.png").symlink_to(photo)
    refusal(main, ["masks", "many", "-o", "out.png"], capsys)
    flags = ["--image-size", "16384", "--patch-size", "16384"]
    refusal(main, ["masks", photo, "-o", "out.png", *flags], capsys)


@pytest.mark.parametrize(
    ("ending", "num_images", "num_maskings"),
    [("jpg", 250, 1), ("JPEG", 250, 1), ("pdf", 250, 1), ("gif", 250, 1), ("webp", 1, 70)],
)
def test_a_figure_that_its_format_cannot_hold_is_refused_before_it_is_drawn(
    photo, tmp_path, monkeypatch, capsys, ending, num_images, num_maskings
):
    monkeypatch.chdir(tmp_path)
    Path("many").mkdir()
    for number in range(num_images):
        Path(f"many/{number}.png").symlink_to(photo)
    monkeypatch.setattr("clip_pgs.inspection.masks.read_image", None)
    maskings = [f"random:mask_ratio=0.{number + 10}1" for number in range(num_maskings)]
    argv = ["masks", "many", "--maskings", *maskings, "-o", f"out.{ending}"]
    assert "name a .png" in refusal(main, argv, capsys)


def test_a_missing_image_and_a_file_that_is_none_are_named(tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    assert main(["masks", str(tmp_path / "gone.png"), "-o", str(tmp_path / "out.png")]) == 2
    assert main(["masks", str(tmp_path / "text.png"), "-o", str(tmp_path / "out.png")]) == 2
    os.mkfifo(tmp_path / "pipe.png")
    assert main(["masks", str(tmp_path / "pipe.png"), "-o", str(tmp_path / "out.png")]) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert third == f"error: {tmp_path / 'pipe.png'} is no image: it is no regular file"
    assert first == f"error: there is no image {tmp_path / 'gone.png'}"
    assert second.startswith(f"error: cannot read the image {tmp_path / 'text.png'}")
