"""Small OpenCLIP models, built without any file or network."""

import torch
from open_clip.model import CLIP, CustomTextCLIP

TEXT = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": 64, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32}


def small_clip(*, custom_text=False, seed=0, **vision):
    """Return a CLIP with 16 patches; `vision` changes its image tower's config."""
    torch.manual_seed(seed)
    model_class = CustomTextCLIP if custom_text else CLIP
    return model_class(64, {**VISION, **vision}, dict(TEXT))


def image_batch(batch_size=3, *, seed=0):
    """Return images (B, 3, 64, 64) for `small_clip`."""
    return torch.randn(batch_size, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def text_batch(batch_size=3, *, seed=0):
    """Return token ids (B, 16) for `small_clip`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 100, (batch_size, 16), generator=generator)
