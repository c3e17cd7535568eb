from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, distance_transform_edt

from clip_pgs.data.world import draw_scene, make_scene
from clip_pgs.data.world.dice import Dice
from clip_pgs.data.world.shapes import shape_distance
from clip_pgs.data.world.vocabulary import BACKGROUNDS, COLORS, SHAPES


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


def test_dice_with_equal_keys_roll_equal_numbers():
    first, again, other = Dice("a", 1), Dice("a", 1), Dice("a", 2)
    rolls = [[dice.uniform() for _ in range(200)] for dice in (first, again, other)]
    assert rolls[0] == rolls[1]
    assert rolls[0] != rolls[2]


def test_dice_roll_evenly():
    dice = Dice("even")
    rolls = [dice.uniform(2, 4) for _ in range(4000)]
    assert 2 <= min(rolls) < 2.01
    assert 3.99 < max(rolls) < 4
    assert np.mean(rolls) == pytest.approx(3, abs=0.05)
    noise = dice.noise("field", 64, 64)
    assert noise.min() >= 0
    assert noise.max() < 1
    assert noise.mean() == pytest.approx(0.5, abs=0.03)
