from __future__ import annotations

import json

import pytest
from PIL import Image

from clip_pgs.inspection import ModelInput, read_model_input

MODEL = {"embed_dim": 8, "vision_cfg": {"image_size": 64, "patch_size": 8, "layers": 2}}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_a_model_config_gives_image_and_patch_size(tmp_path):
    write_json(tmp_path / "small.json", MODEL)
    model_input = read_model_input(str(tmp_path / "small.json"))
    assert (model_input.image_size, model_input.patch_size) == ((64, 64), (8, 8))


@pytest.mark.parametrize("place", ["run/export", "run"])
def test_a_run_or_its_export_gives_sizes_and_normalisation(tmp_path, place):
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    config = {"model_cfg": MODEL, "preprocess_cfg": preprocess}
    write_json(tmp_path / place / "open_clip_config.json", config)
    model_input = read_model_input(str(tmp_path / "run"))
    assert model_input == ModelInput((64, 64), (8, 8), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def test_a_name_that_open_clip_knows_gives_its_sizes():
    model_input = read_model_input("ViT-B-32")
    assert (model_input.image_size, model_input.patch_size) == ((224, 224), (32, 32))


def test_a_timm_tower_gives_its_sizes():
    model_input = read_model_input("ViT-B-16-SigLIP-384")
    assert (model_input.image_size, model_input.patch_size) == ((384, 384), (16, 16))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("RN50", "image tower of RN50 is not open_clip's VisionTransformer"),
        ("convnext_base", "masking supports"),
    ],
)
def test_a_tower_without_patches_is_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        read_model_input(name)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'nonsense' is not a run folder, a model config or"):
        read_model_input("nonsense")


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither export/open_clip_config\.json nor"):
        read_model_input(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "is not JSON"), ("[]", "one JSON object, got list")]
)
def test_a_broken_config_is_refused(tmp_path, text, reason):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_model_input(str(tmp_path / "broken.json"))


@pytest.mark.parametrize(
    ("patch_size", "sentence"),
    [
        ((15, 16), "patch_size must divide the image: 224 x 224 pixels"),
        ((16, 0), r"patch_size must be at least 1, got \(16, 0\)"),
    ],
)
def test_patches_that_do_not_divide_the_image_are_refused(patch_size, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModelInput(patch_size=patch_size)


@pytest.mark.parametrize("size", [(300, 224), (640, 128), (40, 60)])
def test_the_model_receives_what_open_clip_would_give_it(size):
    import open_clip

    image = Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB")
    model_input = ModelInput()
    transform = open_clip.image_transform(224, is_train=False, interpolation="bilinear")
    pixels = model_input.normalise([model_input.crop(image)])
    difference = (pixels[0] - transform(image)).abs()
    assert difference.mean() < 0.02
