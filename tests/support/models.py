"""Small OpenCLIP models, built without any file or network."""

import pytest
import torch
from open_clip import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

TEXT = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": 64, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32}
TRUNK = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2}


def over(name, cases, *quick):
    """Return a mark that runs a test over named cases, in the fast lane over the quick ones alone.

    Args:
        name: Of the test's argument.
        cases: What it takes, by name.
        *quick: Names of a few that differ most; the others are marked slow.
    """
    assert set(quick) <= cases.keys()
    marks = {case: () if case in quick else pytest.mark.slow for case in cases}
    return pytest.mark.parametrize(
        name, [pytest.param(cases[case], id=case, marks=marks[case]) for case in cases]
    )


def small_clip(*, custom_text=False, seed=0, text=None, **vision):
    """Return a CLIP with 16 patches; `vision` and `text` change its towers' configs."""
    torch.manual_seed(seed)
    model_class = CustomTextCLIP if custom_text else CLIP
    return model_class(64, {**VISION, **vision}, {**TEXT, **(text or {})})


def small_timm_clip(*, seed=0, trunk_class=VisionTransformer, **trunk):
    """Return a CustomTextCLIP on timm's ViT with 16 patches; `trunk` changes its arguments."""
    torch.manual_seed(seed)
    # Any timm model will do: its trunk is replaced by one of our own size.
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    model = CustomTextCLIP(64, vision, dict(TEXT))
    model.visual.trunk = trunk_class(num_classes=0, **{**TRUNK, **trunk})
    return model


def small_eva_clip(**trunk):
    """Return the same on timm's EVA, whose attention is made to depend on where tokens stand."""
    model = small_timm_clip(trunk_class=Eva, **{"global_pool": "token", **trunk})
    with torch.no_grad():
        for name, weight in model.visual.trunk.named_parameters():
            # It starts so small that attention is all but uniform.
            if weight.ndim == 2 and ".attn." in name:
                weight.mul_(8)
    return model


def small_resnet_clip(*, seed=0, **vision):
    """Return a CLIP on OpenCLIP's ResNet with 3 x 3 cells of 32; `vision` changes its config."""
    torch.manual_seed(seed)
    model = CLIP(32, {"layers": [1] * 4, "image_size": 96, "width": 8, **vision}, dict(TEXT))
    for block in model.visual.modules():
        if hasattr(block, "bn3") and hasattr(block, "downsample"):
            # It starts at zero, so that the block would do nothing.
            torch.nn.init.normal_(block.bn3.weight)
    return model


def small_convnext_clip(*, seed=0, **trunk):
    """Return a CustomTextCLIP on timm's ConvNeXt, alike; `trunk` changes its arguments."""
    torch.manual_seed(seed)
    # Any will do: its trunk is replaced by one of our own size.
    vision = {
        "timm_model_name": "test_convnext",
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 96,
    }
    model = CustomTextCLIP(32, vision, dict(TEXT))
    small = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 64), "ls_init_value": 0.5}
    model.visual.trunk = ConvNeXt(num_classes=0, **{**small, **trunk})
    for name, weight in model.visual.trunk.named_parameters():
        if ".grn." in name:
            torch.nn.init.normal_(weight)
    return model


def small_coca(*, seed=0, text=None, **vision):
    """Return a CoCa with 16 patches; `text` and `vision` change its towers' configs."""
    torch.manual_seed(seed)
    pooling = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}
    tower = {**TEXT, "width": 64}
    model = CoCa(
        64,
        multimodal_cfg=tower,
        text_cfg={**tower, "embed_cls": True, "output_tokens": True, **(text or {})},
        vision_cfg={**VISION, **pooling, "output_tokens": True, **vision},
    )
    # OpenCLIP leaves this parameter as the memory it finds.
    torch.nn.init.normal_(model.text_decoder.text_projection, std=0.1)
    return model


def image_batch(batch_size=3, *, seed=0):
    """Return images (B, 3, 64, 64) for the models above."""
    return torch.randn(batch_size, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def text_batch(batch_size=3, *, seed=0):
    """Return token ids (B, 16) for the models above."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 100, (batch_size, 16), generator=generator)
