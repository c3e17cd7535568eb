"""Folders of a ViT-MAE that transformers wrote, whichever names its version gave the weights."""

import json
import re

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from clip_pgs.evaluation import load_model, weights_digest

SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
PIXELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


@pytest.fixture
def mae():
    """A model of transformers, of which no two weights are equal."""
    torch.manual_seed(0)
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SIZES)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def features(mae):
    """Return what docs/mae.md promises, as transformers computes it."""
    mae.config.mask_ratio = 0.0
    with torch.no_grad():
        tokens = mae.vit(PIXELS, noise=torch.linspace(0, 1, 16).expand(2, -1)).last_hidden_state
    return tokens[:, 1:].mean(dim=1)


def hub_names(folder):
    """Return the weights of a folder by the names of facebook/vit-mae-base."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return {n.replace("decoder_encoder.layer", "decoder_layers"): t for n, t in weights.items()}


def save_as_hub(mae, folder):
    mae.save_pretrained(folder)
    save_file(hub_names(folder), folder / "model.safetensors")


def save_as_module(mae, folder):
    mae.config.save_pretrained(folder)
    save_file(mae.state_dict(), folder / "model.safetensors")


def save_half(mae, folder):
    mae.half().save_pretrained(folder)
    mae.float()


def save_bin(mae, folder):
    mae.save_pretrained(folder)
    torch.save(hub_names(folder), folder / "pytorch_model.bin")


def save_bin_shards(mae, folder):
    mae.save_pretrained(folder)
    weights = hub_names(folder)
    files = {name: f"part-{number % 2}.bin" for number, name in enumerate(weights)}
    for file in set(files.values()):
        part = {name: t for name, t in weights.items() if files[name] == file}
        torch.save(part, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def save_encoder_of_whole_images(mae, folder):
    mae.vit.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mask_ratio": 0.0}))


FORMS = {
    "as transformers saves it": lambda mae, folder: mae.save_pretrained(folder),
    "shards": lambda mae, folder: mae.save_pretrained(folder, max_shard_size="10KB"),
    "encoder alone": lambda mae, folder: mae.vit.save_pretrained(folder),
    "encoder of whole images": save_encoder_of_whole_images,
    "names of the Hub": save_as_hub,
    "names of the module": save_as_module,
    "half precision": save_half,
    "pytorch_model.bin": save_bin,
    "shards of pytorch_model.bin": save_bin_shards,
}


@pytest.mark.parametrize("save", FORMS.values(), ids=FORMS)
def test_a_folder_of_transformers_gives_the_features_that_transformers_gives(
    tmp_path, mae, save, capfd
):
    save(mae, tmp_path)
    capfd.readouterr()
    loaded = load_model(tmp_path)
    # Neither a bar nor a report of names that were renamed.
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()
    torch.testing.assert_close(loaded.model.encode_image(PIXELS), features(mae))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert weights_digest(load_model(tmp_path).model) == weights_digest(loaded.model)


def test_the_index_of_the_shards_has_more_than_one(tmp_path, mae):
    FORMS["shards"](mae, tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1


QUERY = "vit.encoder.layer.0.attention.attention.query.weight"
MISFITS = {
    "one is missing": (
        lambda w: {n: t for n, t in w.items() if n != "vit.layernorm.bias"},
        "only the model has .*layernorm.bias",
    ),
    "of the decoder one": (
        lambda w: {n: t for n, t in w.items() if n != "decoder.mask_token"},
        "only the model has decoder.mask_token",
    ),
    "one more": (lambda w: {**w, "odd.bias": torch.zeros(2)}, "only the file has odd.bias"),
    "a shape": (
        lambda w: {**w, QUERY: torch.zeros(3, 16)},
        r"\.0\..* has shape \(3, 16\) in the file, \(16, 16\) in the model",
    ),
    "integers": (lambda w: {**w, QUERY: w[QUERY].long()}, f"{QUERY} is int64 in the file"),
    "twice": (
        lambda w: {**w, "vit.layers.0.attention.q_proj.weight": w[QUERY] + 1},
        "it has a weight twice|only the file has vit.layers.0",
    ),
    "a view": (
        lambda w: {**w, QUERY: torch.zeros(1).expand(2**45)},
        "stands for .* elements, and the file has 1",
    ),
}


@pytest.mark.parametrize(("changed", "sentence"), MISFITS.values(), ids=MISFITS)
def test_weights_that_do_not_fit_are_named(tmp_path, mae, changed, sentence):
    mae.save_pretrained(tmp_path)
    torch.save(changed(hub_names(tmp_path)), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=sentence):
        load_model(tmp_path)


@pytest.mark.parametrize("size", ["hidden_size", "decoder_hidden_size"])
def test_a_config_of_another_size_takes_no_memory(tmp_path, mae, size):
    mae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, size: 4096}))
    with pytest.raises(ValueError, match=r"does not fit its config: it needs [\d,]+ numbers"):
        load_model(tmp_path)


INDEXES = {
    "a folder above": {"weight_map": {"a": "../model.safetensors"}},
    "an absolute path": {"weight_map": {"a": "/model.safetensors"}},
    "a number": {"weight_map": {"a": 1}},
    "a list": {"weight_map": {"a": ["b"]}},
    "none": {"weight_map": {}},
    "no map": {},
}


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path, mae, index):
    (tmp_path / "it").mkdir()
    mae.save_pretrained(tmp_path / "it")
    (tmp_path / "it/model.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "it/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must have a weight_map that names files beside it"):
        load_model(tmp_path / "it")


def test_a_shard_that_is_gone_and_a_folder_without_weights_are_told(tmp_path, mae):
    FORMS["shards"](mae, tmp_path)
    first, *others = sorted(tmp_path.glob("model-*.safetensors"))
    first.unlink()
    with pytest.raises(ValueError, match=re.escape(f"{first}' does not exist")):
        load_model(tmp_path)
    for path in (*others, tmp_path / "model.safetensors.index.json"):
        path.unlink()
    with pytest.raises(ValueError, match=r"holds no weights: no model\.safetensors or"):
        load_model(tmp_path)


PROCESSORS = {
    "vit": {"image_processor_type": "ViTImageProcessor"},
    "no name": {},
    "vit of old": {
        "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
        "size": 32,
    },
    "clip": {"image_processor_type": "CLIPImageProcessor"},
    "clip, a number": {"image_processor_type": "CLIPImageProcessorFast", "size": 32},
    "no normalization": {"do_normalize": False},
    "no rescaling": {"do_rescale": False},
    "neither": {"do_rescale": False, "do_normalize": False},
    "from -1 to 1": {"rescale_factor": 1 / 127.5, "do_normalize": False},
    "from -1 to 1, then normalized": {"rescale_factor": 1 / 127.5, "image_mean": [0.1, 0.2, 0.3]},
    "larger before the crop": {
        "size": {"shortest_edge": 37},
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
    },
    "larger before the crop of clip": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 37},
        "crop_size": 32,
    },
}


def write_processor(folder, given):
    (folder / "preprocessor_config.json").write_text(json.dumps(given))


@pytest.mark.parametrize("given", PROCESSORS.values(), ids=PROCESSORS)
def test_images_are_prepared_as_transformers_does(tmp_path, mae, given):
    mae.save_pretrained(tmp_path)
    write_processor(tmp_path, given)
    side = (32, 32) if "shortest_edge" not in str(given.get("size")) else (37, 53)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (*side, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    # Both resize nothing here, so that they differ by rounding alone.
    sizes = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}
    if given.get("image_processor_type", "").startswith("CLIP"):
        sizes["size"] = {"shortest_edge": 32}
    write_processor(tmp_path, {**sizes, **given})
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    expected = processor(image, return_tensors="pt")["pixel_values"][0].float()
    write_processor(tmp_path, given)
    loaded = load_model(tmp_path)
    torch.testing.assert_close(loaded.transform(image), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"image_processor_type": "BitImageProcessor"}, "image_processor_type"),
        ({"do_resize": False}, "do_resize"),
        ({"do_normalize": "no"}, "do_normalize"),
        ({"do_pad": True}, "do_pad"),
        ({"resample": 0}, "resample"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"rescale_factor": float("nan")}, "rescale_factor"),
        ({"size": {"height": 64, "width": 64}}, "size"),
        ({"size": {"height": 32, "width": 64}}, "size"),
        ({"size": {"shortest_edge": 32}}, "size"),
        ({"size": {"shortest_edge": 16}, "do_center_crop": True}, "size"),
        ({"size": {"longest_edge": 32}}, "size"),
        ({"size": [32]}, "size"),
        ({"do_center_crop": True, "crop_size": 16}, "crop_size"),
        ({"image_mean": 0.5}, "mean"),
        ({"image_std": [1, 1, 0]}, "std"),
    ],
)
def test_what_a_processor_does_otherwise_is_refused_by_its_name(tmp_path, mae, given, key):
    mae.save_pretrained(tmp_path)
    write_processor(tmp_path, given)
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: .*\b{key} takes"):
        load_model(tmp_path)


@pytest.mark.parametrize("layers", ["num_hidden_layers", "decoder_num_hidden_layers"])
def test_a_config_of_endless_layers_is_refused(tmp_path, mae, layers):
    mae.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), layers: 65536}))
    with pytest.raises(ValueError, match=f"{layers} takes a whole number from 1 to 1000"):
        load_model(tmp_path)
