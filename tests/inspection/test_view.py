from __future__ import annotations

import copy

import pytest
import torch

from clip_pgs import create_masking
from clip_pgs.inspection import ModelInput, View
from clip_pgs.integrations.open_clip import apply_masking, last_selection
from support.models import image_batch, small_clip, small_timm_clip

SIZES = ModelInput(image_size=(64, 64), patch_size=(16, 16))


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
