import kornia
import numpy as np
import pytest
import torch
from scipy import ndimage

from clip_pgs import sobel_edges
from clip_pgs.masking.edges import HIGH, HYSTERESIS_STEPS, LOW, canny_edges, canny_map
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


@pytest.mark.parametrize("measure", [sobel_edges, canny_edges])
@pytest.mark.parametrize("scale", [2.0**-100, 0.25, 2.0**100, 2.0**125])
def test_the_scale_of_an_image_changes_no_bit(measure, scale):
    pixels = smooth_images(2)
    edges = measure(pixels, 8)
    assert edges.max() == 1
    assert torch.equal(measure(pixels * scale, 8), edges)


@pytest.mark.parametrize("scale", [1e-30, 1e30, 3e37])
def test_edges_of_any_scale_agree_with_float64(scale):
    pixels = smooth_images(1)
    torch.testing.assert_close(sobel_edges(pixels * scale, 8), sobel_edges(pixels, 8))


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


@pytest.mark.parametrize("measure", [sobel_edges, canny_edges])
@pytest.mark.parametrize(
    ("pixels", "sentence"),
    [
        ([[0.5]], r"pixels must have shape \(B, 3, H, W\), got list"),
        (torch.zeros(1, 3, 0, 8), r"pixels must have shape \(B, 3, H, W\), got \(1, 3, 0, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "pixels must be floating point, got torch.ui"),
    ],
)
def test_what_is_no_image_is_refused(measure, pixels, sentence):
    with pytest.raises(ValueError, match=sentence):
        measure(pixels, 4)


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
def test_a_constant_image_has_no_canny_edges(value):
    assert (canny_edges(torch.full((1, 3, 16, 16), value), 4) == 0).all()


def test_grey_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"pixels must have shape \(B, 3, H, W\), got"):
        canny_edges(torch.zeros(1, 1, 16, 16), 4)
