"""Small Hugging Face models with 16 patches, built from configs without any file or network."""

import torch
import transformers
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from support.models import image_batch

_SIZE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "attention_dropout": 0.0,
}
VISION = {**_SIZE, "image_size": 64, "patch_size": 16}
TEXT = {
    **_SIZE,
    "num_hidden_layers": 1,
    "vocab_size": 100,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "projection_size": 64,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}
# NaFlex: (rows, columns) of patches; the longest image has 16.
SHAPES = [(4, 4), (2, 6), (4, 4)]


def hf_model(name, *, seed=0, attention="sdpa", **vision):
    """Return a model of a class of transformers; `vision` changes its image tower's config."""
    torch.manual_seed(seed)
    model_class = getattr(transformers, name)
    vision = {**VISION, **vision}
    if name.startswith("Siglip2"):
        vision["num_patches"] = 16
    if "Vision" in name:
        config = model_class.config_class(**vision, projection_dim=64)
    else:
        config = model_class.config_class(text_config=TEXT, vision_config=vision, projection_dim=64)
    config._attn_implementation = attention
    model = model_class(config)
    # Initial positions are small: a wrong place would change features by less than a tolerance.
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def hf_tower(model):
    """Return the vision model of a model."""
    return getattr(model, "vision_model", model)


def hf_images(model, batch_size=3, *, seed=0):
    """Return what a model takes of images, as keywords; NaFlex has the grids `SHAPES`."""
    images = image_batch(batch_size, seed=seed)
    if "Siglip2" not in type(model).__name__:
        return {"pixel_values": images}
    patches = torch.zeros(batch_size, 16, 16 * 16 * 3)
    mask = torch.zeros(batch_size, 16, dtype=torch.int64)
    for row, image in enumerate(naflex_images(batch_size, seed=seed)):
        found = torch.tensor(convert_image_to_patches(image.numpy(), 16))
        patches[row, : len(found)], mask[row, : len(found)] = found, 1
    shapes = torch.tensor(SHAPES[:batch_size])
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def naflex_images(batch_size=3, *, seed=0):
    """Return one image (3, H, W) for each of `SHAPES`."""
    generator = torch.Generator().manual_seed(seed)
    sides = [(16 * rows, 16 * columns) for rows, columns in SHAPES[:batch_size]]
    return [torch.randn(3, *side, generator=generator) for side in sides]


def hf_features(model, images):
    """Return what a model's image tower pools, (B, D)."""
    return hf_tower(model)(**images).pooler_output
