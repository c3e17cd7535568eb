from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image

from clip_pgs.inspection.__main__ import main


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "a photo.png"
    Image.linear_gradient("L").save(path)
    return path


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
    ("flags", "sentence"),
    [
        (["--masking", "pgx"], "error: unknown masking 'pgx'; choose from "),
        (["--masking", "pgs:edges"], "error: options are written as pgs:KEY=VALUE,KEY=VALUE, got"),
        (["--masking", "pgs:edges=abc"], "error: masking 'pgs': edges takes true or false, got 'a"),
        (["--masking", "cluster:mask_ratio=a"], "error: masking 'cluster': mask_ratio takes a num"),
        (["--masking", "pgs", "pgs"], "error: masking pgs is given twice"),
        (["--masking", "random", "--stages"], "error: stages are those of pgs, which is not among"),
        (["--progress", "2"], "error: progress must be in [0, 1], got 2.0"),
        (["--mask-ratio", "1.0"], "error: mask_ratio must be in [0, 1), got 1.0"),
        (["--mask-ratio", "0.3", "--mask-ratio-min", "0.4"], "error: mask_ratio_min must not"),
        (["--patch-size", "17"], "error: patch_size must divide the image: 224 x 224 pixels in "),
        (["--image-size", "0"], "error: image_size must be in [1, 16384], got "),
        (["-o", "masks.xyz"], "error: the output must end in .png, .jpg or the like, got "),
    ],
)
def test_bad_input_ends_with_code_2_one_sentence_and_no_file(
    photo, tmp_path, monkeypatch, capsys, flags, sentence
):
    monkeypatch.chdir(tmp_path)
    assert main(["masks", str(photo), "-o", "masks.png", *flags]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(sentence)
    assert stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [photo]


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
    heights = []
    for images in ([photo], [folder]):
        output = tmp_path / "masks.png"
        assert main(["masks", *map(str, images), "-o", str(output), "--masking", "random"]) == 0
        with Image.open(output) as figure:
            heights.append(figure.height)
    assert heights[1] - heights[0] > 224


def test_an_empty_folder_is_named(tmp_path, capsys):
    assert main(["masks", str(tmp_path), "-o", str(tmp_path / "out.png")]) == 2
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
    assert capsys.readouterr().err.startswith("error: ViT-B-32 has no weights to look at; ")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "F"])
def test_photos_of_odd_modes_are_drawn(tmp_path, mode):
    path = tmp_path / ("photo.png" if mode in ("1", "LA", "P", "RGBA") else "photo.tif")
    Image.linear_gradient("L").resize((90, 40)).convert(mode).save(path)
    flags = ["--masking", "random", "cluster", "pgs", "--stages"]
    assert main(["masks", str(path), "-o", str(tmp_path / "out.png"), *flags]) == 0


def test_a_missing_image_and_a_file_that_is_none_are_named(tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    assert main(["masks", str(tmp_path / "gone.png"), "-o", str(tmp_path / "out.png")]) == 2
    assert main(["masks", str(tmp_path / "text.png"), "-o", str(tmp_path / "out.png")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: there is no image {tmp_path / 'gone.png'}"
    assert second.startswith(f"error: cannot read the image {tmp_path / 'text.png'}")
