"""Every kind of model that OpenCLIP builds trains under every kind of masking."""

import copy
import json

import open_clip
import pytest
import torch
from open_clip.loss import SigLipLoss

from clip_pgs.integrations.open_clip import (
    apply_masking,
    calibrate_masking,
    last_selection,
    num_patches,
    set_masking_progress,
    update_masking,
)

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
POOL = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}
BATCH = 6
CONFIGS = {
    "clip": {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT},
    "custom-text": {"embed_dim": 32, "custom_text": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "coca": {
        "embed_dim": 32,
        "custom_text": True,
        "vision_cfg": {**VISION, **POOL, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": TEXT,
    },
    # timm's smallest ViT with the pooling of SigLIP's.
    "siglip": {
        "embed_dim": 96,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 160,
            "timm_model_name": "test_vit3",
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
}
MASKINGS = {
    "random": ("random", {}),
    "cluster": ("cluster", {}),
    "pgs": ("pgs", {}),
    "pgs-adaptive": ("pgs", {"mask_ratio_min": 0.3}),
    "attentive": ("attentive", {}),
}


@pytest.fixture(scope="module", params=CONFIGS)
def family(request, tmp_path_factory):
    """Return (name of a registered model, a plain one, its loss)."""
    name = f"tiny-{request.param}"
    path = tmp_path_factory.mktemp("configs") / f"{name}.json"
    path.write_text(json.dumps(CONFIGS[request.param]))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    model = open_clip.create_model(name, output_dict=True)
    loss = {
        "coca": open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0),
        "siglip": SigLipLoss(),
    }.get(request.param, open_clip.ClipLoss())
    if request.param == "coca":
        # OpenCLIP leaves this parameter as the memory it finds.
        torch.nn.init.normal_(model.text_decoder.text_projection, std=0.1)
    return name, model, loss


def batch(model, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    side = open_clip.get_model_preprocess_cfg(model)["size"]
    height, width = (side, side) if isinstance(side, int) else side
    texts = torch.randint(1, 49000, (BATCH, 12), generator=generator)
    texts[:, -1] = 49407
    return torch.randn(BATCH, 3, height, width, generator=generator), texts


@pytest.mark.parametrize(
    "masking",
    [
        name if name == "pgs-adaptive" else pytest.param(name, marks=pytest.mark.slow)
        for name in MASKINGS
    ],
)
def test_it_trains_and_its_weights_are_those_of_a_plain_model(family, masking):
    name, plain, loss = family
    masking, options = MASKINGS[masking]
    model = apply_masking(copy.deepcopy(plain), masking, mask_ratio=0.5, **options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        images, texts = batch(model, seed=step)
        set_masking_progress(model, step / 2)
        calibrate_masking(model, images)
        value = sum(loss(**model(images, texts), output_dict=True).values())
        value.backward()
        assert torch.isfinite(value)
        optimizer.step()
        optimizer.zero_grad()
        update_masking(model, step=step, total_steps=2)
        kept = last_selection(model).kept_counts()
        assert kept.min() >= num_patches(model) // 2 or masking == "cluster"
        assert kept.max() <= 0.7 * num_patches(model) + 1

    exported = open_clip.create_model(name, output_dict=True).eval()
    exported.load_state_dict(model.state_dict(), strict=True)
    changed = [
        key
        for key, value in plain.visual.state_dict().items()
        if not torch.equal(value, exported.visual.state_dict()[key])
    ]
    assert len(changed) > 0.9 * len(plain.visual.state_dict())
    images, texts = batch(model)
    model.eval()
    with torch.no_grad():
        got, expected = model(images, texts), exported(images, texts)
    assert set(got) == set(expected)
    for part in got:
        assert torch.equal(got[part], expected[part])
