"""Pictures and masks of scenes, and what robustness is measured on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_erosion, convolve, distance_transform_edt

from clip_pgs.data.world.draw import (
    draw_blurred,
    draw_gray,
    draw_noisy,
    draw_outlines,
    draw_scene,
    on_unseen_background,
    shape_distance,
)
from clip_pgs.data.world.scene import BACKGROUNDS, COLORS, SHAPES, UNSEEN_BACKGROUNDS, make_scene
from clip_pgs.data.world.splits import EVAL_SETS, captioned


def test_picture_and_mask_have_their_documented_types():
    drawing = draw_scene(make_scene("test"))
    assert drawing.pixels.shape == (64, 64, 3)
    assert drawing.pixels.dtype == np.uint8
    assert drawing.foreground.shape == (64, 64)
    assert drawing.foreground.dtype == bool


def test_foreground_takes_a_fair_share_of_the_image():
    shares = [draw_scene(make_scene(f"test/{n}")).foreground.mean() for n in range(100)]
    assert min(shares) > 0.01
    assert 0.05 < np.mean(shares) < 0.25
    assert max(shares) < 0.5


@pytest.mark.parametrize("color", COLORS)
def test_color_of_an_object_is_found_inside_its_mask(color):
    inside = []
    for number in range(12):
        scene = make_scene(f"test/{number}", num_things=1, color=color, sizes=("large",))
        scene = replace(scene, things=(replace(scene.things[0], texture="plain"),))
        drawing = draw_scene(scene)
        core = binary_erosion(drawing.foreground, iterations=2)
        inside.append(np.median(drawing.pixels[core], axis=0))
    mean = np.mean(inside, axis=0)
    nearest = min(COLORS, key=lambda name: np.linalg.norm(np.array(COLORS[name]) - mean))
    assert nearest == color


def test_outside_of_objects_and_shadows_only_the_background_is_seen():
    for number in range(30):
        scene = make_scene(f"test/{number}")
        drawing, empty = draw_scene(scene), draw_scene(replace(scene, things=()))
        far = distance_transform_edt(~drawing.foreground) > 8
        assert np.array_equal(drawing.pixels[far], empty.pixels[far])
        assert not empty.foreground.any()


def test_every_object_stands_out_from_its_background():
    for number in range(100):
        scene = make_scene(f"test/{number}", num_things=1)
        drawing, empty = draw_scene(scene), draw_scene(replace(scene, things=()))
        change = np.abs(drawing.pixels.astype(int) - empty.pixels).max(axis=2)
        assert (change[drawing.foreground] > 25).mean() > 0.7


def test_another_background_keeps_the_objects():
    scene = make_scene("test/3", num_things=1, color="red", background="sand")
    moved = replace(scene, background="grass")
    assert np.array_equal(draw_scene(scene).foreground, draw_scene(moved).foreground)
    core = binary_erosion(draw_scene(scene).foreground, iterations=1)
    assert np.array_equal(draw_scene(scene).pixels[core], draw_scene(moved).pixels[core])


def test_textures_look_different():
    scene = make_scene("test", num_things=1, sizes=("large",))
    pictures = [
        draw_scene(replace(scene, things=(replace(scene.things[0], texture=texture),))).pixels
        for texture in ("plain", "striped", "dotted", "checkered")
    ]
    assert len({picture.tobytes() for picture in pictures}) == 4


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_background_differs_from_scene_to_scene(background):
    pictures = {
        draw_scene(make_scene(f"test/{n}", background=background)).pixels.tobytes()
        for n in range(3)
    }
    assert len(pictures) == 3


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_unit_circle_and_no_more(shape):
    x, y = np.meshgrid(np.linspace(-1.4, 1.4, 141), np.linspace(-1.4, 1.4, 141))
    distance = shape_distance(shape, x, y)
    reach = np.hypot(x, y)[distance < 0].max()
    assert 0.9 < reach < 1.3
    assert distance[np.hypot(x, y) > 1.32].min() > 0


def test_circle_distances_are_those_of_a_circle():
    x = np.linspace(-1.5, 1.5, 61)
    distance = shape_distance("circle", x, np.zeros_like(x))
    assert np.allclose(distance, np.abs(x) - 0.95, atol=0.02)


VARIANTS = ("shape_noise", "shape_blur", "shape_grey", "shape_outline", "shape_background")
SCENES = [sample.scene for sample in EVAL_SETS["shape"].splits["test"](0, 3)]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_shows_the_test_scenes_of_shape_in_their_order(name):
    plain, variant = EVAL_SETS["shape"], EVAL_SETS[name]
    assert variant.splits.keys() == {"test"}
    assert (variant.class_names, variant.templates) == (plain.class_names, plain.templates)
    samples = plain.splits["test"](0, 2)
    for sample, changed in zip(samples, variant.splits["test"](0, 2), strict=True):
        assert (changed.key, changed.label) == (sample.key, sample.label)
        assert changed.scene.things == sample.scene.things
        before, after = draw_scene(sample.scene), variant.draw(changed.scene)
        assert np.array_equal(after.foreground, before.foreground)
        assert not np.array_equal(after.pixels, before.pixels)


@pytest.mark.parametrize("draw", [draw_noisy, draw_blurred, draw_gray, draw_outlines])
def test_equal_scenes_give_equal_pixels(draw):
    first, again = draw(SCENES[0]), draw(SCENES[0])
    assert first.pixels.dtype == np.uint8
    assert np.array_equal(first.pixels, again.pixels)


def test_noise_is_normal_independent_and_of_its_stated_strength():
    changes = []
    for scene in SCENES:
        pixels = draw_scene(scene).pixels.astype(float)
        change = draw_noisy(scene).pixels - pixels
        # What is cut off at 0 and 255 is left out.
        change[(pixels < 115) | (pixels > 140)] = np.nan
        changes.append(change)
    noise = np.stack(changes)
    assert np.nanmean(noise) == pytest.approx(0, abs=1)
    assert np.nanstd(noise) == pytest.approx(48, abs=1)
    assert np.mean(np.abs(noise[~np.isnan(noise)]) < 48) == pytest.approx(0.68, abs=0.03)
    for first, second in (
        (noise[..., 0], noise[..., 1]),
        (noise[:, :, 1:], noise[:, :, :-1]),
        (noise[1:], noise[:-1]),
    ):
        assert np.nanmean(first * second) / 48**2 == pytest.approx(0, abs=0.05)


def test_blur_is_that_of_a_binomial_kernel():
    weights = np.outer([1, 2, 1], [1, 2, 1])[..., None] / 16
    for scene in SCENES[:5]:
        expected = convolve(draw_scene(scene).pixels.astype(float), weights, mode="nearest")
        assert np.abs(draw_blurred(scene).pixels - expected).max() <= 0.5


def test_grey_has_no_color_and_keeps_the_brightness():
    for scene in SCENES[:5]:
        grey = draw_gray(scene).pixels
        assert np.array_equal(grey[..., 0], grey[..., 1])
        assert np.array_equal(grey[..., 0], grey[..., 2])
        expected = np.asarray(Image.fromarray(draw_scene(scene).pixels).convert("L"), dtype=float)
        assert np.abs(grey[..., 0] - expected).max() < 5


def test_of_an_outlined_object_nothing_but_the_outline_is_seen():
    for scene in SCENES:
        outlined, empty = draw_outlines(scene), draw_scene(replace(scene, things=()))
        inside = distance_transform_edt(outlined.foreground)
        outside = distance_transform_edt(~outlined.foreground)
        # The notch of a heart has its line deep inside the mask.
        far = (inside > 10) | (outside > 2)
        assert np.array_equal(outlined.pixels[far], empty.pixels[far])
        line = (inside > 2) & (inside < 4)
        assert np.median(outlined.pixels[line]) < 70


def test_an_outline_lies_where_the_filled_object_has_it():
    for scene in SCENES:
        filled, outlined = draw_scene(scene), draw_outlines(scene)
        depth = distance_transform_edt(filled.foreground)
        line = (depth > 1) & (depth < 4)
        change = np.abs(filled.pixels[line].astype(int) - outlined.pixels[line])
        # The rim of a filled object lets a tenth of its colour through.
        assert np.median(change) < 25


def test_an_unseen_background_is_none_of_training():
    trained_on = {sample.scene.background for sample in captioned("train", 0, 0, 500)}
    assert trained_on == set(BACKGROUNDS)
    unseen = {on_unseen_background(scene).background for scene in SCENES}
    assert unseen == set(UNSEEN_BACKGROUNDS)
    assert not unseen & trained_on


def test_an_unseen_background_leaves_the_object_as_it_is():
    for scene in SCENES:
        before, after = draw_scene(scene), draw_scene(on_unseen_background(scene))
        core = binary_erosion(before.foreground, iterations=2)
        assert np.array_equal(after.pixels[core], before.pixels[core])
        change = np.abs(after.pixels.astype(int) - before.pixels).max(axis=2)
        assert (change[~before.foreground] > 10).mean() > 0.7


def test_the_caption_of_a_picture_on_an_unseen_background_names_it():
    for sample in EVAL_SETS["shape_background"].splits["test"](0, 1):
        assert UNSEEN_BACKGROUNDS[sample.scene.background].noun in sample.caption


@pytest.mark.parametrize("background", UNSEEN_BACKGROUNDS)
def test_an_unseen_background_differs_from_scene_to_scene(background):
    pictures = {
        draw_scene(replace(make_scene(f"test/{n}"), background=background)).pixels.tobytes()
        for n in range(3)
    }
    assert len(pictures) == 3
