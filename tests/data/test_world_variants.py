from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_erosion, convolve, distance_transform_edt

from clip_pgs.data.world import draw_scene, make_scene
from clip_pgs.data.world.splits import EVAL_SETS, captioned
from clip_pgs.data.world.variants import (
    draw_blurred,
    draw_grey,
    draw_noisy,
    draw_outlines,
    on_unseen_background,
)
from clip_pgs.data.world.vocabulary import BACKGROUNDS, UNSEEN_BACKGROUNDS

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


@pytest.mark.parametrize("draw", [draw_noisy, draw_blurred, draw_grey, draw_outlines])
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
        grey = draw_grey(scene).pixels
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
