from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from clip_pgs import create_masking
from clip_pgs.inspection import ModelInput, View, load_model, read_model_input
from clip_pgs.inspection.playground import Playground
from clip_pgs.integrations.open_clip import apply_masking, last_selection
from support.models import image_batch, small_clip, small_timm_clip
from support.options import MODEL_CONFIG
from support.runs import COCA

MODEL = {"embed_dim": 8, "vision_cfg": {"image_size": 64, "patch_size": 8, "layers": 2}}

SIZES = ModelInput(image_size=(64, 64), patch_size=(16, 16))


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_a_model_config_gives_image_and_patch_size(tmp_path):
    write_json(tmp_path / "small.json", MODEL)
    model_input = read_model_input(str(tmp_path / "small.json"))
    assert (model_input.image_size, model_input.patch_size) == ((64, 64), (8, 8))


@pytest.mark.parametrize("name", ["configs/models/demo_vit.json", "demo_vit"])
def test_a_config_of_the_package_is_found_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert read_model_input(name).image_size == (64, 64)


@pytest.mark.parametrize("place", ["run/export", "run"])
def test_a_run_or_its_export_gives_sizes_and_normalisation(tmp_path, place):
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "resize_mode": "squash"}
    preprocess["fill_color"] = 200
    config = {"model_cfg": MODEL, "preprocess_cfg": preprocess}
    write_json(tmp_path / place / "open_clip_config.json", config)
    model_input = read_model_input(str(tmp_path / "run"))
    expected = ModelInput((64, 64), (8, 8), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert model_input == replace(expected, resize_mode="squash", fill_color=200)


def test_a_run_without_an_export_gives_its_newest_checkpoint(tmp_path):
    preprocess = {"mean": [0.5, 0.5, 0.5], "interpolation": "bilinear"}
    config = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": preprocess}
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    models = [open_clip.CLIP(**MODEL_CONFIG) for _ in range(2)]
    for epoch, model in enumerate(models, start=1):
        record = {"open_clip_config": config}
        content = {"epoch": epoch, "state_dict": model.state_dict(), "clip_pgs": record}
        torch.save(content, folder / f"epoch_{epoch}.pt")
    vision = MODEL_CONFIG["vision_cfg"]
    for source, model in ((tmp_path / "run", models[1]), (folder / "epoch_1.pt", models[0])):
        model_input = read_model_input(str(source))
        assert model_input.image_size == 2 * (vision["image_size"],)
        assert model_input.patch_size == 2 * (vision["patch_size"],)
        assert model_input.mean == (0.5, 0.5, 0.5)
        assert model_input.interpolation == "bilinear"
        loaded = load_model(str(source)).visual.conv1.weight
        assert torch.equal(loaded, model.visual.conv1.weight)


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "epoch_1.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"epoch_1\.pt"):
        read_model_input(str(tmp_path / "epoch_1.pt"))


def test_a_name_that_open_clip_knows_gives_its_sizes():
    model_input = read_model_input("ViT-B-32")
    assert (model_input.image_size, model_input.patch_size) == ((224, 224), (32, 32))


def test_a_timm_tower_gives_its_sizes():
    model_input = read_model_input("ViT-B-16-SigLIP-384")
    assert (model_input.image_size, model_input.patch_size) == ((384, 384), (16, 16))


def has_pooler(name):
    return open_clip.get_model_config(name)["vision_cfg"].get("attentional_pool")


@pytest.mark.parametrize("name", list(filter(has_pooler, open_clip.list_models())))
def test_a_tower_that_pools_by_queries_gives_its_sizes(name):
    model_input = read_model_input(name)
    vision = open_clip.get_model_config(name)["vision_cfg"]
    assert model_input.image_size == 2 * (vision["image_size"],)
    assert model_input.patch_size == 2 * (vision["patch_size"],)


@pytest.mark.parametrize("place", ["coca.json", "run/export/open_clip_config.json"])
def test_the_config_of_a_coca_gives_its_sizes(tmp_path, place):
    write_json(tmp_path / place, COCA)
    source = str(tmp_path / place.partition("/")[0])
    assert read_model_input(source).patch_size == (8, 8)
    if source.endswith(".json"):
        assert Playground(source).view.model_input.patch_size == (8, 8)


@pytest.mark.parametrize("key", ["embed_dim", "vision_cfg"])
@pytest.mark.parametrize("value", [None, 0, "wide"])
def test_a_config_without_what_the_tower_needs_is_refused_by_that_name(tmp_path, key, value):
    write_json(tmp_path / "odd.json", {**MODEL, key: value})
    for read in (read_model_input, Playground):
        with pytest.raises(ValueError, match=rf"odd\.json.*{key}"):
            read(str(tmp_path / "odd.json"))


def test_a_config_of_transformers_is_asked_for_what_makes_an_image_tower(tmp_path):
    write_json(tmp_path / "mae.json", {"model_type": "vit_mae", "hidden_size": 16})
    with pytest.raises(ValueError, match=r"mae\.json is no model config: it has no vision_cfg"):
        read_model_input(str(tmp_path / "mae.json"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MobileCLIP-S1", "FastVit"),
        ("swin_base_patch4_window7_224", "windows"),
    ],
)
def test_a_tower_without_patches_is_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        read_model_input(name)


@pytest.mark.parametrize("name", ["RN50", "convnext_base"])
def test_a_tower_of_convolutions_has_cells_of_32_pixels(name):
    assert read_model_input(name).patch_size == (32, 32)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="nonsense"):
        read_model_input("nonsense")


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"open_clip_config\.json"):
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
        ((16, 0), r"patch_size must be a whole number of at least 1, or two, got \(16, 0\)"),
    ],
)
def test_patches_that_do_not_divide_the_image_are_refused(patch_size, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModelInput(patch_size=patch_size)


@pytest.mark.parametrize("size", [(300, 224), (640, 128), (40, 60)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"interpolation": "bilinear", "resize_mode": "squash"},
        {"image_size": (224, 96)},
        {"image_size": (96, 224), "resize_mode": "longest"},
        {"resize_mode": "longest", "fill_color": 200},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_the_model_receives_what_open_clip_would_give_it(size, options):
    image = Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB")
    model_input = ModelInput(**options)
    transform = open_clip.image_transform(
        is_train=False, **{"image_size": model_input.image_size, **options}
    )
    pixels = model_input.normalize([model_input.crop(image)])
    assert torch.equal(pixels[0], transform(image))


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_a_mask_is_cropped_where_its_image_is(resize_mode):
    # An edge that no resampling blurs shows where a pixel comes from.
    mask = Image.new("L", (400, 300), 0)
    mask.paste(1, (100, 60, 300, 240))
    model_input = ModelInput((96, 192), (16, 16), resize_mode=resize_mode, fill_color=100)
    cropped = np.asarray(model_input.crop_mask(mask))
    image = np.asarray(model_input.crop(mask.point(lambda value: 255 * value).convert("RGB")))
    assert set(np.unique(cropped)) == {0, 1}
    assert np.mean((image[:, :, 0] > 127) == (cropped == 1)) > 0.99


def test_pixels_alone_need_no_model():
    inputs = View(SIZES).inputs(image_batch(), create_masking("pgs"))
    assert inputs.tokens is None
    assert inputs.attention is None


def test_embeddings_are_those_of_the_models_patches():
    model, images = small_clip(), image_batch()
    inputs = View(SIZES, model, progress=0.5).inputs(images, create_masking("pgs"))
    expected = model.visual.conv1(images).flatten(2).transpose(1, 2)
    assert torch.allclose(inputs.tokens, expected, atol=1e-6)
    assert inputs.progress == 0.5


@pytest.mark.parametrize("model", [small_clip(), small_timm_clip()], ids=["open_clip", "timm"])
def test_attention_chooses_as_a_teacher_of_the_same_weights_would(model):
    model, images = copy.deepcopy(model).eval(), image_batch()
    strategy = create_masking("attentive", mask_ratio=0.5, resolution=1.0)
    seen = strategy(View(SIZES, model).inputs(images, strategy)).index
    apply_masking(model, strategy, when="always")
    model.encode_image(images)
    assert torch.equal(seen, last_selection(model).index)


def test_a_masked_model_in_training_stays_as_it_is():
    model = apply_masking(small_clip(), "random", mask_ratio=0.25).train()
    View(SIZES, model, progress=1.0).inputs(image_batch(), create_masking("pgs"))
    assert model.training
    model.encode_image(image_batch())
    assert last_selection(model).index.shape == (3, 12)
