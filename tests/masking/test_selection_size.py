"""What a PGS selection may hold in memory, at any number of patches."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clip_pgs import PatchInputs, create_masking
from support.images import smooth_images

NUM_PATCHES, NUM_CANDIDATES = 169, 8  # 13 x 13 patches, 5 percent of them


class RecordShapes(TorchDispatchMode):
    """Keep the shape of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(value, torch.Tensor):
                self.shapes.add(tuple(value.shape))
        return result


@pytest.mark.parametrize("progress", [0.0, 0.5])
@pytest.mark.parametrize("options", [{}, {"mask_ratio_min": 0.3}], ids=["fixed", "adaptive"])
def test_no_tensor_pairs_patches_with_patches(options, progress):
    pixels = smooth_images(2, height=52, width=52)
    tokens = torch.randn(2, NUM_PATCHES, 24, generator=torch.Generator().manual_seed(0))
    with RecordShapes() as record:
        create_masking("pgs", **options)(PatchInputs(pixels, 4, tokens=tokens, progress=progress))
    assert (2, NUM_CANDIDATES, NUM_PATCHES) in record.shapes
    assert not [shape for shape in record.shapes if shape.count(NUM_PATCHES) > 1]
