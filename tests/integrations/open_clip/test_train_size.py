"""Training on smaller images: positions are interpolated as OpenCLIP and timm do it for loading."""

import copy

import pytest
import torch
from open_clip.model import resize_pos_embed
from timm.layers import resample_abs_pos_embed

from clip_pgs.integrations.open_clip import apply_masking, last_selection, num_patches
from support.models import image_batch, small_clip, small_eva_clip, small_timm_clip


def small_images():
    return image_batch()[:, :, :32, :32]


def open_clip_oracle():
    plain, oracle = small_clip(), small_clip(image_size=32)
    weights = copy.deepcopy(plain.state_dict())
    resize_pos_embed(weights, oracle)
    oracle.load_state_dict(weights)
    return plain, oracle


def timm_oracle():
    plain, oracle = small_timm_clip(), small_timm_clip(img_size=32)
    weights = copy.deepcopy(plain.state_dict())
    name = "visual.trunk.pos_embed"
    weights[name] = resample_abs_pos_embed(weights[name], new_size=[2, 2], num_prefix_tokens=1)
    oracle.load_state_dict(weights)
    return plain, oracle


@pytest.mark.parametrize("build", [open_clip_oracle, timm_oracle])
def test_the_features_are_those_of_a_model_of_that_size(build):
    plain, oracle = build()
    model = apply_masking(copy.deepcopy(plain), "none", image_size=32).train()
    assert num_patches(model) == 4
    expected = oracle.train().visual(small_images())
    torch.testing.assert_close(model.visual(small_images()), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(model.eval().visual(image_batch()), plain.eval().visual(image_batch()))


@pytest.mark.parametrize(
    "build", [small_clip, lambda: small_eva_clip(use_rot_pos_emb=True)], ids=["vit", "rope"]
)
def test_small_images_are_masked_and_merged_on_their_own_grid(build):
    model = apply_masking(build(), "pgs", image_size=32, mask_ratio=0.5, merge="2x2").train()
    model.visual(small_images()).square().sum().backward()
    assert last_selection(model).index.shape == (3, 2)
