import copy

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer

from clip_pgs import create_masking
from clip_pgs.integrations.open_clip import (
    apply_masking,
    force_selection,
    last_selection,
    num_patches,
    remove_masking,
    set_masking_noise,
    set_masking_progress,
)
from support.models import image_batch, small_clip, text_batch


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("name", ["none", "random", "pgs"])
def test_eval_mode_is_bit_identical_to_plain_open_clip(name, custom_text):
    plain = small_clip(custom_text=custom_text).eval()
    masked = apply_masking(copy.deepcopy(plain), name).eval()
    for got, expected in zip(
        masked(image_batch(), text_batch()), plain(image_batch(), text_batch()), strict=True
    ):
        assert torch.equal(got, expected)


def test_masking_none_is_bit_identical_in_train_mode_too():
    plain = small_clip().train()
    masked = apply_masking(copy.deepcopy(plain), "none")
    assert torch.equal(masked.visual(image_batch()), plain.visual(image_batch()))


def test_train_mode_drops_patches():
    model = apply_masking(small_clip(), "random", mask_ratio=0.75).train()
    model.visual(image_batch())
    assert last_selection(model).index.shape == (3, 4)


def test_the_state_dict_keeps_its_keys_and_loads_both_ways():
    plain, masked = small_clip(seed=0), apply_masking(small_clip(seed=1), "pgs")
    assert list(masked.state_dict()) == list(plain.state_dict())
    masked.load_state_dict(plain.state_dict())
    plain.load_state_dict(masked.state_dict())
    assert not dict(masked.visual.masking.named_buffers())


def test_it_works_in_place_and_returns_the_model():
    model = small_clip()
    assert apply_masking(model, "pgs") is model
    assert isinstance(model.visual, VisionTransformer)


def test_a_strategy_object_is_taken_as_it_is():
    model = apply_masking(small_clip(), create_masking("random", mask_ratio=0.25)).train()
    model.visual(image_batch())
    assert last_selection(model).index.shape == (3, 12)


def test_a_second_call_replaces_the_first_strategy():
    model = apply_masking(apply_masking(small_clip(), "random"), "pgs", mask_ratio=0.25).train()
    model.visual(image_batch())
    assert last_selection(model).index.shape == (3, 12)


def test_removing_gives_the_plain_tower_back():
    plain = small_clip().train()
    model = remove_masking(apply_masking(copy.deepcopy(plain), "pgs"))
    assert type(model.visual) is VisionTransformer
    assert torch.equal(model.visual(image_batch()), plain.visual(image_batch()))
    assert remove_masking(model) is model


def test_a_copy_masks_by_itself():
    model = apply_masking(small_clip(), "random").train()
    twin = copy.deepcopy(model)
    twin.visual(image_batch())
    assert last_selection(model) is None
    assert last_selection(twin) is not None


def test_the_same_noise_repeats_the_selection():
    model = apply_masking(small_clip(), "pgs").train()
    set_masking_noise(model, torch.rand(3, 16))
    first = model.visual(image_batch())
    assert torch.equal(model.visual(image_batch()), first)
    set_masking_noise(model, None)
    others = [model.visual(image_batch()) for _ in range(4)]
    assert any(not torch.equal(other, first) for other in others)


def test_progress_reaches_the_strategy():
    model = apply_masking(small_clip(), "pgs", mask_ratio=0.5).train()
    noise = torch.rand(64, 16, generator=torch.Generator().manual_seed(0))
    images = image_batch(64)
    set_masking_noise(model, noise)
    model.visual(images)
    before = last_selection(model).index
    set_masking_progress(model, 1.0)
    model.visual(images)
    assert not torch.equal(last_selection(model).index, before)


def test_wrapped_models_are_reached():
    model = apply_masking(small_clip(), "random").train()
    wrapped = torch.nn.Module()
    wrapped.module = model
    set_masking_progress(torch.compile(wrapped), 0.5)
    assert model.visual.masking.progress == 0.5


def test_num_patches_counts_the_grid():
    assert num_patches(small_clip()) == 16
    assert num_patches(small_clip(image_size=[64, 32])) == 8


def test_towers_of_another_kind_are_named():
    resnet = open_clip.model.CLIP(
        32,
        {"layers": [1, 1, 1, 1], "image_size": 64, "width": 16},
        {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
    )
    sentence = "CLIP has the image tower ModifiedResNet; masking supports OpenCLIP's own Vision"
    with pytest.raises(ValueError, match=sentence):
        apply_masking(resnet, "pgs")
    with pytest.raises(ValueError, match="Linear has no image tower; masking supports"):
        apply_masking(torch.nn.Linear(2, 2), "pgs")


def test_a_timm_tower_is_named():
    model = open_clip.model.CustomTextCLIP(
        32,
        {"timm_model_name": "convnext_atto", "image_size": 64, "timm_proj": "linear"},
        {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
    )
    with pytest.raises(ValueError, match="CustomTextCLIP has the image tower TimmModel"):
        apply_masking(model, "pgs")


def test_a_tower_that_drops_patches_by_itself_is_refused():
    with pytest.raises(ValueError, match=r"drops patches by itself \(patch_dropout=0.5\)"):
        apply_masking(small_clip(patch_dropout=0.5), "pgs")


def test_a_wrong_option_leaves_the_model_plain():
    model = small_clip()
    with pytest.raises(ValueError, match=r"mask_ratio must be in \[0, 1\)"):
        apply_masking(model, "pgs", mask_ratio=2.0)
    assert type(model.visual) is VisionTransformer


def test_options_beside_a_strategy_object_are_refused():
    with pytest.raises(ValueError, match="options go with a masking's name, got mask_ratio"):
        apply_masking(small_clip(), create_masking("random"), mask_ratio=0.5)


def test_plain_models_have_no_masking_to_set():
    for call in (
        lambda: set_masking_progress(small_clip(), 0.5),
        lambda: set_masking_noise(small_clip(), None),
        lambda: last_selection(small_clip()),
        lambda: force_selection(small_clip(), None).__enter__(),
    ):
        with pytest.raises(ValueError, match="the model is not masked; call apply_masking first"):
            call()


def test_progress_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], got 1.5"):
        set_masking_progress(apply_masking(small_clip(), "pgs"), 1.5)
