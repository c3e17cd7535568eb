"""The control: masks of PGS that know nothing of the images that they fall on."""

import pytest
import torch

from clip_pgs import PatchInputs, create_masking
from support.images import smooth_images

NAME = "clip_pgs.study.controls:ShuffledPGS"


@pytest.mark.parametrize("progress", [0.0, 0.5], ids=["pixels", "pixels and tokens"])
@pytest.mark.parametrize(
    "options", [{"mask_ratio": 0.75}, {"mask_ratio": 0.5, "mask_ratio_min": 0.3}], ids=str
)
def test_each_image_gets_the_mask_of_the_image_before_it(options, progress):
    pixels = smooth_images(4, height=64, width=64)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 64, 16, generator=generator)
    inputs = PatchInputs(
        pixels, 8, tokens=tokens, progress=progress, noise=torch.rand(4, 64, generator=generator)
    )
    own = create_masking("pgs", **options)(inputs)
    shuffled = create_masking(NAME, **options)(inputs)
    for part in ("index", "valid"):
        before = getattr(own, part)
        if before is None:
            assert getattr(shuffled, part) is None
        else:
            assert torch.equal(getattr(shuffled, part), before[[3, 0, 1, 2]])
