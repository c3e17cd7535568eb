import pytest
import torch

from clip_pgs.integrations.open_clip import apply_masking
from clip_pgs.integrations.open_clip.flops import count_flops
from support.models import TEXT, VISION, image_batch, small_clip, text_batch


def small_model(**vision):
    model = small_clip(**vision)
    model.output_dict = True
    return model


def count(model, **options):
    return count_flops(model, image_batch(2), text_batch(2), **options)


def block(tokens, width):
    linear = 2 * tokens * width * width * (3 + 1 + 4 + 4)
    attention = 2 * 2 * tokens * tokens * width
    return linear + attention


def last_block(tokens, width):
    """Count a block run for the class token alone: keys and values of all, the rest for one."""
    linear = 2 * width * width * (2 * tokens + 1 + 1 + 4 + 4)
    attention = 2 * 2 * tokens * width
    return linear + attention


def test_forward_equals_the_count_by_hand():
    width, num_patches, num_kept = VISION["width"], 16, 8
    by_hand = (
        2 * num_patches * 3 * VISION["patch_size"] ** 2 * width
        + (VISION["layers"] - 1) * block(1 + num_kept, width)
        + last_block(1 + num_kept, width)
        + 2 * width * 64
        + TEXT["layers"] * block(TEXT["context_length"], TEXT["width"])
        + 2 * TEXT["width"] * 64
    )
    model = apply_masking(small_model(), "random", mask_ratio=0.5)
    assert count(model, extra_forward=True) - count(model) == by_hand


def test_merged_tokens_count():
    width, kept, groups = VISION["width"], 4, 4

    def forward(model):
        return count(model, extra_forward=True) - count(model)

    plain, merged = (
        forward(apply_masking(small_model(), "random", mask_ratio=0.75, merge=merge))
        for merge in ("none", "2x2")
    )
    extra = (VISION["layers"] - 1) * (block(1 + kept + groups, width) - block(1 + kept, width)) + (
        last_block(1 + kept + groups, width) - last_block(1 + kept, width)
    )
    assert merged - plain == extra + 2 * groups * 16 * width


def test_masking_costs_less_than_seeing_everything():
    assert count(apply_masking(small_model(), "pgs", mask_ratio=0.5)) < 0.75 * count(small_model())


def test_backward_costs_about_twice_the_forward():
    model = small_model()
    forward = count(model, extra_forward=True) - count(model)
    assert count(model) / forward == pytest.approx(3, rel=0.1)


def test_counting_changes_nothing():
    model = apply_masking(small_model(), "random", mask_ratio=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    count(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
