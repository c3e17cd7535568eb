import math

import pytest
import torch

from clip_pgs import PatchSelection
from clip_pgs.masking.sampling import (
    draw_noise,
    gather_tokens,
    gumbel,
    image_draw,
    in_blocks,
    kept_patches,
    mask_top,
    mask_top_counts,
    paint_kept,
    patchify,
    second_draw,
    select_top,
    share_at_random,
)
from support.images import make_inputs


def test_select_top_keeps_the_highest_in_raster_order():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    assert select_top(scores, num_keep=2).index.tolist() == [[1, 3]]


def test_mask_top_drops_the_highest_and_ties_go_to_the_lower_index():
    scores = torch.tensor([[0.5, 0.9, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0]])
    assert mask_top(scores, num_mask=2).index.tolist() == [[2, 3], [2, 3]]


def test_mask_top_counts_drops_each_rows_own_number():
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.4, 0.3, 0.2, 0.1]])
    selection = mask_top_counts(scores, num_mask=torch.tensor([1, 3]), num_mask_min=1)
    assert selection.index.tolist() == [[0, 2, 3], [3, 3, 3]]
    assert selection.valid.tolist() == [[True, True, True], [True, False, False]]


def test_noise_is_uniform_in_the_unit_interval():
    inputs = make_inputs(64, grid_size=(10, 10))
    noise = draw_noise(inputs, torch.Generator().manual_seed(0))
    assert noise.shape == (64, 100)
    assert 0.0 <= noise.min() < 0.01
    assert 0.99 < noise.max() < 1.0
    assert noise.mean().item() == pytest.approx(0.5, abs=0.01)


def test_gumbel_has_its_mean_and_stays_finite_at_zero():
    values = gumbel(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert values.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert values.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.01)
    assert torch.isfinite(gumbel(torch.tensor([0.0, 1.0 - 2**-24]))).all()


def test_a_second_draw_is_uniform_whatever_the_first_one_was():
    first = torch.rand(2**20, generator=torch.Generator().manual_seed(0))
    second = second_draw(first)
    assert ((second >= 0) & (second < 1)).all()
    # 2**20 numbers in 16 x 32 equal cells: 2048 in each, with a standard deviation of 45.
    cells = torch.bincount((first * 16).long() * 32 + (second * 32).long(), minlength=512)
    assert (cells - 2048).abs().max() < 5 * 45
    pairs = torch.stack([first, second, first.roll(1)])
    assert (torch.corrcoef(pairs) - torch.eye(3)).abs().max() < 5 / 2**10
    # Among the few highest, as candidates are, too.
    highest = second[first > 0.99]
    assert highest.mean().item() == pytest.approx(0.5, abs=5 * 12**-0.5 / len(highest) ** 0.5)


def test_a_second_draw_tells_neighboring_numbers_apart():
    first = torch.arange(2**24 - 1000, 2**24) / 2**24
    assert second_draw(first).unique().numel() == 1000


def test_an_image_draw_is_uniform_and_tells_nothing_about_a_patch():
    noise = torch.rand(2**18, 3, generator=torch.Generator().manual_seed(3))
    drawn = image_draw(noise)[:, 0]
    assert ((drawn >= 0) & (drawn < 1)).all()
    for column in noise.T:
        # 16 x 16 equal cells: 1024 in each, with a standard deviation of 32.
        cells = torch.bincount((column * 16).long() * 16 + (drawn * 16).long(), minlength=256)
        assert (cells - 1024).abs().max() < 5 * 32


SCORES = torch.rand(2000, 20, generator=torch.Generator().manual_seed(1))
NOISE = torch.rand(2000, 20, generator=torch.Generator().manual_seed(2))


def kept_at_random(share, *, num_mask=12):
    scores = share_at_random(SCORES, NOISE, num_mask=num_mask, random_share=share)
    return kept_patches(mask_top(scores, num_mask=num_mask), 20)


@pytest.mark.parametrize(("share", "num_lowest"), [(0.25, 6), (0.5, 4), (0.8, 2), (1.0, 0)])
def test_a_share_of_what_stays_is_uniform_among_all_but_the_lowest(share, num_lowest):
    kept = kept_at_random(share).gather(1, SCORES.argsort(dim=1)).float()
    assert (kept.sum(dim=1) == 8).all()
    assert (kept[:, :num_lowest] == 1).all()
    expected = (8 - num_lowest) / (20 - num_lowest)
    # Five standard deviations of a binomial share.
    deviation = 5 * (expected * (1 - expected) / 2000) ** 0.5
    assert (kept[:, num_lowest:].mean(dim=0) - expected).abs().max() < deviation


def test_a_share_of_each_images_own_count_is_drawn_like_that_of_the_same_fixed_count():
    num_mask = torch.arange(2000) % 19 + 1
    scores = share_at_random(SCORES, NOISE, num_mask=num_mask, random_share=0.3)
    kept = kept_patches(mask_top_counts(scores, num_mask=num_mask, num_mask_min=1), 20)
    for count in range(1, 20):
        rows = num_mask == count
        assert torch.equal(kept[rows], kept_at_random(0.3, num_mask=count)[rows])


def test_no_random_share_changes_no_score():
    assert share_at_random(SCORES, NOISE, num_mask=12, random_share=0.0) is SCORES


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


IMAGE = 2**18  # numbers, of which a block holds twice as many


def test_large_batches_are_cut_into_blocks_and_put_together_in_order():
    sizes = []

    def double(images, offset, absent):
        assert absent is None
        sizes.append(len(images))
        return 2 * images[:, :1] + offset

    images = torch.arange(5.0)[:, None].expand(5, IMAGE)
    offset = torch.arange(5.0)[:, None] / 10
    result = in_blocks(double, images, offset, None)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(result, 2 * images[:, :1] + offset)


def test_a_batch_that_fits_a_block_stays_whole():
    assert in_blocks(lambda images: images[:1], torch.zeros(2, IMAGE)).shape == (1, IMAGE)


def test_an_image_larger_than_a_block_is_one():
    sizes = []
    in_blocks(lambda images: sizes.append(len(images)) or images, torch.zeros(2, 3 * IMAGE))
    assert sizes == [1, 1]


def test_other_devices_keep_the_batch_whole():
    images = torch.zeros(5, IMAGE, device="meta")
    assert in_blocks(lambda whole: whole[:1], images).shape == (1, IMAGE)


def test_a_compiled_batch_stays_whole():
    compiled = torch.compile(
        lambda images: in_blocks(lambda x: x[:1], images), backend="eager", fullgraph=True
    )
    assert compiled(torch.zeros(5, IMAGE)).shape == (1, IMAGE)


def test_no_images_give_no_result():
    assert in_blocks(lambda images: images + 1, torch.zeros(0, 3)).shape == (0, 3)
