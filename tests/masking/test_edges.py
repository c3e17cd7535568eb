import numpy as np
import pytest
import torch
from scipy import ndimage

from clip_pgs import sobel_edges
from support.images import smooth_images


def test_a_vertical_step_is_the_only_edge():
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[..., 8:] = 1.0
    # The step lies between columns 7 and 8, so both patch columns beside it see it.
    assert sobel_edges(pixels, 4).reshape(4, 4).tolist() == [[0.0, 1.0, 1.0, 0.0]] * 4


def test_an_edge_inside_a_patch_belongs_to_it_alone():
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[..., 6:] = 1.0
    assert sobel_edges(pixels, 4).reshape(4, 4).tolist() == [[0.0, 1.0, 0.0, 0.0]] * 4


@pytest.mark.parametrize(("height", "width", "patch_size"), [(32, 32, 8), (24, 40, (4, 8))])
def test_it_agrees_with_scipy(height, width, patch_size):
    pixels = smooth_images(2, height=height, width=width)
    patch_height, patch_width = (8, 8) if patch_size == 8 else patch_size
    for image, edges in zip(pixels.double().numpy(), sobel_edges(pixels, patch_size), strict=True):
        luminance = np.tensordot([0.299, 0.587, 0.114], image, axes=1)
        magnitude = np.hypot(
            ndimage.sobel(luminance, axis=0, mode="nearest"),
            ndimage.sobel(luminance, axis=1, mode="nearest"),
        )
        cells = magnitude.reshape(
            height // patch_height, patch_height, width // patch_width, patch_width
        )
        expected = cells.mean(axis=(1, 3)).reshape(-1)
        expected = (expected - expected.min()) / (expected.max() - expected.min())
        np.testing.assert_allclose(edges.numpy(), expected, atol=1e-5)


def test_a_batch_in_blocks_is_every_image_by_itself():
    # A block holds about half a million numbers, which is three of these images.
    pixels = smooth_images(7, height=240, width=224)
    alone = torch.cat([sobel_edges(pixels[i : i + 1], 16) for i in range(7)])
    assert torch.equal(sobel_edges(pixels, 16), alone)


@pytest.mark.parametrize("value", [0.0, 1.3, 255.0])
def test_a_constant_image_has_no_edges(value):
    assert (sobel_edges(torch.full((1, 3, 16, 16), value), 4) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    pixels = smooth_images().to(dtype)
    assert torch.equal(sobel_edges(pixels, 8), sobel_edges(pixels.float(), 8))


def test_autocast_changes_nothing():
    pixels = smooth_images()
    plain = sobel_edges(pixels, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sobel_edges(pixels, 8), plain)


@pytest.mark.parametrize(
    ("shape", "patch_size", "sentence"),
    [
        ((1, 1, 8, 8), 4, r"pixels must have shape \(B, 3, H, W\), got \(1, 1, 8, 8\)"),
        ((3, 8, 8), 4, r"pixels must have shape \(B, 3, H, W\)"),
        ((1, 3, 8, 10), 4, "patch_size must divide the image: 8 x 10 pixels in patches of 4 x 4"),
    ],
)
def test_wrong_shapes_are_refused(shape, patch_size, sentence):
    with pytest.raises(ValueError, match=sentence):
        sobel_edges(torch.zeros(shape), patch_size)
