import copy
from functools import partial

import pytest
import torch

from clip_pgs import PatchSelection
from clip_pgs.integrations.open_clip import apply_masking, force_selection, last_selection
from support.models import image_batch, small_clip, small_coca, small_timm_clip

BUILDERS = {
    "class token": small_clip,
    "average": partial(small_clip, pool_type="avg"),
    "custom block": partial(small_clip, qk_norm=True),
    "coca": small_coca,
    "timm": small_timm_clip,
    "siglip": partial(small_timm_clip, global_pool="map", class_token=False),
}
every_tower = pytest.mark.parametrize("build", list(BUILDERS.values()), ids=list(BUILDERS))


@every_tower
@pytest.mark.parametrize("valid", [None, torch.ones(3, 16, dtype=torch.bool)], ids=["", "valid"])
def test_masks_at_inference_that_mask_nothing_change_almost_nothing(build, valid):
    plain = build().eval()
    model = apply_masking(copy.deepcopy(plain), "random", when="always")
    everything = PatchSelection(torch.arange(16).repeat(3, 1), valid)
    with torch.no_grad(), force_selection(model, everything):
        got, expected = model.encode_image(image_batch()), plain.encode_image(image_batch())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@every_tower
@pytest.mark.parametrize("options", [{}, {"mask_ratio_min": 0.3}], ids=["fixed", "adaptive"])
def test_inference_sees_what_training_sees(build, options):
    model = apply_masking(build(), "pgs", when="always", mask_ratio=0.5, **options)
    features = []
    for mode in (True, False):
        torch.manual_seed(0)
        with torch.no_grad():
            features.append(model.train(mode).encode_image(image_batch()))
    assert last_selection(model).kept_counts().min() < 16
    torch.testing.assert_close(*features, atol=1e-5, rtol=1e-5)


def test_the_strategy_none_is_bit_identical_at_inference():
    plain = small_clip().eval()
    model = apply_masking(copy.deepcopy(plain), "none", when="always")
    assert torch.equal(model.visual(image_batch()), plain.visual(image_batch()))


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="when must be one of train, always, got 'never'"):
        apply_masking(small_clip(), "pgs", when="never")
