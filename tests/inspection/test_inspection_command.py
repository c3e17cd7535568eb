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
        (["--mask-ratio", "1.0"], "error: mask_ratio must be in [0, 1), got 1.0"),
        (["--mask-ratio", "0.3", "--mask-ratio-min", "0.4"], "error: mask_ratio_min must not"),
        (["--patch-size", "17"], "error: patch_size must divide the image: 224 x 224 pixels in "),
        (["--image-size", "0"], "error: image_size must be at least 1, got "),
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


def test_a_missing_image_and_a_file_that_is_none_are_named(tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    assert main(["masks", str(tmp_path / "gone.png"), "-o", str(tmp_path / "out.png")]) == 2
    assert main(["masks", str(tmp_path / "text.png"), "-o", str(tmp_path / "out.png")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: there is no image {tmp_path / 'gone.png'}"
    assert second.startswith(f"error: cannot read the image {tmp_path / 'text.png'}")
