import kornia
import numpy as np
import pytest
import torch

from clip_pgs.masking.canny import HIGH, HYSTERESIS_STEPS, LOW, canny_edges, canny_map
from support.images import smooth_images


def kornia_map(image):
    """Return kornia's edges of one image (3, H, W) at the same thresholds."""
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    brightness = (weights * image).sum(dim=0)[None, None]
    # kornia's thresholds are absolute: its first result is the magnitude they apply to.
    blurred = kornia.filters.gaussian_blur2d(brightness, (5, 5), (1.0, 1.0))
    gradients = kornia.filters.spatial_gradient(blurred, normalized=False)[0, 0]
    strongest = gradients.norm(dim=0).max().item()
    edges = kornia.filters.canny(brightness, LOW * strongest, HIGH * strongest)[1]
    return edges[0, 0] > 0


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80)])
def test_it_agrees_with_kornia(height, width):
    images = smooth_images(4, height=height, width=width)
    edges = canny_map(images)
    for image, found in zip(images, edges, strict=True):
        expected = kornia_map(image)
        assert expected.float().mean() > 0.01
        # kornia drops both pixels of a tie, and follows weak lines to their end.
        assert (found != expected).float().mean() < 0.005


def test_the_strength_of_a_patch_is_its_share_of_edge_pixels():
    images = smooth_images(2, height=32, width=48)
    for image, strength in zip(images, canny_edges(images, (8, 16)), strict=True):
        cells = canny_map(image[None])[0].numpy().reshape(4, 8, 3, 16).mean(axis=(1, 3)).ravel()
        expected = (cells - cells.min()) / (cells.max() - cells.min())
        np.testing.assert_allclose(strength.numpy(), expected, atol=1e-6)


def test_an_ideal_step_is_one_line_of_pixels():
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[..., 8:] = 1.0
    assert canny_map(pixels)[0].sum(dim=1).tolist() == [1] * 16


def test_contrast_changes_nothing():
    images = smooth_images()
    assert torch.equal(canny_map(images), canny_map(images * 256))


def fading_line(length):
    """Return a horizontal step that fades from 1 to 0.15 and stays there for `length` pixels."""
    heights = torch.cat([torch.linspace(1.0, 0.15, 20), torch.full((length,), 0.15)])
    pixels = torch.zeros(1, 3, 16, 20 + length)
    pixels[:, :, 8:] = heights
    return pixels


def test_a_weak_line_counts_where_it_continues_a_strong_one():
    assert canny_map(fading_line(10))[0].any(dim=0).all()


def test_a_weak_line_ends_after_the_steps_of_hysteresis():
    edges = canny_map(fading_line(40))[0].any(dim=0)
    # The line is strong above a height of 0.2, for its first 18 pixels or 19.
    assert edges[: 18 + HYSTERESIS_STEPS].all()
    assert not edges[20 + HYSTERESIS_STEPS :].any()


def test_a_weak_line_alone_is_no_edge():
    pixels = torch.zeros(1, 3, 32, 16)
    pixels[:, :, 8:] = 1.0
    pixels[:, :, 24:] = 1.15
    assert not canny_map(pixels)[0, 16:].any()


@pytest.mark.parametrize("value", [0.0, 1.3, 255.0])
def test_a_constant_image_has_no_edges(value):
    assert (canny_edges(torch.full((1, 3, 16, 16), value), 4) == 0).all()


def test_grey_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"pixels must have shape \(B, 3, H, W\), got"):
        canny_edges(torch.zeros(1, 1, 16, 16), 4)
