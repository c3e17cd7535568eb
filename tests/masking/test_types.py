import pytest
import torch

from clip_pgs import PatchInputs, PatchSelection

IMAGES = torch.zeros(2, 3, 32, 48)


def test_grid_follows_the_image_and_the_patch():
    inputs = PatchInputs(IMAGES, (16, 8))
    assert inputs.grid_size == (2, 6)
    assert inputs.num_patches == 12
    assert inputs.batch_size == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pixels": IMAGES[0]}, r"pixels must have shape \(B, 3, H, W\), got \(3, 32, 48\)"),
        ({"pixels": IMAGES.long()}, "pixels must be floating point, got torch.int64"),
        ({"patch_size": 20}, "patch_size must divide the image: 32 x 48 pixels"),
        ({"patch_size": 0}, r"patch_size must be at least 1, got \(0, 0\)"),
        ({"progress": 1.5}, r"progress must be in \[0, 1\], got 1.5"),
        ({"tokens": torch.zeros(2, 5, 8)}, r"tokens must have shape \(B, N, D\)"),
        ({"noise": torch.zeros(2, 5)}, r"noise must have shape \(B, N\) = \(2, 6\)"),
    ],
)
def test_wrong_inputs_are_refused_in_one_sentence(changes, sentence):
    fields = {"pixels": IMAGES, "patch_size": 16, **changes}
    with pytest.raises(ValueError, match=sentence):
        PatchInputs(**fields)


def test_kept_counts_count_valid_slots():
    index = torch.tensor([[0, 1, 2], [3, 3, 3]])
    valid = torch.tensor([[True, True, True], [True, False, False]])
    assert PatchSelection(index, valid).kept_counts().tolist() == [3, 1]
    assert PatchSelection(index).kept_counts().tolist() == [3, 3]
