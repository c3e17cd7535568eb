import pytest
import torch
from torch.nn import functional

from clip_pgs import PatchSelection
from clip_pgs.integrations.open_clip import apply_masking, force_selection
from clip_pgs.integrations.open_clip.tokens import released_attention_bias
from support.models import image_batch, small_clip, small_timm_clip

SIMILAR = torch.tensor([[True, False, False], [False, False, False], [False, True, True]])
INDEX = torch.tensor([[0, 4, 9], [1, 2, 3], [7, 8, 15]])


def bias_by_hand(similar, num_heads):
    """Return the released code's bias pair by pair, as nested lists (B, H, T, T)."""
    rows = [[False, *row] for row in similar.tolist()]
    return [
        [
            [[float(not (query or key)) for key in row] for query in row]
            for row in (rows[(image * num_heads + head) % len(rows)] for head in range(num_heads))
        ]
        for image in range(len(rows))
    ]


def test_pairs_without_a_similar_token_get_one_and_images_are_interleaved():
    got = released_attention_bias(SIMILAR, num_heads=2, dtype=torch.float32)
    assert got.tolist() == bias_by_hand(SIMILAR, 2)


@pytest.mark.parametrize("vision", [{}, {"qk_norm": True}], ids=["default block", "custom block"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_added_to_the_logits_of_every_block(monkeypatch, vision, checkpointing):
    model = apply_masking(small_clip(**vision), "random").train()
    model.set_grad_checkpointing(checkpointing)
    masks, plain_attention = [], functional.scaled_dot_product_attention

    def record(*args, **kwargs):
        masks.append(kwargs["attn_mask"])
        return plain_attention(*args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    with force_selection(model, PatchSelection(INDEX, similar=SIMILAR)):
        model.visual(image_batch())
    assert [mask.tolist() for mask in masks] == [bias_by_hand(SIMILAR, 2)] * 2


def test_it_changes_the_features_and_no_bias_changes_none():
    model = apply_masking(small_clip(), "random").train()
    features = []
    for similar in (None, SIMILAR, torch.zeros_like(SIMILAR)):
        with force_selection(model, PatchSelection(INDEX, similar=similar)):
            features.append(model.visual(image_batch()))
    assert not torch.allclose(features[1], features[0], atol=1e-4)
    # The same number on every logit of a row is no bias.
    torch.testing.assert_close(features[2], features[0], atol=1e-5, rtol=1e-5)


def test_the_released_strategy_uses_it_where_it_is_asked_to():
    features = []
    for attention_bias in (False, True):
        options = {"mask_ratio": 0.5, "attention_bias": attention_bias}
        model = apply_masking(small_clip(), "pgs-released", **options).train()
        torch.manual_seed(0)
        features.append(model.visual(image_batch()))
    assert not torch.equal(*features)


def test_timm_towers_refuse_it():
    sentence = "attention_bias is made for OpenCLIP's own VisionTransformer, and the image tower"
    with pytest.raises(ValueError, match=sentence):
        apply_masking(small_timm_clip(), "pgs-released", attention_bias=True)
