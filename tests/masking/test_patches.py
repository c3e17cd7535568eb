import torch

from clip_pgs import PatchSelection
from clip_pgs.masking.patches import gather_tokens, kept_patches, paint_kept, patchify

SELECTION = PatchSelection(
    torch.tensor([[0, 5], [2, 2]]), torch.tensor([[True, True], [True, False]])
)


def test_patchify_agrees_with_torch_unfold():
    pixels = torch.randn(2, 3, 8, 12)
    unfolded = torch.nn.functional.unfold(pixels, kernel_size=4, stride=4).transpose(1, 2)
    assert torch.equal(patchify(pixels, (4, 4)), unfolded)


def test_patchify_takes_patches_that_are_not_square():
    pixels = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert patchify(pixels, (2, 4))[0].tolist() == [list(range(8)), list(range(8, 16))]


def test_gather_takes_the_tokens_at_the_index():
    tokens = torch.arange(24.0).reshape(2, 6, 2)
    assert gather_tokens(tokens, SELECTION).tolist() == [
        [[0.0, 1.0], [10.0, 11.0]],
        [[16.0, 17.0], [16.0, 17.0]],
    ]


def test_kept_patches_marks_each_valid_entry_once():
    assert kept_patches(SELECTION, 6).int().tolist() == [[1, 0, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0]]


def test_painting_leaves_kept_pixels_and_greys_the_rest():
    pixels = torch.rand(2, 3, 4, 6)
    painted = paint_kept(pixels, SELECTION, (2, 2))
    assert torch.equal(painted[0, :, :2, :2], pixels[0, :, :2, :2])
    assert torch.equal(painted[0, :, 2:, 4:], pixels[0, :, 2:, 4:])
    assert (painted[0, :, :2, 2:] == 0.5).all()
    assert (painted[1, :, 2:] == 0.5).all()


def test_painting_greys_what_lies_beyond_the_last_whole_patch():
    pixels = torch.rand(1, 3, 5, 7)
    painted = paint_kept(pixels, PatchSelection(torch.arange(6)[None]), (2, 2))
    assert torch.equal(painted[:, :, :4, :6], pixels[:, :, :4, :6])
    assert (painted[:, :, 4:] == 0.5).all()
    assert (painted[..., 6:] == 0.5).all()
